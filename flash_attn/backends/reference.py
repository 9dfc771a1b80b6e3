"""The fp64 oracle as a backend: runs everything, anywhere, slowly. Only used when asked for by name."""

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference import attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def supports(problem: Problem, direction: str) -> str | None:
    if problem.dtype not in DTYPES:
        return f"computes float16, bfloat16, float32 and float64, not {problem.dtype}"
    return None


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    out, lse = attention.forward(problem, ops)
    return out.to(problem.dtype), lse.to(torch.promote_types(torch.float32, problem.dtype)).contiguous()


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    grads = attention.backward(problem, ops, out, lse, dout, dlse)
    dq, dk, dv = (
        g.to(problem.dtype) if given is None else given.copy_(g)
        for g, given in zip(grads[:3], into, strict=True)
    )
    dsink = None if grads.dsink is None or ops.sink is None else grads.dsink.to(ops.sink.dtype)
    return Gradients(dq, dk, dv, dsink)
