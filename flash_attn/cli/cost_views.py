"""How `flash-attn cost` shows its results: rich tables in which the dominating part is seen at once."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from flash_attn.cost import accounting, measured
from flash_attn.cost.counts import count
from flash_attn.cost.hardware import Hardware
from flash_attn.cost.kernels import Estimate
from flash_attn.cost.models import ModelShape
from flash_attn.cost.report import Table, human
from flash_attn.cost.whole import ModelEstimate, largest
from flash_attn.errors import FlashAttnError
from flash_attn.problem import Problem

COLOURS = {
    "matrix": "green", "compute": "green", "softmax": "yellow", "memory": "red", "l2": "magenta",
    "network": "magenta", "overhead": "blue", "imbalance": "cyan", "launch": "white", "combine": "cyan",
    "latency": "cyan", "pipeline": "cyan",
}  # fmt: skip
WIDE = 110  # columns of a terminal that the widest table fits
BAR = 30


def _bar(shares: dict[str, float]) -> str:
    """A line of `BAR` characters, coloured by part, the largest first."""
    text = ""
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        text += f"[{COLOURS.get(name, 'white')}]{'█' * round(share * BAR)}[/]"
    return text


def _shares(parts: dict[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items() if value > 0}


def _top(parts: dict[str, float], number: int = 3) -> str:
    best = sorted(_shares(parts).items(), key=lambda item: -item[1])[:number]
    return ", ".join(f"[{COLOURS.get(n, 'white')}]{n}[/] {share:.0%}" for n, share in best if share >= 0.01)


def _table(title: str, *columns: str) -> RichTable:
    table = RichTable(title=title, title_justify="left")
    for i, name in enumerate(columns):
        left = i == 0 or name in ("", "where the time goes")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def accounts(
    console: Console, problem: Problem, directions: Sequence[str], found: Sequence[accounting.Account]
) -> None:
    p = problem
    mask = (
        "full"
        if p.left is None and p.right is None
        else "causal"
        if p.causal
        else f"window {p.left},{p.right}"
    )
    title = (
        f"B {p.batch}, H {p.heads}/{p.kv_heads}, M {p.max_q}, N {p.max_k}, D {p.head_dim}, {mask}, {p.dtype}"
    )
    wide = console.width >= WIDE
    columns = (
        "pass",
        "Q K^T",
        "P V",
        "softmax",
        "total",
        *(["exps"] if wide else []),
        "flash",
        "standard",
    )
    table = _table(f"{title}; mode {found[0].mode}", *columns)
    for direction, a in zip(directions, found, strict=True):
        work = count(p, direction)
        table.add_row(
            direction, human(a.logit, a.unit), human(a.attend, a.unit), human(a.softmax_flops, "FLOP"),
            human(a.flops, "FLOP"), *([human(work.exps)] if wide else []), human(work.flash_bytes, "B", 1024),
            human(work.standard_bytes, "B", 1024),
        )  # fmt: skip
    console.print(table)
    for direction, a in zip(directions, found, strict=True):
        extra = f"; GenZ reports {human(a.flops_reported, 'FLOP')}" if a.flops_reported != a.flops else ""
        console.print(f"  {direction}: {a.note}{extra}")


def estimates(
    console: Console,
    problem: Problem,
    found: Sequence[Estimate],
    devices: dict[str, Hardware],
    constant: float,
) -> None:
    wide = console.width >= WIDE
    columns = ("device", "kernel", "time", "TFLOP/s", "of peak", "GB/s", "bound")
    table = _table("predicted time", *columns, *(["where the time goes"] if wide else []))
    for e in found:
        peak = devices[e.hardware].matrix_rate(str(problem.dtype).removeprefix("torch."))
        table.add_row(
            e.hardware, f"{e.backend} {e.kind}", human(e.time_s, "s"), f"{e.tflops:.0f}",
            f"{e.tflops * 1e12 / peak:.0%}", f"{e.gbs:.0f}", f"[{COLOURS.get(e.bound, 'white')}]{e.bound}[/]",
            *([f"{_bar(_shares(e.parts))}\n{_top(e.parts)}"] if wide else []),
        )  # fmt: skip
    console.print(table)
    for e in found if not wide else ():
        console.print(f"  {e.hardware} {e.kind}: {_bar(_shares(e.parts))} {_top(e.parts)}")
    for hw in devices.values():
        f = accounting.softmax_factor(problem, hw.matrix_rate("bf16"), hw.exps, constant)
        console.print(
            f"  softmax constant on {hw.name}: {f.asked:g} asked, {f.flops:.3f} by operations, {f.time:.2f} by time if "
            "nothing overlaps"
        )


def model(console: Console, e: ModelEstimate, asked) -> None:
    shape = e.model
    active = f", {human(shape.parameters(True))} active" if shape.experts > 1 else ""
    title = (
        f"{shape.name} ({human(shape.parameters())} parameters{active}), {e.phase}, batch {asked.batch}, "
        f"{asked.seqlen} tokens, {e.devices} x {e.hardware.title}"
    )
    table = _table(title, "part", "time", "share", "", "bound", "FLOP", "bytes")
    for part in sorted(e.parts, key=lambda part: -part.time_s):
        share = part.time_s / e.time_s
        colour = COLOURS.get(part.bound, "white")
        table.add_row(
            part.name, human(part.time_s, "s"), f"{share:.1%}", f"[{colour}]{'█' * round(share * BAR)}[/]",
            f"[{colour}]{part.bound}[/]", human(part.flops), human(part.bytes, "B"),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"  [bold]{human(e.time_s, 's')}[/] a step, {human(e.tokens_per_s)} tokens/s, model FLOPs utilisation "
        f"{e.utilisation:.0%}; bound by [bold]{e.bound}[/]"
    )
    memory = _table("memory of the fullest device", "what", "size", "")
    for name, size in sorted(e.memory.items(), key=lambda item: -item[1]):
        memory.add_row(name, human(size, "B", 1024), "█" * round(BAR * size / e.hardware.memory))
    console.print(memory)
    verdict = "[bold green]fits[/]" if e.fits else "[bold red]does not fit[/]"
    console.print(
        f"  {human(e.memory_bytes, 'B', 1024)} of {human(e.usable_bytes, 'B', 1024)} usable: {verdict}; the largest "
        f"part is {max(e.memory, key=lambda name: e.memory[name])}"
    )
    _limits(console, e, asked)


def _limits(console: Console, e: ModelEstimate, asked) -> None:
    """How far batch and length could grow."""

    def fits(**changes: int) -> bool:
        try:
            return asked.run(e.hardware, **changes).fits
        except FlashAttnError:
            return False

    par = asked.parallel
    unit = max(1, par.sequence * par.context) * 256
    step = max(par.pipeline, par.micro_batches, 1)
    batch = largest(lambda n: fits(batch=n * step), 2**16) * step
    length = largest(lambda n: fits(seqlen=n * unit), 2**24 // unit) * unit
    console.print(f"  largest batch at this length: {batch}; largest length at this batch: about {length}")


def genz(console: Console, name: str, result) -> None:
    console.print(_plain(result.model_df, f"{name}, {result.mode}, flash attention through {result.memory}", (
        "Layer Name", "Op Type", "Bound", "Num ops (MFLOP)", "Total Data (MB)", "Compute time (msec)",
        "Memory time (msec)", "Communication time (msec)", "Latency (msec)",
    )))  # fmt: skip
    console.print(_plain(result.summary_table, "summary", result.summary_table.columns))
    breakdown = {k: v for k, v in result.Runtime_breakdown.to_dict().items() if v}
    console.print("  " + ", ".join(f"{k} {v:.4g} ms" for k, v in breakdown.items()))
    console.print(
        f"  [bold]{result.Latency:.4f} ms[/], {result.Throughput:.4g} requests/s; operations: {result.num_ops_unit}"
    )


def sweep(console: Console, table: Table, name: str) -> None:
    console.print(_plain(table, f"sweep of {name}", table.columns))


def _plain(table: Table, title: str, columns: Iterable[str]) -> RichTable:
    columns = list(columns)
    rich = _table(title, *columns)
    for row in table:
        rich.add_row(*(_cell(name, row.get(name)) for name in columns))
    return rich


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "[green]yes[/]" if value else "[red]no[/]"
    if name.endswith("_s") and isinstance(value, float) and name != "tokens_per_s":
        return human(value, "s")
    if name.endswith("_bytes"):
        return human(value, "B", 1024)
    if name == "flops":
        return human(value)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def validation(console: Console, table: Table) -> None:
    rich = _table("predicted against measured", "call", "measured us", "predicted us", "error", "bound")
    for row in sorted(table, key=lambda row: (row["family"], row["call"])):
        error = row["error"]
        colour = "green" if abs(error) <= 0.1 else "yellow" if abs(error) <= 0.2 else "red"
        cells = (
            f"{row['measured us']:.1f}",
            f"{row['predicted us']:.1f}",
            f"[{colour}]{error:+.1%}[/]",
            row["bound"],
        )
        rich.add_row(row["call"], *cells)
    console.print(rich)
    summary = _table("errors", "rows", "number", "median", "90th percentile", "worst")
    judged = [row for row in table if row.get("role") != "calibrates"]
    groups = {
        name: [row for row in judged if row["family"] == name]
        for name in sorted({r["family"] for r in judged})
    }
    groups["all of these"] = judged
    if len(judged) < len(table):
        groups["drawn at random"] = [row for row in judged if row["role"] == "drawn"]
        groups["those that calibrate"] = [row for row in table if row["role"] == "calibrates"]
    for name, rows in groups.items():
        if rows:
            e = measured.errors(rows)
            summary.add_row(name, str(e.rows), f"{e.median:.1%}", f"{e.p90:.1%}", f"{e.worst:.1%}")
    console.print(summary)


def calibration(console: Console, values: dict[str, Any], hw: Hardware) -> None:
    table = _table(
        f"{values['name']}, {values['processors']} processors", "what", "measured", "taken as data sheet"
    )
    table.add_row(
        f"{values['dtype']} products",
        human(values["matrix_flops"], "FLOP/s"),
        human(hw.matrix_rate(values["dtype"]), "FLOP/s"),
    )
    table.add_row("memory", human(values["bandwidth"], "B/s"), human(hw.bandwidth, "B/s"))
    table.add_row("exp2", human(values["exps"], "/s"), human(hw.exps, "/s"))
    table.add_row("launch", human(values["launch_s"], "s"), human(hw.launch, "s"))
    console.print(table)


def known(console: Console, models: Iterable[ModelShape], devices: Iterable[Hardware]) -> None:
    table = _table(
        "models", "name", "parameters", "layers", "hidden", "heads", "head dim", "KV bytes a token (bf16)"
    )
    for m in models:
        table.add_row(
            m.name.split("/")[-1].lower(), human(m.parameters()), str(m.layers), str(m.hidden),
            f"{m.heads}/{m.kv_heads}", str(m.head_dim), human(m.kv_bytes_per_token(), "B", 1024),
        )  # fmt: skip
    console.print(table)
    table = _table(
        "devices (data sheets)", "name", "device", "bf16", "memory rate", "memory", "processors", "exp2 rate"
    )
    for hw in devices:
        table.add_row(
            hw.name, hw.title, human(hw.matrix_rate("bf16"), "FLOP/s"), human(hw.bandwidth, "B/s"),
            human(hw.memory, "B"), str(hw.processors), human(hw.exps, "/s"),
        )  # fmt: skip
        for field, source in hw.sources.items():
            table.add_row("", f"[dim]{field}: {source}[/]")
    console.print(table)
