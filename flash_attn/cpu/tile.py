"""One tile of scores on the CPU: how the work is cut, and scale, soft cap, ALiBi, mask and dropout of a tile.

A tile stacks the G query heads that share a key head on top of each other, so that a grouped-query problem is
the same matrix product as any other: (U, G * BM, BN) for U = sequences x key heads.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.cpu.rows import Batch, batches
from flash_attn.problem import Operands, Problem
from flash_attn.reference.dropout import keep_mask

# Elements: rows of a tile (query heads included) and keys, and their product over all of a tile's heads.
# Larger tiles amortise the interpreter, smaller ones waste less on the diagonal and stay in the cache.
ROWS, KEYS, MAX_KEYS, ELEMENTS = 512, 512, 4096, 1 << 20
NARROWEST = 128  # below this the interpreter takes longer than the arithmetic


class Unit(NamedTuple):
    """Sequences and key heads that are computed together."""

    p: Problem
    ops: Operands
    batch: Batch
    kv_heads: slice
    dtype: torch.dtype  # of the arithmetic

    @property
    def heads(self) -> slice:
        return slice(self.kv_heads.start * self.p.group, self.kv_heads.stop * self.p.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(sequences, key heads, query heads per key head)"""
        return len(self.batch.ids), self.kv_heads.stop - self.kv_heads.start, self.p.group

    def row_tiles(self) -> list[tuple[int, int]]:
        return _cut(self.batch.M, max(1, _side(self.p, ROWS) // self.p.group))

    def key_tiles(self) -> list[tuple[int, int]]:
        side = _side(self.p, KEYS)
        rows = self.p.group * min(self.batch.M, max(1, _side(self.p, ROWS) // self.p.group))
        few_rows = ROWS * KEYS // max(rows, 1) if side == KEYS else side  # longer tiles then, as in decode
        return _cut(self.batch.N, min(max(side, few_rows), MAX_KEYS))


def _side(p: Problem, full: int) -> int:
    """Length of a tile: not much more than a narrow window, of which a longer tile would hide most."""
    if p.left is None or p.right is None:
        return full
    return min(full, max(NARROWEST, 1 << (p.left + p.right).bit_length() >> 1))


def _cut(length: int, step: int) -> list[tuple[int, int]]:
    return [(lo, min(lo + step, length)) for lo in range(0, length, step)]


def units(p: Problem, ops: Operands) -> Iterator[Unit]:
    """The whole problem in parts whose tiles have about ELEMENTS elements."""
    dtype = torch.promote_types(torch.float32, p.dtype)
    for batch in batches(p, ops):
        tile = min(p.group * batch.M, _side(p, ROWS)) * min(batch.N, _side(p, KEYS))
        fit = max(1, ELEMENTS // max(tile, 1))  # (sequence, key head) pairs
        for lo, hi in _cut(len(batch.ids), max(1, fit // p.kv_heads)):
            for h_lo, h_hi in _cut(p.kv_heads, min(fit, p.kv_heads)):
                yield Unit(p, ops, batch.part(lo, hi), slice(h_lo, h_hi), dtype)


def sees(unit: Unit, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[bool, bool]:
    """(some row of the tile sees some key, every row sees every key)."""
    p, shift = unit.p, unit.batch.N - unit.batch.M
    lowest, highest = (
        keys[0] - (rows[1] - 1 + shift),
        keys[1] - 1 - (rows[0] + shift),
    )  # distance from the diagonal
    some = (p.right is None or lowest <= p.right) and (p.left is None or highest >= -p.left)
    every = (p.right is None or highest <= p.right) and (p.left is None or lowest >= -p.left)
    return some, every


def row_tile(unit: Unit, x: Tensor, lo: int, hi: int) -> Tensor:
    """Rows [lo, hi) of q, dout or out, (.., H, D), as a fresh (U, G * BM, D) in the dtype of the arithmetic."""
    n, hk, G = unit.shape
    tile = torch.empty(n, hk, G, hi - lo, x.shape[-1], dtype=unit.dtype)
    tile.copy_(x[unit.batch.q.at(lo, hi, unit.heads)].unflatten(2, (hk, G)).permute(0, 2, 3, 1, 4))
    return tile.view(n * hk, G * (hi - lo), x.shape[-1])


def put_row_tile(unit: Unit, x: Tensor, lo: int, hi: int, tile: Tensor) -> None:
    """The inverse of `row_tile`."""
    n, hk, G = unit.shape
    x[unit.batch.q.at(lo, hi, unit.heads)] = (
        tile.view(n, hk, G, hi - lo, -1).permute(0, 3, 1, 2, 4).flatten(2, 3).to(x.dtype)
    )


def key_tile(unit: Unit, x: Tensor, lo: int, hi: int) -> Tensor:
    """Rows [lo, hi) of k or v, (.., Hk, D), as (U, BN, D); a view where storage allows."""
    return x[unit.batch.k.at(lo, hi, unit.kv_heads)].transpose(1, 2).to(unit.dtype).flatten(0, 1)


def put_key_tile(unit: Unit, x: Tensor, lo: int, hi: int, tile: Tensor) -> None:
    n, hk, _ = unit.shape
    x[unit.batch.k.at(lo, hi, unit.kv_heads)] = tile.view(n, hk, hi - lo, -1).transpose(1, 2).to(x.dtype)


class Scores(NamedTuple):
    s: Tensor  # (U, G * BM, BN) logits, -inf where the row does not see the key
    slope: Tensor | None  # d(logit) / d(scale * q.k) where that is not 1


def scores(
    unit: Unit, q: Tensor, k: Tensor, rows: tuple[int, int], keys: tuple[int, int], want_slope: bool = False
) -> Scores:
    """Logits of a tile from q, which the scale is already folded into."""
    p = unit.p
    s, slope = torch.bmm(q, k.transpose(1, 2)), None
    if p.softcap:
        s.div_(p.softcap).tanh_()
        slope = 1 - s.square() if want_slope else None
        s.mul_(p.softcap)
    every = sees(unit, rows, keys)[1]
    if unit.ops.alibi_slopes is not None or not every:
        tile = s.view(*unit.shape, rows[1] - rows[0], keys[1] - keys[0])
        aligned = torch.arange(*rows)[:, None] + (unit.batch.N - unit.batch.M)
        distance = torch.arange(*keys) - aligned
        if unit.ops.alibi_slopes is not None:
            tile.addcmul_(_slopes(unit, unit.ops.alibi_slopes), distance.abs().to(s.dtype), value=-1)
        if not every:
            hidden = torch.zeros_like(distance, dtype=torch.bool)
            if p.left is not None:
                hidden |= distance < -p.left
            if p.right is not None:
                hidden |= distance > p.right
            tile.masked_fill_(hidden, -torch.inf)
    return Scores(s, slope)


def _slopes(unit: Unit, slopes: Tensor) -> Tensor:
    """(sequences or 1, key heads, G, 1, 1)"""
    per_batch = slopes[None] if slopes.dim() == 1 else slopes[unit.batch.ids]
    _, hk, G = unit.shape
    return per_batch[:, unit.heads].to(unit.dtype).view(-1, hk, G, 1, 1)


def survivors(unit: Unit, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Boolean (U, G * BM, BN): the elements that dropout keeps."""
    assert unit.ops.rng_state is not None
    ids, heads = torch.tensor(unit.batch.ids), torch.arange(unit.heads.start, unit.heads.stop)
    p = unit.p
    keep = keep_mask(unit.ops.rng_state, p.dropout_p, ids, heads, range(*rows), range(*keys), p.heads)
    n, hk, G = unit.shape
    return keep.reshape(n * hk, G * (rows[1] - rows[0]), keys[1] - keys[0])
