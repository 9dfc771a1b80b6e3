"""Tile sizes of a kernel, and which of them a device can run."""

from typing import NamedTuple

from flash_attn.problem import Problem
from flash_attn.utils.device import DeviceInfo


class FwdConfig(NamedTuple):
    """How the forward kernel cuts a problem."""

    block_m: int  # query rows of a program
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    split: bool = False  # a loop of its own for the tiles of keys that every row sees whole
    registers: int = 0  # at most so many of a thread; 0: as many as the compiler wants


class BwdConfig(NamedTuple):
    """How one of the two backward kernels (dK/dV, dQ) cuts a problem."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    rows_first: bool = False  # dK/dV only: hold the scores as rows x keys, not keys x rows
    one_loop: bool = False  # over masked and whole tiles alike; with a window always
    registers: int = 0  # as in FwdConfig


def compiler_options(config: FwdConfig | BwdConfig) -> dict[str, int]:
    """What `launcher.prepare` passes to the compiler beside warps and stages."""
    return {"maxnreg": config.registers} if config.registers else {}


def pieces(dim: int) -> tuple[int, int]:
    """Two power-of-two tiles that cover a head dimension: (first, second or 0).

    16 is the smallest tile that a matrix unit takes. 80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64; 40 = 32 + 16 wastes
    8 of 48 columns where one tile would waste 24 of 64; 224 -> 256.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << max(dim - first - 1, 0).bit_length())
    if first >= 32 and first + second < whole:
        return first, second
    return whole, 0


def padded(dim: int) -> int:
    """Columns that the tiles of `pieces` cover."""
    return sum(pieces(dim))


def fwd_shared_memory(config: FwdConfig, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Bytes of shared memory the forward needs: q, and `num_stages` tiles of k and of v."""
    D, Dv = padded(head_dim), padded(head_dim_v)
    return itemsize * (config.block_m * D + max(config.num_stages, 1) * config.block_n * (D + Dv))


def fits(config: FwdConfig, problem: Problem, device: DeviceInfo) -> bool:
    """Whether the device has the shared memory and the registers for `config`."""
    shared = fwd_shared_memory(config, problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
    accumulators = config.block_m * (padded(problem.head_dim_v) + config.block_n)  # fp32
    return shared <= device.shared_memory and accumulators <= 255 * 32 * config.num_warps


def smaller(config: FwdConfig) -> FwdConfig | None:
    """The next smaller tile to try, or None: fewer stages first, they cost least."""
    if config.num_stages > 1:
        return config._replace(num_stages=config.num_stages - 1)
    if config.block_n > 16:
        return config._replace(block_n=config.block_n // 2)
    if config.block_m > 16:
        return config._replace(block_m=config.block_m // 2, num_warps=min(config.num_warps, 4))
    return None
