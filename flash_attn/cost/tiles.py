"""Which tiles our kernels use for a problem on a device that need not be here: the tuning table's answer."""

from functools import lru_cache
from typing import NamedTuple

from flash_attn.cost.hardware import Hardware
from flash_attn.problem import Problem
from flash_attn.tuning import table
from flash_attn.tuning.backward import backward_config
from flash_attn.tuning.config import padded
from flash_attn.utils import device
from flash_attn.utils.device import DeviceInfo

# (compute capability, shared memory a program) where utils.device does not know the device.
_OTHER = {"l40s": ((8, 9), 99 * 1024), "mi300x": ((9, 4), 64 * 1024)}


class Tile(NamedTuple):
    """A block of scores: queries by keys. `resident` programs share a processor."""

    block_m: int
    block_n: int
    resident: int = 1


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
    """Registers allow one program of eight warps a processor, or two of four."""
    return Tile(config.block_m, config.block_n, max(1, 8 // config.num_warps))


def _hopper_forward(problem: Problem, found: DeviceInfo) -> Tile:
    row = table.nearest(problem, found, "hopper forward")
    if row is not None:
        config = dict(row["config"])
        return Tile(64 * config["WARPGROUPS"], config["BN"] + config.get("BN2", 0))
    dim = max(dims(problem, "hopper"))  # else the rule of `forward.hopper_launch`
    if dim <= 64 and (problem.right is None or problem.max_q > 2048):
        return Tile(192, 128)
    return Tile(128, 128 if dim <= 128 or problem.head_dim_v <= 128 else 64)


def _hopper_backward(problem: Problem) -> Tile:
    """(queries a step, keys of a program): `backward.hopper_launch.schedule`."""
    dim = max(dims(problem, "hopper"))
    return Tile(128, 128) if dim <= 64 else Tile(64, 128) if dim <= 128 else Tile(64, 64)
