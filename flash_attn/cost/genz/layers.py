"""Rows of GenZ's models: attention as it counts it and as seed 000 corrects it, feed-forward, embeddings, stages.

A row is [name, *five sizes, residency or collective, op_type]; the batch is inserted when a table is made.
"""

from math import ceil
from typing import NamedTuple

from flash_attn.cost.counts import positive
from flash_attn.cost.genz import flash_attention_config as config
from flash_attn.cost.genz.operators import CollectiveType, OpType, ResidencyInfo
from flash_attn.cost.models import ModelShape, get_model
from flash_attn.errors import ArgumentValueError

Row = list
OFF, A_ON, C_ON, AC_ON = (
    ResidencyInfo.All_offchip, ResidencyInfo.A_onchip, ResidencyInfo.C_onchip, ResidencyInfo.AC_onchip
)  # fmt: skip


class ParallelismConfig(NamedTuple):
    """Degrees of parallelism; each chip is modelled alone."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: int = 1

    @property
    def head_groups(self) -> int:
        """GenZ spreads attention heads over tensor and expert parallelism together."""
        return self.tensor_parallel * self.expert_parallel


def get_configs(name: "str | ModelShape") -> ModelShape:
    return get_model(name)


def _attention(
    model: ModelShape, par: ParallelismConfig, tokens: int, products: list[Row], residency: ResidencyInfo
) -> list[Row]:
    """QKV projection, the attention products, output projection and what is exchanged."""
    heads, kv_heads = _heads(model, par)
    width = (heads + 2 * kv_heads) * model.head_dim
    rows = [["QKV", width, tokens, model.hidden, 1, 1, residency, OpType.GEMM], *products]
    rows += [["Out Proj", model.hidden, tokens, heads * model.head_dim, 1, 1, residency, OpType.GEMM]]
    return rows + _reduce("MHA AR", tokens, model.hidden, par.head_groups)


def _heads(model: ModelShape, par: ParallelismConfig) -> tuple[int, int]:
    return ceil(model.heads / par.head_groups), ceil(model.kv_heads / par.head_groups)


def _pair(
    suffix: str, sizes: tuple, residency: tuple, kinds: tuple = (OpType.Logit, OpType.Attend)
) -> list[Row]:
    names = (f"Logit {suffix}".strip(), f"Attend {suffix}".strip())
    return [[n, *sizes, r, k] for n, r, k in zip(names, residency, kinds, strict=True)]


def _reduce(name: str, tokens: int, width: int, nodes: int) -> list[Row]:
    return [[name, tokens, width, 1, 1, nodes, CollectiveType.AllReduce, OpType.Sync]] if nodes > 1 else []


def _prefill(model: ModelShape, par: ParallelismConfig, length: int, keys: int) -> list[Row]:
    heads, kv_heads = _heads(model, par)
    products = _pair("", (heads, length, keys, model.head_dim, kv_heads), (C_ON, A_ON))
    return _attention(model, par, length // par.sequence_parallel, products, OFF)


def _decode(model: ModelShape, par: ParallelismConfig, keys: int, generated: int) -> list[Row]:
    heads, kv_heads = _heads(model, par)
    shared = (OpType.Logit_BM_PREFILL, OpType.Attend_BM_PREFILL)
    prefix = _pair("Pre", (heads, 1, keys, model.head_dim, kv_heads), (AC_ON, AC_ON), shared)
    suffix = _pair("Suf", (heads, 1, generated, model.head_dim, kv_heads), (AC_ON, AC_ON))
    products = [prefix[0], suffix[0], prefix[1], suffix[1]]
    return _attention(model, par, 1, products, AC_ON)


def _chunked(
    model: ModelShape, par: ParallelismConfig, chunk_size: int, prefills: list, decodes: list
) -> list[Row]:
    heads, kv_heads = _heads(model, par)
    products: list[Row] = []
    for past, new in prefills:
        products += _pair("Pre", (heads, new, past + new, model.head_dim, kv_heads), (C_ON, A_ON))
    for past in decodes:
        products += _pair("Dec", (heads, 1, past, model.head_dim, kv_heads), (AC_ON, AC_ON))
    return _attention(model, par, chunk_size, products, AC_ON)


def mha_flash_attention_prefill(model_config, parallelism_config, input_sequence_length: int) -> list[Row]:
    """GenZ's original: a chip sees keys // sequence_parallel."""
    keys = input_sequence_length // parallelism_config.sequence_parallel
    return _prefill(model_config, parallelism_config, input_sequence_length, keys)


