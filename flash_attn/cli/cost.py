"""`flash-attn cost`: operations, bytes, time and memory of a problem or of a whole model, and what dominates."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from flash_attn.cli import cost_views as views
from flash_attn.cli import problem_args as args
from flash_attn.cost import accounting, calibrate, fit, measured, plots, sweep
from flash_attn.cost.genz import inference
from flash_attn.cost.genz.system import SYSTEMS, System
from flash_attn.cost.hardware import HARDWARE, Hardware, get_hardware
from flash_attn.cost.kernels import BACKENDS, estimate
from flash_attn.cost.models import KNOWN, get_model
from flash_attn.cost.report import Table
from flash_attn.cost.whole import PHASES, ModelEstimate, Parallel, estimate_model
from flash_attn.errors import ArgumentValueError, FlashAttnError
from flash_attn.problem import Problem

Size = Annotated[str, typer.Option("--seqlen", "-s", help="tokens a sequence: 4096, 4k, 1M")]
SizeK = Annotated[str, typer.Option("--seqlen-k", help="keys a sequence; default: as many as queries")]
Out = Annotated[Path | None, typer.Option(dir_okay=False, help="also write it to this file")]


def register(app: typer.Typer) -> None:
    @app.command()
    def cost(
        batch: args.Batch = 1,
        heads: args.Heads = 32,
        kv_heads: args.KvHeads = None,
        seqlen: Size = "4k",
        seqlen_k: SizeK = "",
        head_dim: args.HeadDim = 128,
        dtype: args.Dtype = "bf16",
        causal: args.Causal = False,
        window: args.Window = "-1,-1",
        direction: Annotated[str, typer.Option(help="forward, backward or both")] = "both",
        backend: Annotated[str, typer.Option(help=f"{', '.join(BACKENDS)}; default: what would run")] = "",
        hardware: Annotated[str, typer.Option(help=f"{', '.join(HARDWARE)}, or local after --calibrate")] = "h200",
        compare: Annotated[str, typer.Option(help="several devices: a100,h200")] = "",
        mode: Annotated[str, typer.Option(help=f"how to count: {', '.join(accounting.MODES)}")] = "exact",
        softmax_constant: Annotated[float, typer.Option(help="C of genz-corrected")] = accounting.SOFTMAX_CONSTANT,
        model: Annotated[str, typer.Option(help="a known model or a config.json: cost of the whole model")] = "",
        phase: Annotated[str, typer.Option(help=f"of a model: {', '.join(PHASES)}")] = "prefill",
        tensor: Annotated[int, typer.Option(help="tensor parallelism")] = 1,
        pipeline: Annotated[int, typer.Option(help="pipeline parallelism")] = 1,
        sequence: Annotated[int, typer.Option(help="sequence parallelism (Ulysses)")] = 1,
        context: Annotated[int, typer.Option(help="context parallelism (ring)")] = 1,
        micro_batches: Annotated[int, typer.Option(help="of a pipeline; 0: one a stage")] = 0,
        kv_dtype: Annotated[str, typer.Option(help="of the KV cache; default: --dtype")] = "",
        recompute: Annotated[bool, typer.Option("--recompute", help="training: activations twice")] = False,
        sweep_: Annotated[str, typer.Option("--sweep", help="NAME=LOW:HIGH[:POINTS], such as seqlen=1k:1M")] = "",
        png: Out = None,
        csv: Out = None,
        json: Out = None,
        known: Annotated[bool, typer.Option("--list", help="known models and devices, with sources")] = False,
        calibrate_: Annotated[bool, typer.Option("--calibrate", help="measure this machine: --hardware local")] = False,
        device: Annotated[str, typer.Option(help="what --calibrate measures: cuda or cpu")] = "",
        validate: Annotated[bool, typer.Option("--validate", help="predicted against measured")] = False,
        results: Annotated[Path | None, typer.Option(help="folder of measured rows; default: bench/results")] = None,
    ) -> None:  # fmt: skip
        """Operations, bytes, time and memory of attention or of a whole model, and what dominates."""
        if device and not calibrate_:
            raise typer.BadParameter(
                "--device is what --calibrate measures; --hardware names the GPU of an estimate"
            )
        if not model:
            of_models = dict(phase=phase != "prefill", tensor=tensor != 1, pipeline=pipeline != 1, kv_dtype=kv_dtype,
                             sequence=sequence != 1, context=context != 1, micro_batches=micro_batches,
                             recompute=recompute)  # fmt: skip
            given = ["--" + name.replace("_", "-") for name, value in of_models.items() if value]
            if given:
                raise typer.BadParameter(f"{', '.join(given)}: of a whole model, which --model names")
        if results and not validate:
            raise typer.BadParameter("--results is what --validate compares with")
        console = Console()
        files = Files(png, csv, json)
        try:
            files.check()
            if known:
                views.known(console, KNOWN.values(), HARDWARE.values())
            elif calibrate_:
                _calibrate(console, device)
            elif validate:
                _validate(console, results, files)
            else:
                accounting.check_mode(mode)
                devices = [get_hardware(name) for name in (compare or hardware).split(",") if name]
                seq = sweep.number(seqlen, "--seqlen")
                keys = sweep.number(seqlen_k, "--seqlen-k") if seqlen_k else None
                if model:
                    par = Parallel(tensor, pipeline, sequence, context, micro_batches)
                    asked = Asked(
                        model, phase, batch, seq, par, dtype, kv_dtype or None, recompute, backend or None
                    )
                    if mode.startswith("genz"):
                        _genz(console, asked, compare or hardware, mode, softmax_constant, files)
                    elif mode != "exact":
                        raise ArgumentValueError(
                            f"mode must be exact or a genz mode for a model, got {mode!r}"
                        )
                    else:
                        _model(console, asked, devices, sweep_, files)
                else:
                    problem = args.describe(
                        batch=batch, heads=heads, kv_heads=kv_heads, seqlen=seq, seqlen_k=keys, head_dim=head_dim,
                        dtype=dtype, causal=causal, window=window, softcap=0.0, dropout=0.0, device="cuda",
                    )  # fmt: skip
                    _problem(console, problem, devices, _directions(direction, mode), backend or None, mode,
                             softmax_constant, sweep_, files)  # fmt: skip
        except FlashAttnError as error:
            raise args.fail(error) from None


class Files(NamedTuple):
    """Where the rows and the plot go, besides the terminal."""

    png: Path | None
    csv: Path | None
    json: Path | None

    def write(self, console: Console, table: Table, plot: Callable[[Path], None] | None = None) -> None:
        if self.csv:
            table.to_csv(self.csv)
        if self.json:
            table.to_json(self.json)
        if self.png:
            if plot is None:
                raise ArgumentValueError("--png plots a --sweep or --validate, and neither was asked for")
            plot(self.png)
        for path in self:
            if path:
                console.print(f"wrote {path}")

    def check(self) -> None:
        """Before any work: the folders must exist."""
        for path in self:
            if path and not path.parent.is_dir():
                raise ArgumentValueError(f"cannot write {path}: there is no folder {path.parent}")


class Asked(NamedTuple):
    """A model and how to run it."""

    model: str
    phase: str
    batch: int
    seqlen: int
    parallel: Parallel
    dtype: str
    kv_dtype: str | None
    recompute: bool
    backend: str | None

    def run(self, hardware: Hardware, **changes: int) -> ModelEstimate:
        """The estimate, with another batch or seqlen."""
        return estimate_model(hardware=hardware, **(self._asdict() | changes))


def _directions(direction: str, mode: str) -> tuple[str, ...]:
    choices = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
    found = args.choose("--direction", direction, choices)
    # GenZ has no backward; asked for both, its modes give what there is.
    return found[:1] if direction == "both" and mode.startswith("genz") else found


def _problem(
    console: Console, problem: Problem, devices: Sequence[Hardware], directions: Sequence[str], backend: str | None,
    mode: str, constant: float, sweep_: str, files: Files,
) -> None:  # fmt: skip
    if sweep_:
        asked = sweep.parse(sweep_)
        table = sweep.problem_rows(problem, asked, devices, directions, backend, mode)
        views.sweep(console, table, asked.name)
        files.write(console, table, lambda path: plots.sweep_png(table, asked.name, devices, path))
        return
    accounts = [accounting.account(problem, mode, d, constant) for d in directions]
    views.accounts(console, problem, directions, accounts)
    estimates = [estimate(problem, d, hw, backend) for hw in devices for d in directions]
    views.estimates(console, problem, estimates, {hw.name: hw for hw in devices}, constant)
    rows = [
        {"direction": d, **a._asdict()}
        | {"hardware": e.hardware, "time_s": e.time_s, "bound": e.bound, **e.parts}
        for e in estimates
        for d, a in zip(directions, accounts, strict=True)
        if (e.kind == "backward") == (d == "backward")
    ]
    files.write(console, Table(rows))


def _model(console: Console, asked: Asked, devices: Sequence[Hardware], sweep_: str, files: Files) -> None:
    if sweep_:
        what = sweep.parse(sweep_, ("seqlen", "batch"))
        table = sweep.model_rows(
            what.name, what.values, lambda v: [asked.run(hw, **{what.name: v}) for hw in devices]
        )
        views.sweep(console, table, what.name)
        files.write(console, table, lambda path: plots.model_png(table, what.name, path))
        return
    rows = []
    for hw in devices:
        result = asked.run(hw)
        views.model(console, result, asked)
        rows += [{"hardware": hw.name, **part._asdict()} for part in result.parts]
    files.write(console, Table(rows))


def _genz(console: Console, asked: Asked, names: str, mode: str, constant: float, files: Files) -> None:
    if asked.phase == "train":
        raise ArgumentValueError(f"mode {mode} knows no training, got phase 'train'")
    par = asked.parallel
    if par.context > 1:
        raise ArgumentValueError(f"mode {mode} knows no context parallelism, got {par.context}")
    lines: list[dict] = []
    for name in names.split(","):
        common: dict[str, Any] = dict(
            model=get_model(asked.model), batch_size=asked.batch, input_tokens=asked.seqlen, system_name=_system(name),
            tensor_parallel=par.tensor, pipeline_parallel=par.pipeline, sequence_parallel=par.sequence, mode=mode,
            softmax_constant=constant,
        )  # fmt: skip
        if asked.phase == "prefill":
            result = inference.prefill_moddeling(**common)
        else:
            result = inference.decode_moddeling(**common, Bb=1)
        views.genz(console, name, result)
        lines += [{"hardware": name, "mode": mode, **line} for line in result.model_df]
    files.write(console, Table(lines))


def _system(name: str) -> "str | System":
    """GenZ's own system of that name, else one made of our data sheet (GenZ's gigabytes are binary)."""
    if name in SYSTEMS:
        return name
    hw = get_hardware(name)
    return System(
        flops=hw.matrix_rate("bf16") / 1e12, offchip_mem_bw=hw.bandwidth / 2**30, off_chip_mem_size=hw.memory / 2**20,
        frequency=hw.clock / 1e6, interchip_link_bw=hw.link / 2**30, interchip_link_latency=hw.link_latency * 1e6,
    )  # fmt: skip


def _calibrate(console: Console, device: str) -> None:
    values = calibrate.measure(device or args.default_device())
    path = calibrate.save(values)
    views.calibration(console, values, calibrate.load(path))
    console.print(f"stored in {path}; use it with --hardware local")


def _validate(console: Console, folder: Path | None, files: Files) -> None:
    rows = measured.load(measured.result_files(folder))
    if not rows:
        raise ArgumentValueError("the stored results hold no rows of our kernels")
    table = measured.compare(rows)
    if folder is None:  # the constants are fitted to these
        for line, role in zip(table, fit.roles(rows), strict=True):
            line["role"] = role
    views.validation(console, table)
    files.write(console, table, lambda path: plots.validation_png(table, path))
