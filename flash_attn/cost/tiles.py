"""Which tiles our kernels use for a problem on a device that need not be here: the tuning table's answer."""

from functools import lru_cache
from typing import NamedTuple

from flash_attn.cost.hardware import Hardware
from flash_attn.problem import Problem
from flash_attn.tuning import table
from flash_attn.tuning.backward import backward_config
from flash_attn.tuning.config import padded
from flash_attn.tuning.hopper import forward_tile
from flash_attn.utils import device
from flash_attn.utils.device import DeviceInfo

# (compute capability, shared memory a program) where utils.device does not know the device.
_OTHER = {"l40s": ((8, 9), 99 * 1024), "mi300x": ((9, 4), 64 * 1024)}


class Tile(NamedTuple):
    """A block of scores: queries by keys, in a program of `warps`."""

    block_m: int
    block_n: int
    warps: int = 8


class Tiles(NamedTuple):
    main: Tile
    rows: Tile | None = None  # of the second kernel of Triton's backward, which makes dQ


def info(hw: Hardware) -> DeviceInfo:
    """What `utils.device` would say on this device."""
    known = device.KNOWN.get(hw.name)
    if known is not None:
        return known._replace(multiprocessors=hw.processors)
    capability, shared = _OTHER.get(hw.name, ((8, 0), 99 * 1024))
    return DeviceInfo(hw.title, capability, hw.processors, shared, hip=hw.name.startswith("mi"))


def dims(problem: Problem, backend: str) -> tuple[int, int]:
    """Head dimensions as the tiles hold them."""
    smallest = 64 if backend == "hopper" else 16
    return max(padded(problem.head_dim), smallest), max(padded(problem.head_dim_v), smallest)


def tiles_of(problem: Problem, backend: str, kind: str, hw: Hardware) -> Tiles:
    return _tiles(problem._replace(device="cuda"), backend, kind, info(hw))


@lru_cache(maxsize=4096)
def _tiles(problem: Problem, backend: str, kind: str, found: DeviceInfo) -> Tiles:
    if backend == "hopper":
        return Tiles(_hopper_forward(problem, found) if kind == "forward" else _hopper_backward(problem))
    with device.assume(found):
        if kind == "forward":
            return Tiles(_triton(table.forward_config(problem)))
        dkdv, dq = backward_config(problem)
        return Tiles(_triton(dkdv), _triton(dq))


def _triton(config) -> Tile:
    return Tile(config.block_m, config.block_n, config.num_warps)


def resident(tile: Tile, padded_dims: tuple[int, int], itemsize: int, backward: bool = False) -> int:
    """Programs that fit a processor: 64 Ki registers, 227 KiB of shared memory (an estimate without compiling)."""
    d, dv = padded_dims
    # fp32 accumulators a thread: O and S; in the backward a gradient of each operand, S and dP. 56 for the rest.
    own = max(tile.block_m, tile.block_n) * (d + dv) if backward else tile.block_m * dv
    scores = tile.block_m * tile.block_n * (2 if backward else 1)
    registers = min(255, 56 + (own + scores) // (32 * tile.warps))
    shared = (tile.block_m * d + 3 * tile.block_n * (d + dv)) * itemsize
    return max(1, min(2**16 // (registers * 32 * tile.warps), 227 * 1024 // shared))


def _hopper_forward(problem: Problem, found: DeviceInfo) -> Tile:
    tile = forward_tile(problem, found)
    return Tile(64 * tile["WARPGROUPS"], tile["BN"])


def _hopper_backward(problem: Problem) -> Tile:
    """(queries a step, keys of a program): `backward.hopper_launch.schedule`."""
    dim = max(dims(problem, "hopper"))
    few = problem.max_q * problem.group <= (512 if problem.right is None else 1024)
    if dim <= 64 and few and not problem.deterministic and problem.softcap == 0:
        return Tile(64, 128)
    return Tile(128, 128) if dim <= 64 else Tile(64, 128) if dim <= 128 else Tile(64, 64)
