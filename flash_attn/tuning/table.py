"""Which tile a problem gets: override, else the nearest measured row, else a rule. Never a measurement at run time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from flash_attn.problem import Problem
from flash_attn.tuning.config import FwdConfig, fits, padded, smaller
from flash_attn.tuning.precision import precision
from flash_attn.utils import device as devices
from flash_attn.utils.device import DeviceInfo

_override: FwdConfig | None = None


@contextmanager
def override(config: FwdConfig) -> Iterator[None]:
    """Use `config` for every forward inside the block, whatever the table says."""
    global _override
    before, _override = _override, config
    try:
        yield
    finally:
        _override = before


def forward_config(problem: Problem) -> FwdConfig:
    """The tile sizes of a forward on the current device."""
    if _override is not None:
        return _override
    return _lookup(problem._replace(batch=0, scale=0.0), devices.info(), precision(problem))


def overridden() -> FwdConfig | None:
    return _override


@lru_cache(maxsize=4096)
def _lookup(problem: Problem, device: DeviceInfo | None, products: str) -> FwdConfig:
    if device is None:
        return FwdConfig(16, 16, 4, 1)  # the interpreter
    row = nearest(problem, device)
    config = rule(problem, device, products) if row is None else FwdConfig(**row["config"])
    while not fits(config, problem, device):
        less = smaller(config)
        if less is None:
            break
        config = less
    return config


@cache
def rows() -> tuple[dict[str, Any], ...]:
    """Every measured row of `data/*.json`, one JSON object a line."""
    found = []
    for path in sorted(Path(__file__).parent.joinpath("data").glob("*.json")):
        found += [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return tuple(found)


def describe(problem: Problem) -> dict[str, Any]:
    """The part of a problem that chooses its row."""
    mask = "window" if problem.left is not None else "causal" if problem.right is not None else "full"
    return dict(
        dtype=str(problem.dtype).removeprefix("torch."),
        head_dim=padded(problem.head_dim),
        head_dim_v=padded(problem.head_dim_v),
        mask=mask,
        dropout=problem.dropout_p > 0,
        softcap=problem.softcap > 0,
        max_q=problem.max_q,
        max_k=problem.max_k,
    ) | (dict(products=precision(problem)) if problem.dtype is torch.float32 else {})


def nearest(problem: Problem, device: DeviceInfo, direction: str = "forward") -> dict[str, Any] | None:
    """The row measured on this compute capability that is closest to `problem`: same dims and dtype width."""
    want = describe(problem)
    best, best_distance = None, math.inf
    for row in rows():
        key = row["problem"]
        if row["direction"] != direction or tuple(row["capability"]) != device.capability:
            continue
        if (key["head_dim"], key["head_dim_v"]) != (want["head_dim"], want["head_dim_v"]):
            continue
        if (key["dtype"] == "float32") != (want["dtype"] == "float32"):
            continue
        if key.get("products") != want.get("products"):
            continue
        distance = 10.0 * (key["dropout"] != want["dropout"]) + 5.0 * (key["mask"] != want["mask"])
        distance += 10.0 * (key.get("softcap", False) != want["softcap"])
        for size in ("max_q", "max_k"):
            distance += abs(math.log2(max(key[size], 1)) - math.log2(max(want[size], 1)))
        if distance < best_distance:
            best, best_distance = row, distance
    return best


def rule(problem: Problem, device: DeviceInfo, products: str = "ieee") -> FwdConfig:
    """Tiles for what was never measured; `products` is `precision(problem)`."""
    D = max(padded(problem.head_dim), padded(problem.head_dim_v))
    if problem.dtype.itemsize == 4:
        if D > 128:
            return FwdConfig(16, 16, 4, 1)
        if products == "ieee":  # no matrix unit takes it: the operands of a product live in registers
            return FwdConfig(64, 64, 4 if D <= 64 else 8, 1)
        return FwdConfig(128, 64 if D <= 64 else 32, 8, 2)
    block_m = 128 if problem.max_q > 64 else 64
    if D <= 64:
        return FwdConfig(block_m, 64, 4, 3)
    if D <= 128:
        return FwdConfig(block_m, 64, 8 if block_m == 128 else 4, 3 if device.capability[0] == 9 else 2)
    if D <= 256:
        return FwdConfig(block_m, 64 if device.capability[0] >= 9 else 32, 8 if block_m == 128 else 4, 2)
    return FwdConfig(64, 32, 8, 2)
