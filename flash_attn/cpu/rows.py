"""Where the rows of the sequences lie on the CPU, and which sequences can be computed together.

Sequences of equal lengths share one batch, whatever their storage. Storage is addressed as
(outer, row, head, dim); packed tensors have one outer entry.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Operands, Problem


class Run(NamedTuple):
    """Rows that follow one another in some consecutive outer entries: read as a view."""

    outer: int
    outers: int
    start: int

    def at(self, lo: int, hi: int, heads: slice) -> tuple[Any, ...]:
        return slice(self.outer, self.outer + self.outers), slice(self.start + lo, self.start + hi), heads

    def part(self, lo: int, hi: int) -> "Run":
        return Run(self.outer + lo, hi - lo, self.start)


class Gather(NamedTuple):
    """Rows anywhere: int64 (sequences, rows) indices."""

    outer: Tensor
    inner: Tensor

    def at(self, lo: int, hi: int, heads: slice) -> tuple[Any, ...]:
        return self.outer[:, lo:hi], self.inner[:, lo:hi], heads

    def part(self, lo: int, hi: int) -> "Gather":
        return Gather(self.outer[lo:hi], self.inner[lo:hi])


class Batch(NamedTuple):
    """Sequences with M queries and N keys each. `storage[q.at(lo, hi, heads)]` is (sequences, hi - lo, heads, dim)."""

    ids: list[int]
    M: int
    N: int
    q: Run | Gather
    k: Run | Gather

    def part(self, lo: int, hi: int) -> "Batch":
        return self._replace(ids=self.ids[lo:hi], q=self.q.part(lo, hi), k=self.k.part(lo, hi))


def storage(x: Tensor, packed: bool) -> Tensor:
    return x[None] if packed else x


def key_storage(x: Tensor, p: Problem) -> Tensor:
    return storage(x, p.varlen_k and not p.paged)


def batches(p: Problem, ops: Operands) -> Iterator[Batch]:
    """Every sequence once, those of equal lengths together, in order of first appearance."""
    if all(x is None for x in ops[3:10]):
        everything = Run(0, p.batch, 0)
        yield Batch(list(range(p.batch)), p.max_q, p.max_k, everything, everything)
        return
    q_start, M, k_start, N = _lengths(p, ops)
    groups: dict[tuple[int, int], list[int]] = {}
    for b in range(p.batch):
        groups.setdefault((M[b], N[b]), []).append(b)
    rows = ops.cache_batch_idx.tolist() if ops.cache_batch_idx is not None else None
    for (m, n), ids in groups.items():
        q = _locate(ids, q_start, m, p.varlen_q, None)
        if p.paged:
            k: Run | Gather = _pages(p, ops, ids, k_start, n)
        else:
            k = _locate(ids, k_start, n, p.varlen_k, rows)
        yield Batch(ids, m, n, q, k)


def _lengths(p: Problem, ops: Operands) -> tuple[list[int], list[int], list[int], list[int]]:
    """Per sequence: first query row, queries, first key row, keys."""

    def ints(x: Tensor | None, default: int) -> list[int]:
        return [default] * p.batch if x is None else x.tolist()

    q_start = k_start = [0] * p.batch
    M, N = [p.max_q] * p.batch, [p.max_k] * p.batch
    if ops.cu_seqlens_q is not None:
        cu = ops.cu_seqlens_q.tolist()
        q_start, M = cu[:-1], [b - a for a, b in zip(cu[:-1], cu[1:], strict=True)]
    if ops.cu_seqlens_k is not None:
        cu = ops.cu_seqlens_k.tolist()
        k_start, N = (
            [0] * p.batch if p.paged else cu[:-1],
            [b - a for a, b in zip(cu[:-1], cu[1:], strict=True)],
        )
    if ops.seqused_q is not None:
        M = ops.seqused_q.tolist()
    if ops.seqused_k is not None:
        N = ops.seqused_k.tolist()
    pad = ints(ops.leftpad_k, 0)
    k_start = [a + x for a, x in zip(k_start, pad, strict=True)]
    N = [max(n - x, 0) for n, x in zip(N, pad, strict=True)]
    return q_start, M, k_start, N


def _locate(
    ids: list[int], start: list[int], length: int, packed: bool, outer: list[int] | None
) -> Run | Gather:
    outers = [0] * len(ids) if packed else ids if outer is None else [outer[b] for b in ids]
    starts = [start[b] for b in ids]
    consecutive = not packed and outers == list(range(outers[0], outers[0] + len(ids)))
    if len(ids) == 1 or (consecutive and len(set(starts)) == 1):
        return Run(outers[0], len(ids), starts[0])
    inner = torch.tensor(starts)[:, None] + torch.arange(length)
    return Gather(torch.tensor(outers)[:, None].expand_as(inner), inner)


def _pages(p: Problem, ops: Operands, ids: list[int], start: list[int], length: int) -> Gather:
    assert ops.block_table is not None
    cols = torch.tensor([start[b] for b in ids])[:, None] + torch.arange(length)
    pages = ops.block_table[ids].long().gather(1, cols // p.page_size)
    return Gather(pages, cols % p.page_size)
