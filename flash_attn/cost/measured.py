"""Measured rows (the schema of `bench/results/README.md`) and how well the kernel model predicts them."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_attn.cost import kernels
from flash_attn.cost.counts import count
from flash_attn.cost.report import Table
from flash_attn.cost.tiles import Tile, Tiles
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

REQUIRED = ("kind", "backend", "B", "H", "Hk", "M", "N", "D", "dtype", "time_us", "gpu")
OURS = ("hopper", "triton")
CALLS = ("eager call",)  # kinds that hold the host's time too


class Row(NamedTuple):
    """One measurement."""

    problem: Problem
    kind: str
    backend: str
    lens_q: tuple[int, ...] | None
    lens_k: tuple[int, ...] | None
    time_s: float
    hardware: str
    source: str  # file name
    tiles: Tiles | None  # the kernel had; None: those of today's tuning table
    held_out: bool = False  # measured to judge the model: never calibrates it
    date: str = ""

    @property
    def direction(self) -> str:
        return "backward" if self.kind == "backward" else "forward"

    @property
    def family(self) -> str:
        """The constants that predict this row. One split kernel decodes on every GPU."""
        return "triton/decode" if self.kind == "decode" else f"{self.backend}/{self.kind}"

    @property
    def label(self) -> str:
        """The description, without anything measured: orders rows the same way wherever they come from."""
        p = self.problem
        mask = "full" if p.left is None and p.right is None else f"{p.left},{p.right}"
        ragged = self.lens_k or self.lens_q
        lens = "" if ragged is None else f" varlen {sum(ragged)}"
        dims = f"D{p.head_dim:03}" + (f"/{p.head_dim_v}" if p.head_dim_v != p.head_dim else "")
        sizes = f"B{p.batch} H{p.heads}/{p.kv_heads} M{p.max_q:06} N{p.max_k:06}"
        return f"{self.kind} {self.backend} {dims} {mask} {sizes} {str(p.dtype)[6:]}{lens} page{p.page_size}"

    @property
    def tflops(self) -> float:
        return count(self.problem, self.direction, self.lens_q, self.lens_k).matmul_flops / self.time_s / 1e12

    def predict(self, c: kernels.AnyConstants | None = None) -> kernels.Estimate:
        backend = "triton" if self.kind == "decode" else self.backend
        return kernels.estimate(
            self.problem,
            self.direction,
            self.hardware,
            backend,
            self.lens_q,
            self.lens_k,
            self.tiles,
            c,
            self.kind,
        )


def row_of(fields: dict[str, Any], source: str) -> Row:
    """A Row from a JSON object.

    Raises:
        ArgumentValueError: fields are missing or name something unknown.
    """
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise ArgumentValueError(f"{source}: a row lacks {', '.join(missing)}: {fields}")
    if fields["kind"] not in kernels.KINDS:
        raise ArgumentValueError(
            f"{source}: kind must be one of {', '.join(kernels.KINDS)}, got {fields['kind']!r}"
        )
    dtype = getattr(torch, str(fields["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentValueError(
            f"{source}: dtype must be the name of a torch dtype, got {fields['dtype']!r}"
        )
    lens_q, lens_k = (None if fields.get(k) is None else tuple(fields[k]) for k in ("lens_q", "lens_k"))
    right = 0 if fields.get("causal") and fields.get("right") is None else fields.get("right")
    problem = Problem(
        fields["B"], fields["H"], fields["Hk"], fields["M"], fields["N"], fields["D"], fields.get("Dv") or fields["D"],
        dtype, "cuda", left=fields.get("left"), right=right, varlen_q=lens_q is not None and fields["kind"] != "decode",
        varlen_k=lens_k is not None and fields["kind"] != "decode",
        seqused_k=lens_k is not None and fields["kind"] == "decode", page_size=fields.get("page_size") or 0,
        num_splits=fields.get("num_splits") or 0, deterministic=bool(fields.get("deterministic")),
    )  # fmt: skip
    hardware = next(
        (name for name in kernels_hardware() if name in fields["gpu"].lower().replace(" ", "")), None
    )
    if hardware is None:
        raise ArgumentValueError(
            f"{source}: gpu must name one of {', '.join(kernels_hardware())}, got {fields['gpu']!r}"
        )
    time_s = fields["time_us"] * 1e-6
    tiles = fields.get("tiles") and Tiles(*(Tile(*tile) for tile in fields["tiles"]))
    held_out = bool(fields.get("held_out"))
    return Row(
        problem, fields["kind"], fields["backend"], lens_q, lens_k, time_s, hardware, source, tiles, held_out,
        str(fields.get("date", "")),
    )  # fmt: skip


def kernels_hardware() -> list[str]:
    from flash_attn.cost.hardware import HARDWARE

    return [name for name in HARDWARE if name != "epyc9654"]


def result_files(folder: Path | None = None) -> list[Path]:
    """The stored results of this checkout.

    Raises:
        ArgumentValueError: there are none: an installed package brings no measurements.
    """
    folder = folder or Path(__file__).parents[2] / "bench" / "results"
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ArgumentValueError(
            f"no measured results in {folder}: run from a checkout or pass --results FOLDER"
        )
    return files


def load(paths: Sequence[Path], backends: Sequence[str] = OURS) -> list[Row]:
    """The rows of `paths` that `backends` made. Files that hold something else than rows are passed over.

    Of a call that was measured several times only the latest date counts: the kernels were changed in between. Ordered
    sums of dQ (Hopper, deterministic) are passed over: the model does not know what waiting for each other costs. Times
    of whole calls are passed over too: they are the host's.
    """
    rows: dict[tuple, Row] = {}
    for path in paths:
        content = json.loads(path.read_text())
        meta, found = (
            ({}, content) if isinstance(content, list) else (content.get("meta"), content.get("rows"))
        )
        if not isinstance(found, list) or not isinstance(meta, dict):
            continue
        for fields in found:
            ours = isinstance(fields, dict) and "time_us" in fields and fields.get("backend") in backends
            if ours and fields.get("kind") not in CALLS:
                row = row_of(meta | fields, path.name)
                if row.problem.deterministic and row.family == "hopper/backward":
                    continue
                call = row.label, row.lens_q, row.lens_k, row.hardware, row.held_out
                if call not in rows or rows[call].date <= row.date:
                    rows[call] = row
    return list(rows.values())


def compare(rows: Sequence[Row]) -> Table:
    """Predicted against measured."""
    lines = []
    for row in rows:
        e = row.predict()
        lines.append(
            {
                "call": row.label,
                "measured us": row.time_s * 1e6,
                "predicted us": e.time_s * 1e6,
                "error": e.time_s / row.time_s - 1,
                "TFLOP/s": row.tflops,
                "bound": e.bound,
                "family": row.family,
                "source": row.source,
            }
        )
    return Table(lines)


class Errors(NamedTuple):
    rows: int
    median: float
    p90: float
    worst: float


def errors(table: Sequence[dict[str, Any]]) -> Errors:
    """Of |predicted / measured - 1|."""
    values = sorted(abs(line["error"]) for line in table)
    if not values:
        raise ArgumentValueError("no rows to compare")
    return Errors(
        len(values),
        statistics.median(values),
        values[min(len(values) - 1, int(0.9 * len(values)))],
        values[-1],
    )
