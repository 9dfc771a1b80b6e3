"""Append to a KV cache in place: store new keys and values, dense or paged, and rotate queries and keys on the way."""

import torch
from torch import Tensor

from flash_attn.layers.rotary import rotate_at
from flash_attn.problem import Append, Operands, Problem


def append(problem: Problem, ops: Operands, new: Append) -> tuple[Tensor, Tensor]:
    """Write `new` into the cache `ops.k`, `ops.v`; returns (q, lengths) for the attention that follows.

    Key i of sequence b goes to position cache_seqlens[b] + i of its cache row (or pages), rotated by the angles of
    that position. q is rotated at cache_seqlens + i when the problem is causal or windowed, else at cache_seqlens;
    it is a new tensor then, and ops.q otherwise. The lengths, int32 (B,), count the keys behind the append. Rows that
    a bad length, index or page would put outside the cache are dropped, and the lengths end at its capacity.

    On a GPU: one kernel, no host synchronisation, so it can be captured in a CUDA graph.
    """
    if new.k is None or new.v is None:
        return ops.q, new.cache_seqlens
    if ops.q.device.type == "cpu":
        return append_torch(problem, ops, new)
    return append_triton(problem, ops, new)


def append_triton(problem: Problem, ops: Operands, new: Append) -> tuple[Tensor, Tensor]:
    """`append` on the current GPU."""
    from flash_attn.kvcache import append_kernel

    q = ops.q if new.rotary_cos is None else torch.empty_like(ops.q)
    seqused = torch.empty_like(new.cache_seqlens)
    append_kernel.append(problem, ops, new, q, seqused)
    return q, seqused


def append_torch(problem: Problem, ops: Operands, new: Append) -> tuple[Tensor, Tensor]:
    """`append` in torch operations."""
    assert new.k is not None and new.v is not None
    lengths, fresh = new.cache_seqlens.long(), new.k.shape[1]
    cos, sin, table = new.rotary_cos, new.rotary_sin, ops.block_table
    position = lengths[:, None] + torch.arange(fresh, device=lengths.device)  # (B, S_new)
    q, k = ops.q, new.k
    if cos is not None and sin is not None:
        k = rotate_at(k, cos, sin, position, new.interleaved)
        ahead = torch.arange(problem.max_q, device=lengths.device)
        if problem.left is None and problem.right is None:
            ahead = torch.zeros_like(ahead)
        q = rotate_at(q, cos, sin, lengths[:, None] + ahead, new.interleaved)
    capacity = ops.k.shape[1] if table is None else table.shape[1] * problem.page_size
    inside = (position >= 0) & (position < capacity)
    at = position.clamp(0, capacity - 1)
    if table is not None:
        row, at = table.long().gather(1, at // problem.page_size), at % problem.page_size
    else:
        own = (
            torch.arange(problem.batch, device=lengths.device)
            if ops.cache_batch_idx is None
            else ops.cache_batch_idx
        )
        row = own.long()[:, None].expand_as(position)
    inside &= (row >= 0) & (row < ops.k.shape[0])
    ops.k[row[inside], at[inside]] = k[inside].to(ops.k.dtype)
    ops.v[row[inside], at[inside]] = new.v[inside].to(ops.v.dtype)
    return q, (lengths.clamp(min=0) + fresh).clamp(max=capacity).int()