def mha_flash_attention_corrected_prefill(
    model_config, parallelism_config, input_sequence_length: int
) -> list[Row]:
    """Seed 000's: every chip sees all keys, whatever the sequence parallelism."""
    return _prefill(model_config, parallelism_config, input_sequence_length, input_sequence_length)


def mha_flash_attention_decode(
    model_config, parallelism_config, input_sequence_length: int, output_gen_tokens: int
) -> list[Row]:
    """GenZ's original: one query against the prompt (Pre) and what was generated since (Suf)."""
    keys = input_sequence_length // parallelism_config.sequence_parallel
    return _decode(model_config, parallelism_config, keys, output_gen_tokens)


def mha_flash_attention_corrected_decode(
    model_config, parallelism_config, input_sequence_length: int, output_gen_tokens: int
) -> list[Row]:
    """Seed 000's: all keys of the prompt; the generated tokens stay as they were."""
    return _decode(model_config, parallelism_config, input_sequence_length, output_gen_tokens)


def mha_flash_attention_chunked(
    model_config, parallelism_config, chunk_size: int, prefill_kv_sizes: list, decode_kv_sizes: list
) -> list[Row]:
    """A chunk of prompts, (tokens done, tokens now) each, batched with decodes (keys each)."""
    return _chunked(model_config, parallelism_config, chunk_size, prefill_kv_sizes, decode_kv_sizes)


def mha_flash_attention_corrected_chunked(
    model_config, parallelism_config, chunk_size: int, prefill_kv_sizes: list, decode_kv_sizes: list
) -> list[Row]:
    """Seed 000's: the same rows, since the original already counts the full length; only C differs."""
    return _chunked(model_config, parallelism_config, chunk_size, prefill_kv_sizes, decode_kv_sizes)


def _dense_ffn(model: ModelShape, par: ParallelismConfig, tokens: int, residency: ResidencyInfo) -> list[Row]:
    width = ceil(model.intermediate / par.tensor_parallel)
    rows = [["up+gate", width * model.up_projections, tokens, model.hidden, 1, 1, residency, OpType.GEMM]]
    return rows + [["down", model.hidden, tokens, width, 1, 1, residency, OpType.GEMM]]


