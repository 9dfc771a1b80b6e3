"""Where the rows of each sequence lie, and which keys a row sees: the storage forms, read off one index at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Operands, Problem


class Sequence(NamedTuple):
    """One sequence of a call. The indices select from `q.flatten(0, 1)` of dense, `q` of packed tensors."""

    b: int
    q_rows: Tensor  # int64 (M,)
    k_rows: Tensor  # int64 (N,): key 0 is the first valid one, behind any left padding


def sequences(p: Problem, ops: Operands) -> Iterator[Sequence]:
    """The sequences of a call in order of the batch. Reads lengths from the device, so it synchronises."""

    def ints(x: Tensor | None) -> list[int] | None:
        return None if x is None else x.tolist()

    cu_q, cu_k = ints(ops.cu_seqlens_q), ints(ops.cu_seqlens_k)
    used_q, used_k = ints(ops.seqused_q), ints(ops.seqused_k)
    leftpad, rows = ints(ops.leftpad_k), ints(ops.cache_batch_idx)
    arange = torch.arange(max(p.max_q, p.max_k), device=ops.q.device)
    for b in range(p.batch):
        q_start, M = (cu_q[b], cu_q[b + 1] - cu_q[b]) if cu_q else (b * p.max_q, p.max_q)
        N = cu_k[b + 1] - cu_k[b] if cu_k else p.max_k
        M = used_q[b] if used_q else M
        N = used_k[b] if used_k else N
        pad = leftpad[b] if leftpad else 0
        cols = arange[pad : max(N, pad)]
        if ops.block_table is not None:
            k_rows = ops.block_table[b].long()[cols // p.page_size] * p.page_size + cols % p.page_size
        elif cu_k:
            k_rows = cols + cu_k[b]
        else:
            k_rows = cols + (rows[b] if rows else b) * ops.k.shape[1]
        yield Sequence(b, arange[:M] + q_start, k_rows)


def flat(x: Tensor, packed: bool) -> Tensor:
    """Storage as rows: (rows, heads, dim)."""
    return x if packed else x.flatten(0, 1)


def distance(M: int, N: int, device: torch.device) -> Tensor:
    """(M, N): key index minus the key that the row is aligned with; positive is right of the diagonal."""
    return torch.arange(N, device=device)[None, :] - (torch.arange(M, device=device)[:, None] + N - M)


def visible(p: Problem, distance_MN: Tensor) -> Tensor:
    """Boolean (M, N): the row sees the key."""
    keep_MN = torch.ones_like(distance_MN, dtype=torch.bool)
    if p.left is not None:
        keep_MN &= distance_MN >= -p.left
    if p.right is not None:
        keep_MN &= distance_MN <= p.right
    return keep_MN
