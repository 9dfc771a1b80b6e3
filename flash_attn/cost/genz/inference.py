"""Tables and totals of whole models the way GenZ makes them: prefill, decode and chunked."""

import copy
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from flash_attn.cost.accounting import SOFTMAX_CONSTANT
from flash_attn.cost.counts import positive
from flash_attn.cost.genz import flash_attention_config as config
from flash_attn.cost.genz import layers
from flash_attn.cost.genz.operators import MEMORY_VIEWS, OPERATORS, OpType
from flash_attn.cost.genz.system import System, Unit, get_inference_system
from flash_attn.cost.report import Table
from flash_attn.errors import ArgumentValueError

_BLOCKS = {  # layer name -> where GenZ books its time
    "embeddings": ("Embedding",), "classifier": ("Embedding",),
    "Emb_AR": ("AR_time", "Embedding", "Collective"), "classifier_AG": ("AR_time", "Embedding", "Collective"),
    "QKV": ("MHA", "QKVO_layers"), "Out Proj": ("MHA", "QKVO_layers"),
    "Logit": ("MHA", "LA_layers"), "Attend": ("MHA", "LA_layers"),
    "Gate": ("FFN", "FFN_layers"), "up+gate": ("FFN", "FFN_layers"), "down": ("FFN", "FFN_layers"),
    "Message Pass": ("Collective", "Send_Recv_time"), "MHA AR": ("MHA", "Collective", "AR_time"),
    "Gate AR": ("FFN", "Collective", "AR_time"), "FFN AR": ("FFN", "Collective", "AR_time"),
    "Dispatch A2A": ("Collective", "A2A_time", "FFN"), "Collect A2A": ("Collective", "A2A_time", "FFN"),
}  # fmt: skip


@dataclass
class RuntimeBreakdown:
    """Milliseconds by block; some times are booked under two names, as in GenZ."""

    Embedding: float = 0
    MHA: float = 0
    FFN: float = 0
    Collective: float = 0
    LA_layers: float = 0
    QKVO_layers: float = 0
    FFN_layers: float = 0
    Softmax: float = 0  # GenZ models none
    AR_time: float = 0
    A2A_time: float = 0
    Send_Recv_time: float = 0
    Mamba_time: float = 0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class ModdelingOutput(dict):
    """GenZ's result, a dict whose keys are attributes too; `mode` and `memory` say how it was counted."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def get_model_df(
    model: list, system: System, unit: Unit | None = None, batch_size: float = 1, intermediate_on_chip: bool = False,
    beam_size: int = 1, beam_merge: bool = False, model_characterstics: bool = False, memory: str = "residency",
) -> Table:  # fmt: skip
    """GenZ's table of `model` (rows from `create_full_*_model`): one line a row, times of one repetition.

    Args:
        beam_merge: the prefix of all `beam_size` beams is read once.
        model_characterstics: sizes and MACs only, no times.
        memory: "residency" (S and P on chip, as GenZ does) or "coefficient" (everything off chip, divided by the
            memory-efficiency coefficient of seed 000).
    """
    if memory not in MEMORY_VIEWS:
        raise ArgumentValueError(f"memory must be one of {', '.join(MEMORY_VIEWS)}, got {memory!r}")
    unit = unit or system.unit
    lines = []
    for name, *rest in model:
        merged = beam_merge and rest[-1] in (OpType.Logit_BM_PREFILL, OpType.Attend_BM_PREFILL)
        batch = batch_size // beam_size if merged else batch_size
        operator = OPERATORS[rest[-1]]([name, batch, *rest])
        if model_characterstics:
            lines.append(operator.characteristics(system, unit))
        else:
            lines.append(operator.roofline(system, unit, intermediate_on_chip, memory))
    return Table(lines)


def _weighted(df: Table):
    """(line, how often it runs), without the Repeat lines."""
    times = 1.0
    for line in df:
        if line["Op Type"] == "Repeat":
            times *= line["Dimension"]
        elif line["Op Type"] == "EndRepeat":
            times /= line["Dimension"]
        else:
            yield line, times


def get_summary_table(df: Table, unit: Unit | None = None, model_characterstics: bool = False) -> Table:
    """Totals over all repetitions, one line. "MACs" holds FLOPs when `df` has times: GenZ's own naming."""
    unit = unit or Unit()
    flop, mem, time = unit.unit_flop, unit.unit_mem, unit.unit_time
    parts = [f"{name} ({mem})" for name in ("Input_a", "Input_w", "Output")]
    keys = ["MACs", "Total Data", "Total Weights", "Unused Weights", "KV Cache"]
    total: dict[str, float] = {f"{key} ({flop if key == 'MACs' else mem})": 0 for key in keys}
    latency = {key: 0.0 for key in ("Latency", "Attn Latency", "Linear Latency", "Comm Latency")}
    cycles = 0.0
    for line, times in _weighted(df):
        kind, weight = line["Op Type"], line[parts[1]] * times
        total[f"MACs ({flop})"] += line[f"Num ops ({flop})"] * times
        total[f"Total Data ({mem})"] += sum(line[part] for part in parts) * times
        if kind in ("Logit", "Attend"):
            total[f"KV Cache ({mem})"] += weight
        elif kind == "GEMM":
            total[f"Total Weights ({mem})"] += weight
            total[f"Unused Weights ({mem})"] += 0 if line[f"Num ops ({flop})"] else weight
        if not model_characterstics:
            spent = line[f"Latency ({time})"] * times
            cycles += line["Cycles"] * times
            latency["Latency"] += spent
            share = {"Logit": "Attn", "Attend": "Attn", "GEMM": "Linear", "Sync": "Comm"}[kind]
            latency[f"{share} Latency"] += spent
    total[f"On-chip Memory Footprint ({mem})"] = max(sum(line[part] for part in parts) for line in df)
    if not model_characterstics:
        total |= {f"Latency ({time})": latency.pop("Latency"), "Cycles": cycles}
        total |= {f"{name} ({time})": value for name, value in latency.items()}
    return Table([total])


