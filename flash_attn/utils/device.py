"""What the machine has: capability, multiprocessors, shared memory. Cached; `assume` overrides it for planning."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class DeviceInfo(NamedTuple):
    name: str
    capability: tuple[int, int]  # CUDA compute capability; (0, 0) where there is none
    multiprocessors: int
    shared_memory: int  # bytes one program may use
    hip: bool = False


# Enough of each architecture to plan for it on a machine without it.
KNOWN = {
    "a100": DeviceInfo("NVIDIA A100", (8, 0), 108, 163 * 1024),
    "rtx4090": DeviceInfo("NVIDIA RTX 4090", (8, 9), 128, 99 * 1024),
    "h100": DeviceInfo("NVIDIA H100", (9, 0), 132, 227 * 1024),
    "h200": DeviceInfo("NVIDIA H200", (9, 0), 132, 227 * 1024),
    "b200": DeviceInfo("NVIDIA B200", (10, 0), 148, 227 * 1024),
}

_assumed: DeviceInfo | None = None


def info(index: int | None = None) -> DeviceInfo | None:
    """The GPU at `index` (default: the current one), or None when there is none."""
    if _assumed is not None:
        return _assumed
    if not torch.cuda.is_available():
        return None
    return _read(torch.cuda.current_device() if index is None else index)


@cache
def _read(index: int) -> DeviceInfo:
    p = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    shared = getattr(p, "shared_memory_per_block_optin", 64 * 1024 if hip else 48 * 1024)
    return DeviceInfo(p.name, (p.major, p.minor), p.multi_processor_count, shared, hip)


def assumed() -> DeviceInfo | None:
    """What `assume` put in place of the GPU, if anything."""
    return _assumed


@contextmanager
def assume(device: DeviceInfo) -> Iterator[None]:
    """Plan as if `device` were here: for `explain`, compile-only tests and the cost model."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
