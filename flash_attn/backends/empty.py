"""The result of a call without a single query or without a single key. Every device, no kernel."""

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """Zeros, and a log of a denominator that holds the sink or nothing."""
    q = ops.q
    H = problem.heads
    out = torch.zeros((*q.shape[:-1], problem.head_dim_v), dtype=q.dtype, device=q.device)
    dtype = torch.promote_types(torch.float32, q.dtype)
    shape = (H, q.shape[0]) if problem.varlen_q else (q.shape[0], H, q.shape[1])
    if ops.sink is not None:
        return out, ops.sink.to(dtype)[:, None].expand(shape).contiguous()
    return out, torch.full(shape, -torch.inf, dtype=dtype, device=q.device)


def backward(
    problem: Problem, ops: Operands, out, lse, dout, dlse=None, into=(None, None, None)
) -> Gradients:
    """Zeros; the sink's gradient is what its lse receives (out does not depend on it)."""
    dq, dk, dv = (
        torch.zeros_like(x) if to is None else to.zero_() for x, to in zip(ops[:3], into, strict=True)
    )
    dsink = None
    if ops.sink is not None:
        rows = torch.zeros_like(lse) if dlse is None else dlse  # (B, H, M) or (H, total_q)
        dsink = (rows.sum(1) if problem.varlen_q else rows.sum((0, 2))).to(ops.sink.dtype)
    return Gradients(dq, dk, dv, dsink)
