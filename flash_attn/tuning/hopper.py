"""How the Hopper forward cuts a problem: the nearest measured row, else a rule. Needs no Triton."""

from typing import Any

from flash_attn.problem import Problem
from flash_attn.tuning import table
from flash_attn.utils.device import DeviceInfo

PAIR: dict[str, Any] = dict(  # two warpgroups of 128 keys
    WARPGROUPS=2, BN=128, STAGES=2, PINGPONG=False, CHAIN=True, OVERLAP=False, QREG=0, SHARE=False, registers=(240, 24)
)  # fmt: skip


def split_dim(d: int) -> tuple[int, int]:
    """`d` as one or two powers of two that a wgmma and a swizzled box can have; TMA pads the rest with zeros."""
    for whole in (64, 128, 256):
        if d <= whole:
            half = whole // 2
            for rest in (32, 64):
                if half >= 64 and rest < half and d <= half + rest:
                    return half, rest
            return whole, 0
    raise ValueError(f"head dim {d} > 256")


def forward_tile(problem: Problem, device: DeviceInfo | None) -> dict[str, Any]:
    """Fields of `forward.hopper_config.Config`, registers and maybe swizzle for `problem`.

    Each row was checked on the GPU on what it was measured on, which is plain dense problems; the rule was checked with
    every feature.
    """
    special = problem.softcap or problem.sink or problem.varlen_q or problem.varlen_k
    special = special or problem.seqused_q or problem.seqused_k or problem.left is not None
    measured_dim = problem.head_dim == problem.head_dim_v and problem.head_dim in (64, 128, 256)
    if not special and measured_dim and problem.right in (None, 0) and device is not None:
        row = table.nearest(problem, device, "hopper forward")
        if row is not None:
            return dict(row["config"])
    return _rule(problem)


def _rule(problem: Problem) -> dict[str, Any]:
    dim = sum(split_dim(max(problem.head_dim, problem.head_dim_v)))
    long = problem.max_q > 1024
    if dim <= 64:
        if long and problem.left is None:
            return PAIR | dict(WARPGROUPS=4, BN=64, STAGES=4, registers=(112, 24))
        return PAIR | dict(STAGES=4)
    (d0, d1), (v0, v1) = split_dim(problem.head_dim), split_dim(problem.head_dim_v)
    fits = v0 == d0 and v1 in (0, d1)  # O into the place of Q
    banded = problem.left is not None or problem.right is not None
    if dim <= 128:
        if long and fits and not banded:
            return PAIR | dict(WARPGROUPS=3, BN=64, STAGES=4, CHAIN=False, SHARE=True, registers=(160, 24))
        return PAIR | dict(PINGPONG=True, QREG=64) if banded and fits and d0 == 128 else PAIR
    if not fits:
        return PAIR | dict(BN=64, CHAIN=False)
    if problem.head_dim_v <= 128:  # shared memory has no room for a second Q
        return PAIR | dict(CHAIN=False, SHARE=True, OVERLAP=banded, PINGPONG=banded)
    tile = PAIR | dict(BN=64, PINGPONG=True, CHAIN=False, SHARE=True)
    return tile | dict(STAGES=3, OVERLAP=True) if dim <= 192 else tile
