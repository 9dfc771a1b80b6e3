"""Warp-specialised kernels for Hopper (compute capability 9.0), written in Gluon."""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from flash_attn.dispatch import forced_backend
from flash_attn.kvcache import splits
from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.utils import device

REPEATABLE = True  # its work on the GPU is allocations and launches of utils/launcher.py


def supports(problem: Problem, direction: str) -> str | None:
    """Why this backend cannot run `problem`, or None."""
    found = device.info() if problem.device == "cuda" else None
    if found is None or found.hip or found.capability != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), got {found.name if found else problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from flash_attn.utils import launcher

    if not launcher.KNOWN:
        return "Gluon is experimental: this Triton version is not one of 3.6 to 3.9, where the kernels were compiled"
    reason = _common(problem)
    if reason is None and direction == "forward" and splits.wants(problem, found):
        reason = "has a program per query head and block of rows; few rows want their keys split"
    if reason is None and direction == "backward":
        from flash_attn.backward import hopper_launch, short

        reason = hopper_launch.supports(problem)
        if reason is None and short.wants(problem) and forced_backend() != "hopper":
            reason = (
                "needs three launches, which take longer than so short a problem takes the portable kernels"
            )
    return reason


def _common(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, not {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > 256 or problem.head_dim % 8 or problem.head_dim_v % 8:
        dims = (problem.head_dim, problem.head_dim_v)
        return f"takes head dims up to 256 that are multiples of 8 (TMA moves 16 bytes), not {dims}"
    for feature in ("dropout_p", "alibi", "page_size", "leftpad", "batch_idx"):
        if getattr(problem, feature):
            return f"has no {feature}"
    if problem.scale <= 0:
        return f"takes the maximum before scaling, which needs a positive softmax scale, not {problem.scale}"
    if problem.max_k == 0:
        return "needs at least one key"
    if problem.num_splits > 1:
        return "does not split keys"
    return None


@cache
def _launches(direction: str) -> ModuleType:
    return importlib.import_module(f"flash_attn.{direction}.hopper_launch")


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    return _launches("forward").forward(problem, ops)


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    return _launches("backward").backward(problem, ops, out, lse, dout, dlse, into)