def _expert_ffn(model: ModelShape, par: ParallelismConfig, tokens: int, decode: bool) -> list[Row]:
    """Gate, dispatch, experts, collect. Decode touches ceil(top_k / ep) experts a chip and only stores the rest."""
    tp, ep, experts = par.tensor_parallel, par.expert_parallel, model.experts
    width, routed = ceil(model.intermediate / tp), tokens * model.top_k
    rows = [["Gate", experts, tokens, model.hidden // tp, 1, 1, OFF, OpType.GEMM]]
    rows += _reduce("Gate AR", tokens, model.hidden if decode else experts, tp)
    exchange = [tokens, model.top_k * model.hidden, 1, 1, ep, CollectiveType.All2All, OpType.Sync]
    rows += [["Dispatch A2A", *exchange]] if ep > 1 else []
    if decode:
        used = ceil(model.top_k / ep)
        parts = [(used, 1, AC_ON), (ceil(experts / ep) - used, 0, OFF)]
    else:
        parts = [(experts // ep, routed // experts, OFF)]
    for count, tokens_each, residency in parts:
        up = [count * width * model.up_projections, tokens_each, model.hidden, 1, 1, residency, OpType.GEMM]
        rows += [
            ["up+gate", *up],
            ["down", model.hidden, tokens_each, count * width, 1, 1, residency, OpType.GEMM],
        ]
    return rows + ([["Collect A2A", *exchange]] if ep > 1 else [])


def ffn(model: ModelShape, par: ParallelismConfig, tokens: int, decode: bool) -> list[Row]:
    """Feed-forward rows of one layer for `tokens` tokens on this chip."""
    if model.experts > 1:
        if model.experts % par.expert_parallel:
            raise ArgumentValueError(
                f"expert_parallel must divide experts, got {par.expert_parallel} and {model.experts}"
            )
        rows = _expert_ffn(model, par, tokens, decode)
    else:
        if par.expert_parallel != 1:
            raise ArgumentValueError(
                f"expert_parallel must be 1 for a dense model, got {par.expert_parallel}"
            )
        rows = _dense_ffn(model, par, tokens, AC_ON if decode else OFF)
    return rows + _reduce("FFN AR", tokens, model.hidden, par.tensor_parallel)


def _embedding(model: ModelShape, par: ParallelismConfig, tokens: int) -> list[Row]:
    """GenZ counts the lookup as a product with the whole vocabulary."""
    groups = par.head_groups
    row = ["embeddings", model.hidden, tokens, model.vocab // groups, 1, 1, OFF, OpType.GEMM]
    return [row, *_reduce("Emb_AR", tokens, model.hidden, groups)]


def _classifier(model: ModelShape, par: ParallelismConfig, tokens: int) -> list[Row]:
    groups = par.head_groups
    rows = [["classifier", model.vocab // groups, tokens, model.hidden, 1, 1, OFF, OpType.GEMM]]
    gather = ["classifier_AG", tokens, model.vocab, 1, 1, groups, CollectiveType.AllGather, OpType.Sync]
    return rows + ([gather] if groups > 1 else [])


def _stages(model: ModelShape, par: ParallelismConfig, layer: list[Row], tokens: int) -> list[Row]:
    """All layers, with a message after every pipeline stage but the last."""

    def repeated(rows: list[Row], times: int) -> list[Row]:
        start = ["Repeat", times, 1, 1, 1, 1, 1, OpType.REPEAT]
        return [start, *rows, ["End Repeat", times, 1, 1, 1, 1, 1, OpType.ENDREPEAT]]

    stages = par.pipeline_parallel
    if stages == 1:
        return repeated(layer, model.layers)
    each = ceil(model.layers / stages)
    last = model.layers - each * (stages - 1)
    if last < 1:
        raise ArgumentValueError(
            f"pipeline_parallel must leave every stage a layer, got {stages} for {model.layers}"
        )
    message = ["Message Pass", tokens, model.hidden, 1, 1, 1, CollectiveType.MessagePass, OpType.Sync]
    return repeated([*repeated(layer, each), message], stages - 1) + repeated(layer, last)


def _parallel(degrees: dict[str, int]) -> ParallelismConfig:
    unknown = set(degrees) - set(ParallelismConfig._fields)
    if unknown:
        raise ArgumentValueError(
            f"parallelism must be one of {', '.join(ParallelismConfig._fields)}, got {', '.join(sorted(unknown))}"
        )
    return ParallelismConfig(**{name: positive(name, value) for name, value in degrees.items()})


def create_full_prefill_model(
    name: "str | ModelShape", input_sequence_length: int = 1024, **parallelism: int
) -> list[Row]:
    """Rows of a whole model that reads a prompt, with the attention of the current mode.

    GenZ writes them to a file and returns its name; here they are the result.
    """
    model, par = get_model(name), _parallel(parallelism)
    positive("input_sequence_length", input_sequence_length)
    tokens = max(1, input_sequence_length // par.sequence_parallel)
    prefill, _ = config.get_flash_attention_implementation()
    layer = prefill(model, par, input_sequence_length) + ffn(model, par, tokens, decode=False)
    return (
        _embedding(model, par, tokens) + _stages(model, par, layer, tokens) + _classifier(model, par, tokens)
    )


def create_full_decode_model(
    name: "str | ModelShape",
    input_sequence_length: int = 1024,
    output_gen_tokens: int = 0,
    **parallelism: int,
) -> list[Row]:
    """Rows of a whole model that makes one token after a prompt and `output_gen_tokens` generated ones."""
    model, par = get_model(name), _parallel(parallelism)
    positive("input_sequence_length", input_sequence_length)
    if output_gen_tokens < 0:
        raise ArgumentValueError(f"output_gen_tokens must not be negative, got {output_gen_tokens}")
    _, decode = config.get_flash_attention_implementation()
    layer = decode(model, par, input_sequence_length, output_gen_tokens) + ffn(model, par, 1, decode=True)
    return _stages(model, par, layer, 1) + _classifier(model, par, 1)


def create_full_chunked_model(
    name: "str | ModelShape", prefill_kv_sizes: list, decode_kv_sizes: list, **parallelism: int
) -> list[Row]:
    """Rows of a whole model that processes one chunk; sizes as in `mha_flash_attention_chunked`."""
    model, par = get_model(name), _parallel(parallelism)
    new = sum(size for _, size in prefill_kv_sizes)
    chunk = new + len(decode_kv_sizes)
    positive("the number of tokens in the chunk", chunk)
    chunked = mha_flash_attention_corrected_chunked if config.is_corrected() else mha_flash_attention_chunked
    layer = chunked(model, par, chunk, prefill_kv_sizes, decode_kv_sizes)
    layer = layer + ffn(model, par, chunk // par.sequence_parallel, decode=False)
    rows = _embedding(model, par, new // par.sequence_parallel) if new else []
    tokens = chunk // par.sequence_parallel
    return rows + _stages(model, par, layer, tokens) + _classifier(model, par, tokens)