_PER_LAYER = ("Latency", "time (", "Cycles", "cycle", "Num ops", "Input_", "Output", "Total Data")


def simplify_df(df: Table) -> Table:
    """`df` with every repetition multiplied out and no Repeat lines."""
    lines = []
    for line, times in _weighted(df):
        scaled = {k: v * times for k, v in line.items() if any(part in k for part in _PER_LAYER)}
        lines.append(line | scaled)
    return Table(lines)


def get_runtime_breakdown(df: Table, unit: Unit | None = None) -> RuntimeBreakdown:
    key, result = f"Latency ({(unit or Unit()).unit_time})", RuntimeBreakdown()
    for line, times in _weighted(df):
        name = line["Layer Name"]
        blocks = _BLOCKS.get(name) or _BLOCKS[name.split()[0]]  # "Logit Pre" is booked like "Logit"
        for block in blocks:
            setattr(result, block, getattr(result, block) + line[key] * times)
    return result


def get_offload_system(system: System, total_memory_req: float) -> System:
    """`system` with the bandwidth left when what does not fit (MB) comes from host memory at the same time."""
    need, have = total_memory_req / 1024, system.off_chip_mem_size / 1024
    if need <= have:
        return system
    inside = min(need, have) / system.offchip_mem_bw
    return replace(system, offchip_mem_bw=need / max(inside, (need - have) / (system.external_mem_bw or 128)))


def _fit(system: System, needed: float, pipeline_parallel: int, offload: bool) -> tuple[System, bool]:
    """(system, is it offloaded); raises when the memory (MB) is short and offloading was not asked for."""
    if system.off_chip_mem_size * pipeline_parallel >= needed:
        return system, False
    if not offload:
        raise ArgumentValueError(
            f"weights and KV cache must fit: {needed / 1024:.1f} GB needed, "
            f"{system.off_chip_mem_size * pipeline_parallel / 1024:.1f} GB there; pass model_offload=True to go on"
        )
    warnings.warn("weights or KV cache do not fit; the rest is read from host memory", stacklevel=3)
    return get_offload_system(system, needed), True


def _run(
    rows: list, system: System, batch: int, beams: int, pipeline: int, offload: bool, memory: str, merge: bool
):
    shape = get_model_df(
        copy.deepcopy(rows), system, batch_size=batch, intermediate_on_chip=True,
        beam_size=beams, beam_merge=merge, model_characterstics=True,
    )  # fmt: skip
    sizes = get_summary_table(shape, model_characterstics=True)[0]
    system, offloaded = _fit(system, sizes["Total Weights (MB)"] + sizes["KV Cache (MB)"], pipeline, offload)
    df = get_model_df(
        rows,
        system,
        Unit(),
        batch,
        intermediate_on_chip=True,
        beam_size=beams,
        beam_merge=merge,
        memory=memory,
    )
    return df, get_summary_table(df), offloaded


def _output(df: Table, summary: Table, offloaded: bool, throughput: float, memory: str) -> ModdelingOutput:
    return ModdelingOutput(
        Latency=summary[0]["Latency (msec)"],
        Throughput=throughput,
        Runtime_breakdown=get_runtime_breakdown(df),
        is_offload=offloaded,
        model_df=df,
        summary_table=summary,
        mode=config.current_mode(),
        memory=memory,
        num_ops_unit="FLOP, twice the MACs (x C in genz-corrected)",
    )


