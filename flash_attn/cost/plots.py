"""PNG plots of sweeps and of predicted against measured. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_attn.cost.hardware import Hardware
from flash_attn.cost.report import Table

MARKERS = {"forward": "o", "backward": "s", "decode": "^"}


def _axes(panels: int):
    """A figure without any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _lines(axis, table: Table, x: str, columns: Sequence[str], keys: Sequence[str], unit: str) -> None:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for i, (group, rows) in enumerate(groups.items()):
        for column, style in zip(columns, ("-o", "--x"), strict=False):
            label = " ".join(map(str, group)) + f" {column.rsplit('_', 1)[0]}"
            axis.plot(
                [row[x] for row in rows],
                [row[column] for row in rows],
                style,
                label=label,
                color=f"C{i}",
                ms=4,
            )
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=unit)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def sweep_png(table: Table, name: str, hardware: Sequence[Hardware], path: str | Path) -> None:
    """Time and memory against the swept value, flash against standard, and the roofline."""
    figure, axes = _axes(3)
    keys = ("hardware", "direction")
    _lines(axes[0], table, name, ("flash_s", "standard_s"), keys, "time, s")
    _lines(axes[1], table, name, ("flash_bytes", "standard_bytes"), keys[1:], "memory, bytes")
    _roofline(axes[2], table, hardware)
    for axis, title in zip(axes, ("Time", "Memory", "Roofline (products only)"), strict=True):
        axis.set_title(title)
    figure.savefig(path, dpi=120)


def _roofline(axis, table: Table, hardware: Sequence[Hardware]) -> None:
    xs = [row["flop_per_byte"] for row in table]
    ends = (min(1.0, *xs) / 2, max(1000.0, *xs) * 2)
    for i, hw in enumerate(hardware):
        peak = hw.matrix_rate("bf16")
        corner = peak / hw.bandwidth
        line = [(ends[0], ends[0] * hw.bandwidth), (corner, peak), (max(ends[1], corner), peak)]
        axis.plot(
            [x for x, _ in line], [y / 1e12 for _, y in line], color=f"C{i}", label=f"{hw.name} data sheet"
        )
        for direction, marker in MARKERS.items():
            rows = [r for r in table if r["hardware"] == hw.name and r["direction"] == direction]
            if rows:
                ys = [r["tflops"] for r in rows]
                axis.plot(
                    [r["flop_per_byte"] for r in rows],
                    ys,
                    marker,
                    color=f"C{i}",
                    ms=4,
                    label=f"{hw.name} {direction}",
                )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def model_png(table: Table, name: str, path: str | Path) -> None:
    """Time (all and attention), memory and throughput of a model."""
    figure, axes = _axes(3)
    _lines(axes[0], table, name, ("time_s", "attention_s"), ("hardware",), "time of a step, s")
    _lines(axes[1], table, name, ("memory_bytes",), ("hardware",), "memory of a device, bytes")
    _lines(axes[2], table, name, ("tokens_per_s",), ("hardware",), "tokens a second")
    figure.savefig(path, dpi=120)


def validation_png(table: Table, path: str | Path) -> None:
    """Predicted against measured time, and the errors in order."""
    figure, axes = _axes(2)
    for i, family in enumerate(sorted({row["family"] for row in table})):
        rows = [row for row in table if row["family"] == family]
        marker = MARKERS[family.split("/")[1]]
        axes[0].plot(
            [r["measured us"] for r in rows],
            [r["predicted us"] for r in rows],
            marker,
            color=f"C{i}",
            ms=4,
            label=family,
        )
        axes[1].plot(
            [r["measured us"] for r in rows],
            [100 * r["error"] for r in rows],
            marker,
            color=f"C{i}",
            ms=4,
            label=family,
        )
    ends = [min(row["measured us"] for row in table) / 1.5, max(row["measured us"] for row in table) * 1.5]
    axes[0].plot(ends, ends, "k-", lw=0.8)
    axes[0].fill_between(ends, [e * 0.9 for e in ends], [e * 1.1 for e in ends], alpha=0.15, label="10 %")
    axes[0].set(xscale="log", yscale="log", xlabel="measured, us", ylabel="predicted, us")
    axes[1].axhspan(-10, 10, alpha=0.15)
    axes[1].set(xscale="log", xlabel="measured, us", ylabel="error of the prediction, %")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
