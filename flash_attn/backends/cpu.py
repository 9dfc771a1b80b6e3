"""The CPU backend: exact, O(N) extra memory, every feature, torch operations only.

`num_splits` is accepted and changes nothing: splitting keys over processors is a matter of the GPU's decode.
Every gradient is bitwise reproducible, `deterministic` or not.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flash_attn.cpu import backward as tiled_backward
from flash_attn.cpu import forward as tiled_forward
from flash_attn.cpu import torch_flash
from flash_attn.problem import Gradients, Operands, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def supports(problem: Problem, direction: str) -> str | None:
    if problem.device != "cpu":
        return f"runs on CPU tensors, not {problem.device}"
    if problem.dtype not in DTYPES:
        return f"computes float16, bfloat16, float32 and float64, not {problem.dtype}"
    if direction == "backward" and (problem.paged or problem.batch_idx):
        return "the backward needs keys that belong to one sequence each, not pages or a cache_batch_idx"
    return None


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    with _as_given():
        result = torch_flash.forward(problem, ops) if torch_flash.computes(problem) else None
        return tiled_forward.forward(problem, ops) if result is None else result


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    with _as_given():
        if dlse is None and torch_flash.computes(problem):
            return torch_flash.backward(problem, ops, out, lse, dout, into)
        return tiled_backward.backward(problem, ops, out, lse, dout, dlse, into)


def _as_given() -> AbstractContextManager[Any]:
    """No autocast: the dtypes of the torch operations here are chosen, as those of a kernel are."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
