"""Tile sizes of the two backward kernels: override, else the nearest measured row, else a rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from flash_attn.problem import Problem
from flash_attn.tuning.config import BwdConfig
from flash_attn.tuning.precision import precision
from flash_attn.tuning.table import nearest
from flash_attn.utils import device as devices
from flash_attn.utils.device import DeviceInfo

_override: tuple[BwdConfig, BwdConfig] | None = None


@contextmanager
def override(dkdv: BwdConfig, dq: BwdConfig) -> Iterator[None]:
    """Use these tiles for every backward inside the block, whatever the table says."""
    global _override
    before, _override = _override, (dkdv, dq)
    try:
        yield
    finally:
        _override = before


def overridden() -> tuple[BwdConfig, BwdConfig] | None:
    return _override


def backward_config(problem: Problem) -> tuple[BwdConfig, BwdConfig]:
    """(tile of attn_bwd_dkdv, tile of attn_bwd_dq) on the current device."""
    if _override is not None:
        return _override
    return _lookup(problem._replace(batch=0, scale=0.0), devices.info(), precision(problem))


def cut(dim: int, direction: str = "dkdv") -> tuple[int, int]:
    """Two power-of-two tiles that cover a head dimension: (first, second or 0).

    From 129 on there are two, so that 192 is 128 + 64 and 256 has half as many row addresses to keep in registers.
    The second has at least 64 columns, the least that Hopper's matrix units take as rows of a product. "dq" has half
    the accumulators: 256 is one tile there, whose products wait for each other half as often.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    if whole < 256:
        return whole, 0
    first = whole // 2
    second = max(64, 1 << (dim - first - 1).bit_length())
    if direction == "dq" and whole == 256 == first + second:
        return whole, 0
    return first, second


def shared_memory(config: BwdConfig, problem: Problem, direction: str) -> int:
    """Bytes of shared memory: K and V (dkdv) or Q and dO (dq) of the program, and `num_stages` of the other two."""
    dims = sum(cut(problem.head_dim) + cut(problem.head_dim_v))
    own, streamed = config.block_n, config.block_m
    if direction == "dq":
        own, streamed = streamed, own
    scratch = 0
    if config.rows_first:  # P or dS, both without a pipeline
        scratch = config.block_m * config.block_n * (2 if config.num_stages == 1 else 1)
    return problem.dtype.itemsize * (dims * (own + config.num_stages * streamed) + scratch) + 1024


def smaller(config: BwdConfig) -> BwdConfig | None:
    """The next smaller tile to try, or None: fewer stages first, they cost least."""
    if config.num_stages > 1:
        return config._replace(num_stages=config.num_stages - 1)
    half = max(config.block_m, config.block_n) // 2
    if half < 16:
        return None
    return config._replace(
        block_m=min(config.block_m, half),
        block_n=min(config.block_n, half),
        num_warps=config.num_warps if half >= 64 else 4,
    )


def _fit(config: BwdConfig, problem: Problem, device: DeviceInfo, direction: str) -> BwdConfig:
    """`config`, or the largest smaller tile that the device has the shared memory for."""
    while shared_memory(config, problem, direction) > device.shared_memory:
        less = smaller(config)
        if less is None:
            break
        config = less
    return config


@lru_cache(maxsize=4096)
def _lookup(problem: Problem, device: DeviceInfo | None, products: str) -> tuple[BwdConfig, BwdConfig]:
    if device is None:
        return BwdConfig(16, 16, 4, 1), BwdConfig(16, 16, 4, 1)  # the interpreter
    found = []
    for direction, guess in zip(("dkdv", "dq"), rule(problem, device, products), strict=True):
        row = nearest(problem, device, direction)
        found.append(_fit(guess if row is None else BwdConfig(**row["config"]), problem, device, direction))
    dkdv, dq = found
    # attn_bwd_dkdv reads statistics of whole blocks of rows, which attn_bwd_dq must have written
    return dkdv._replace(block_m=min(dkdv.block_m, dq.block_m)), dq


def rule(problem: Problem, device: DeviceInfo, products: str = "ieee") -> tuple[BwdConfig, BwdConfig]:
    """Tiles for what was never measured; `products` is `precision(problem)`."""
    D = max(sum(cut(problem.head_dim)), sum(cut(problem.head_dim_v)))
    if problem.dtype.itemsize == 4:
        if D <= 64 and products != "ieee":
            return BwdConfig(32, 64, 4, 2), BwdConfig(64, 64, 4, 1)
        # the operands of a product live in registers: no matrix unit takes ieee fp32, and tf32 is split there
        side = 32 if D <= 128 else 16
        return BwdConfig(side, side, 4, 1), BwdConfig(side, side, 4, 1)
    if D <= 64:
        return BwdConfig(64, 64, 4, 2), BwdConfig(64, 64, 4, 2)
    if D <= 128:
        older = device.capability < (9, 0)
        if older and problem.left is not None and not problem.dropout_p:
            # ptxas gives larger tiles with a window's branch 32 or 128 registers here, and they spill kilobytes
            return BwdConfig(64, 64, 8, 2), BwdConfig(64, 64, 4, 2)
        dkdv = BwdConfig(64, 128, 8, 2, one_loop=not older)
        if problem.dropout_p:
            # dropout wants rows first, where 128 keys took 2.4 times as long on an H200; Blackwell's matrix units keep
            # more of it in shared memory
            dkdv = BwdConfig(128, 64, 8, 2 if device.capability < (10, 0) else 1, rows_first=True)
        return dkdv, BwdConfig(128, 64, 8, 2)
    if D <= 256:
        return BwdConfig(128, 64, 8, 1, rows_first=True), BwdConfig(128, 64, 8, 1, one_loop=True)
    return BwdConfig(32, 32, 8, 1), BwdConfig(32, 32, 8, 1)
