"""`flash-attn bench`: ours against the other implementations on this machine; table, JSON, CSV and a plot."""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flash_attn import dispatch, flash_attn_func
from flash_attn.cli import problem_args as args
from flash_attn.cli.plots import line_plot
from flash_attn.utils import host_cost, race
from flash_attn.utils.benchmarks import MB, peak_extra_mb
from flash_attn.utils.peers import CPU_PEERS, FLEX, GPU_PEERS, OURS


def label(row: dict[str, Any]) -> str:
    """What a row's problem has beside its sizes, in a few words."""
    words = ["causal" if row["causal"] else "full"]
    if row["left"] is not None:
        words = [f"window {row['left']},{row['right']}"]
    words += [f"{name} {row[name]:g}" for name in ("softcap", "dropout_p") if row.get(name)]
    if row["Hk"] != row["H"]:
        words.append(f"{row['H']}/{row['Hk']} heads")
    return " ".join([*words, row["dtype"]])


def cells(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, dict]]:
    """Rows by cell (kind, D, what else, batch, keys) and implementation."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cell = (row["kind"], row["D"], label(row), row["B"], row["N"])
        found.setdefault(cell, {})[row["impl"]] = row
    return found


def measured(row: dict[str, Any]) -> str:
    if "time_us" not in row:
        return row.get("note", "-")[:28]
    rate = (
        f" ({row['tflops']:.1f})"
        if "tflops" in row
        else f" ({row['gb_per_s']:.0f} GB/s)"
        if "gb_per_s" in row
        else ""
    )
    return f"{row['time_us']:.{0 if row['time_us'] >= 100 else 1}f}{rate}"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    names = list(dict.fromkeys(row["impl"] for row in rows))
    table = Table(title="microseconds (TFLOP/s); last column: speed of ours over the best other")
    for name in ("", "D", "", "B", "N", *names, "ratio"):
        table.add_column(name, justify="right")
    for cell, found in cells(rows).items():
        others = [r["time_us"] for n, r in found.items() if not n.startswith(OURS.name) and "time_us" in r]
        mine = found.get(OURS.name, {}).get("time_us")
        ratio = f"{min(others) / mine:.2f}" if others and mine else ""
        table.add_row(*map(str, cell), *(measured(found.get(name, {})) for name in names), ratio)
    console.print(table)


def write(rows: list[dict[str, Any]], extra: list[dict[str, Any]], output: Path) -> None:
    """rows.json, rows.csv and speed.png under `output`, and host.json with the rows that are no race."""
    race.save(rows, output / "rows.json")
    (output / "host.json").write_text(json.dumps(extra, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(output / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    def curve(row: dict[str, Any]) -> tuple:
        return row["kind"], row["D"], label(row)

    first = curve(rows[0])
    chosen = [row for row in rows if "tflops" in row and curve(row) == first]
    series = {
        name: (
            [r["M"] for r in chosen if r["impl"] == name],
            [r["tflops"] for r in chosen if r["impl"] == name],
        )
        for name in dict.fromkeys(row["impl"] for row in chosen)
    }
    title = f"{first[0]}, D={first[1]}, {first[2]}"
    line_plot(output / "speed.png", title, "sequence length", "TFLOP/s", series, log=True)


def host_and_memory(device: str, memory: int) -> list[dict[str, Any]]:
    """What a call costs before its backend, and the peak memory of a long one beyond its inputs."""
    found: list[dict[str, Any]] = [
        {"kind": "host", "call": row.name, "time_us": row.median_us}
        for row in host_cost.measure(device, calls=500)
    ]
    if memory:
        q, k, v = (torch.randn(1, memory, 8, 64, device=device, requires_grad=True) for _ in range(3))
        dout = torch.randn_like(q)

        def step() -> None:
            torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)

        call = f"forward and backward, S={memory}, H=8, D=64, fp32, causal"
        score = 8 * memory**2 * 4 / MB
        found.append(
            {
                "kind": "memory",
                "call": call,
                "peak_extra_mb": peak_extra_mb(step, device),
                "score_matrix_mb": score,
            }
        )
    return found


def show_host_and_memory(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="host time to the backend and back; peak memory beyond the inputs")
    table.add_column("call")
    table.add_column("", justify="right")
    for row in rows:
        if row["kind"] == "host":
            table.add_row(row["call"], f"{row['time_us']:.1f} us")
        else:
            note = f"{row['peak_extra_mb']:.0f} MB (one score matrix: {row['score_matrix_mb']:.0f} MB)"
            table.add_row(row["call"], note)
    console.print(table)


def register(app: typer.Typer) -> None:
    @app.command()
    def bench(
        seqlens: Annotated[str, typer.Option(help="sequence lengths")] = "512,2048,8192",
        head_dims: Annotated[str, typer.Option(help="head dimensions")] = "64,128",
        dtypes: Annotated[str, typer.Option(help="default: bf16,fp32 on a CPU, bf16 on a GPU")] = "",
        tokens: Annotated[
            int, typer.Option(help="tokens of a batch; batch = tokens / seqlen; 0: batch 1")
        ] = 0,
        heads: Annotated[int, typer.Option(min=1)] = 8,
        masks: Annotated[str, typer.Option(help="full, causal")] = "full,causal",
        directions: Annotated[str, typer.Option(help="forward, backward")] = "forward,backward",
        window: args.Window = "-1,-1",
        softcap: args.Softcap = 0.0,
        flex: Annotated[
            bool, typer.Option("--flex", help="also FlexAttention (compiles for a while)")
        ] = False,
        memory: Annotated[
            int, typer.Option(min=0, help="also the peak memory of a call of this length, e.g. 16384")
        ] = 0,
        seconds: Annotated[float, typer.Option(min=0.01, help="time spent on each measurement")] = 0.5,
        device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one")] = "",
        output: Annotated[Path, typer.Option(help="folder for the results")] = Path("bench-output"),
    ) -> None:
        """Time ours against the other implementations on this machine."""
        device = args.this_device(device)
        console = Console()
        problems = []
        for dtype in (dtypes or ("bf16,fp32" if device == "cpu" else "bf16")).split(","):
            for head_dim in args.integers("--head-dims", head_dims):
                for mask in masks.split(","):
                    args.choose("--masks", mask, {"full": 0, "causal": 0})
                    problems += [
                        args.describe(
                            batch=max(1, tokens // length),
                            heads=heads,
                            kv_heads=None,
                            seqlen=length,
                            seqlen_k=None,
                            head_dim=head_dim,
                            dtype=dtype,
                            causal=mask == "causal",
                            window=window,
                            softcap=softcap,
                            dropout=0.0,
                            device=device,
                        )  # fmt: skip
                        for length in args.integers("--seqlens", seqlens)
                    ]
        for direction in directions.split(","):
            args.choose("--directions", direction, dict.fromkeys(dispatch.DIRECTIONS))
        peers = CPU_PEERS if device == "cpu" else GPU_PEERS + ((FLEX,) if flex else ())
        chosen = directions.split(",")
        rows = []
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("measuring", total=len(problems) * len(chosen))
            for cell in race.run_grid(problems, chosen, peers, seconds):
                rows += cell
                bar.advance(task)
        show(rows, console)
        extra = host_and_memory(device, memory)
        show_host_and_memory(extra, console)
        write(rows, extra, output)
        console.print(f"written: {output}/rows.json, rows.csv, host.json, speed.png")
