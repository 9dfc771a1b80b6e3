"""The result of a call without a single query or without a single key. Every device, no kernel.

A row that belongs to a sequence has the sink, if there is one, in its denominator and nothing else.
"""

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
    lse = torch.full(shape, -torch.inf, dtype=dtype, device=q.device)
    if ops.sink is not None:
        lse = torch.where(_owned(problem, ops), ops.sink.to(dtype)[:, None], lse)
    return out, lse


def _owned(problem: Problem, ops: Operands) -> Tensor:
    """Whether a query row belongs to a sequence, in a shape that broadcasts to the lse's."""
    q, cu, used = ops.q, ops.cu_seqlens_q, ops.seqused_q
    if cu is None:
        rows = torch.arange(q.shape[1], device=q.device)
        return (rows < (q.shape[1] if used is None else used[:, None])).view(-1, 1, q.shape[1])
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    ends = cu[1:] if used is None else cu[:-1] + used
    return ((rows >= cu[:-1]) & (rows < ends)).any(1)


def backward(
    problem: Problem, ops: Operands, out, lse, dout, dlse=None, into=(None, None, None)
) -> Gradients:
    """Zeros; the sink's gradient is what its lse receives (out does not depend on it)."""
    dq, dk, dv = (
        torch.zeros_like(x) if to is None else to.zero_() for x, to in zip(ops[:3], into, strict=True)
    )
    dsink = None
    if ops.sink is not None:
        rows = torch.zeros_like(lse) if dlse is None else dlse.where(_owned(problem, ops), 0.0)
        dsink = (rows.sum(1) if problem.varlen_q else rows.sum((0, 2))).to(ops.sink.dtype)
    return Gradients(dq, dk, dv, dsink)