def _throughput(batch: int, latency_ms: float, pipeline: int) -> float:
    """Requests a second; a pipeline works on several micro batches at a time."""
    if pipeline == 1:
        return 1000 * batch / latency_ms
    micro_batches = batch // max(batch // pipeline, 1)
    return 1000 * batch / ((micro_batches - 1) * latency_ms / pipeline + latency_ms)


def prefill_moddeling(
    model="llama2_7b", batch_size: int = 1, input_tokens: int = 4096, system_name="A100_40GB_GPU",
    system_eff: float = 1, bits: str = "bf16", tensor_parallel: int = 1, pipeline_parallel: int = 1,
    expert_parallel: int = 1, sequence_parallel: int = 1, model_offload: bool = False, mode: str | None = None,
    softmax_constant: float = SOFTMAX_CONSTANT, memory: str = "residency",
) -> ModdelingOutput:  # fmt: skip
    """Latency (ms) and throughput (requests/s) of reading a prompt, as GenZ computes them.

    Args:
        mode: "genz-original" or "genz-corrected"; None: as `set_flash_attention_mode` says.
        softmax_constant: C of the corrected mode. memory: see `get_model_df`.

    Raises:
        ArgumentValueError: unknown model, system, mode or unit, wrong sizes, or it does not fit.
    """
    positive("batch_size", batch_size)
    with config.using_mode(mode, softmax_constant):
        system = get_inference_system(system_name, bits, system_eff)
        rows = layers.create_full_prefill_model(
            model, input_tokens, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
            expert_parallel=expert_parallel, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        batch = batch_size if pipeline_parallel == 1 else max(batch_size // pipeline_parallel, 1)
        df, summary, offloaded = _run(rows, system, batch, 1, pipeline_parallel, model_offload, memory, False)
        throughput = _throughput(batch_size, summary[0]["Latency (msec)"], pipeline_parallel)
        return _output(df, summary, offloaded, throughput, memory)


def decode_moddeling(
    model="llama2_7b", batch_size: int = 1, input_tokens: int = 4096, output_tokens: int = 0, Bb: int = 4,
    system_name="A100_40GB_GPU", system_eff: float = 1, bits: str = "bf16", tensor_parallel: int = 1,
    pipeline_parallel: int = 1, expert_parallel: int = 1, sequence_parallel: int = 1, model_offload: bool = False,
    mode: str | None = None, softmax_constant: float = SOFTMAX_CONSTANT, memory: str = "residency",
) -> ModdelingOutput:  # fmt: skip
    """Latency (ms) of one token and throughput as GenZ computes them; `Bb` is the number of beams (4, as there)."""
    positive("batch_size", batch_size)
    positive("Bb", Bb)
    with config.using_mode(mode, softmax_constant):
        system = get_inference_system(system_name, bits, system_eff)
        rows = layers.create_full_decode_model(
            model, input_tokens, output_tokens, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
            expert_parallel=expert_parallel, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        batch = batch_size if pipeline_parallel == 1 else max(batch_size // pipeline_parallel, 1)
        df, summary, offloaded = _run(
            rows, system, batch * Bb, Bb, pipeline_parallel, model_offload, memory, Bb > 1
        )
        throughput = _throughput(batch_size, summary[0]["Latency (msec)"], pipeline_parallel)
        return _output(df, summary, offloaded, throughput, memory)


def chunked_moddeling(
    model="llama2_7b", prefill_kv_sizes=((1024, 511),), decode_kv_sizes=(1600, 1601, 1602), system_name="A100_40GB_GPU",
    system_eff: float = 1, bits: str = "bf16", tensor_parallel: int = 1, pipeline_parallel: int = 1,
    expert_parallel: int = 1, sequence_parallel: int = 1, model_offload: bool = False, mode: str | None = None,
    softmax_constant: float = SOFTMAX_CONSTANT, memory: str = "residency",
) -> ModdelingOutput:  # fmt: skip
    """Latency (ms) of one chunk and throughput in tokens a second, as GenZ computes them.

    Args:
        prefill_kv_sizes: (tokens already in the cache, tokens in this chunk) of each prompt.
        decode_kv_sizes: keys of each decoding sequence.
    """
    with config.using_mode(mode, softmax_constant):
        system = get_inference_system(system_name, bits, system_eff)
        rows = layers.create_full_chunked_model(
            model, list(prefill_kv_sizes), list(decode_kv_sizes), tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel, expert_parallel=expert_parallel, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        df, summary, offloaded = _run(rows, system, 1, 1, pipeline_parallel, model_offload, memory, False)
        tokens = sum(new for _, new in prefill_kv_sizes) + len(decode_kv_sizes)
        return _output(df, summary, offloaded, 1000 * tokens / summary[0]["Latency (msec)"], memory)
