"""Offline search for tile sizes: measures candidates on the GPU at hand and makes rows for `data/*.json`.

Never runs on the path of a call. `flash-attn tune` is its command line.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flash_attn.cost.counts import count
from flash_attn.errors import UnsupportedError
from flash_attn.problem import Problem
from flash_attn.tuning import backward, table
from flash_attn.tuning.config import BwdConfig, FwdConfig, fits
from flash_attn.utils import device as devices

DIRECTIONS = ("forward", "dkdv", "dq")


def candidates(problem: Problem, direction: str = "forward") -> list[FwdConfig] | list[BwdConfig]:
    """Every tile worth a measurement on the current GPU."""
    found = devices.info()
    if direction != "forward":
        tiles = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        return [BwdConfig(*tile) for tile in tiles if _is_balanced(*tile[:3])]
    tiles = product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    configs = [FwdConfig(*tile) for tile in tiles if _is_balanced(*tile[:3])]
    return [c for c in configs if found is None or fits(c, problem, found)]


def _is_balanced(block_m: int, block_n: int, num_warps: int) -> bool:
    """A warp gets 8 to 32 rows of 64: fewer leave it idle, more do not fit its registers."""
    return 512 <= block_m * block_n // num_warps <= 4096


def measure(problem: Problem, config: FwdConfig | BwdConfig, direction: str = "forward") -> float:
    """Median seconds of the forward, or of the whole backward, with `config` for its kernel."""
    import triton

    from flash_attn.backends import triton as backend
    from flash_attn.utils.example import operands

    ops = operands(problem)
    call: Callable[[], Any]
    context: AbstractContextManager[None]
    if direction == "forward":
        assert isinstance(config, FwdConfig)
        context = table.override(config)

        def call() -> Any:
            return backend.forward(problem, ops)
    else:
        assert isinstance(config, BwdConfig)
        dkdv, dq = backward.backward_config(problem)
        context = backward.override(config, dq) if direction == "dkdv" else backward.override(dkdv, config)
        out, lse = backend.forward(problem, ops)
        dout = torch.randn_like(out)

        def call() -> Any:
            return backend.backward(problem, ops, out, lse, dout)

    with context:
        return 1e-3 * triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median")


def search(
    problem: Problem,
    direction: str = "forward",
    configs: Iterable[FwdConfig | BwdConfig] | None = None,
    timer: Callable[[Problem, FwdConfig | BwdConfig, str], float] = measure,
) -> dict[str, Any]:
    """The row of the fastest config; one that does not fit the device is passed over.

    Raises:
        UnsupportedError: no candidate runs.
    """
    best, best_s, reasons = None, float("inf"), []
    for config in candidates(problem, direction) if configs is None else configs:
        try:
            seconds = timer(problem, config, direction)
        except UnsupportedError as error:
            reasons.append(f"{config}: {error}")
            continue
        if seconds < best_s:
            best, best_s = config, seconds
    if best is None:
        raise UnsupportedError(f"no candidate runs {problem}: {'; '.join(reasons)}")
    return row(problem, direction, best, best_s)


def row(problem: Problem, direction: str, config: FwdConfig | BwdConfig, seconds: float) -> dict[str, Any]:
    """A line of the table, with where and when it was measured."""
    import triton

    found = devices.info()
    flop = count(problem, "forward" if direction == "forward" else "backward").matmul_flops
    name, capability = (found.name, found.capability) if found else ("none", (0, 0))
    return dict(
        direction=direction, gpu=name, capability=list(capability),
        problem=table.describe(problem), config=config._asdict(), tflops=round(flop / seconds / 1e12, 1),
        torch=torch.__version__, triton=triton.__version__, date=datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip


def write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Add rows to a table file, one JSON object a line, in place of those for the same device and problem."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    merged = {_identity(r): r for r in (*known, *rows)}
    path.write_text("".join(json.dumps(r) + "\n" for _, r in sorted(merged.items())))


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row["gpu"], row["direction"], row["problem"]], sort_keys=True)
