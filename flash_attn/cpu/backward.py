"""Backward on the CPU: the probabilities of each tile are recomputed from q, k and lse; O(N) extra memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.cpu import tile
from flash_attn.cpu.forward import rows_of_lse
from flash_attn.cpu.rows import key_storage, storage
from flash_attn.problem import Gradients, Operands, Problem


class RowTile(NamedTuple):
    """What every key tile needs of a tile of rows; all (U, G * BM, ...)."""

    rows: tuple[int, int]
    q: Tensor  # times scale
    dout: Tensor
    lse: Tensor  # (.., 1); +inf for a row that saw no key
    delta: Tensor  # (.., 1): rowsum(dout * out) - dlse
    dq: Tensor


@torch.no_grad()
def backward(
    p: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    """Gradients in the dtypes of q, k, v and sink, summed in float32 (float64 for float64) and rounded once.

    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2; docs/numerics.md.
    """
    given = zip(into, (ops.q, ops.k, ops.v), strict=True)
    dq, dk, dv = (torch.zeros_like(x) if y is None else y.zero_() for y, x in given)
    dq_rows, dk_rows, dv_rows = storage(dq, p.varlen_q), key_storage(dk, p), key_storage(dv, p)
    k_rows, v_rows = key_storage(ops.k, p), key_storage(ops.v, p)
    dsink = (
        None if ops.sink is None else torch.zeros(p.heads, dtype=torch.promote_types(torch.float32, p.dtype))
    )
    for unit in tile.units(p, ops):
        row_tiles = [_row_tile(unit, rows, out, lse, dout, dlse) for rows in unit.row_tiles()]
        if dsink is not None and ops.sink is not None:
            dsink[unit.heads] -= _sink_gradient(unit, ops.sink, row_tiles)
        for keys in unit.key_tiles():
            k, v = tile.key_tile(unit, k_rows, *keys), tile.key_tile(unit, v_rows, *keys)
            dk_tile, dv_tile = _key_gradients(unit, keys, k, v, row_tiles)
            tile.put_key_tile(unit, dk_rows, *keys, dk_tile)
            tile.put_key_tile(unit, dv_rows, *keys, dv_tile)
        for t in row_tiles:
            tile.put_row_tile(unit, dq_rows, *t.rows, t.dq.mul_(p.scale))
    return Gradients(dq, dk, dv, None if dsink is None or ops.sink is None else dsink.to(ops.sink.dtype))


def _row_tile(
    unit: tile.Unit, rows: tuple[int, int], out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> RowTile:
    p = unit.p
    q, do, o = (tile.row_tile(unit, storage(x, p.varlen_q), *rows) for x in (unit.ops.q, dout, out))
    delta = o.mul_(do).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= tile.row_tile(unit, rows_of_lse(dlse, p), *rows)
    lse_tile = tile.row_tile(unit, rows_of_lse(lse, p), *rows)
    lse_tile.masked_fill_(lse_tile == -torch.inf, torch.inf)
    return RowTile(rows, q.mul_(p.scale), do, lse_tile, delta, torch.zeros_like(q))


def _key_gradients(
    unit: tile.Unit, keys: tuple[int, int], k: Tensor, v: Tensor, row_tiles: list[RowTile]
) -> tuple[Tensor, Tensor]:
    """dk and dv of one tile of keys, (U, BN, D and Dv); adds to the dq of the row tiles."""
    p = unit.p
    dk, dv = torch.zeros_like(k, memory_format=torch.contiguous_format), v.new_zeros(v.shape)
    for t in row_tiles:
        if not tile.sees(unit, t.rows, keys)[0]:
            continue
        s, slope = tile.scores(unit, t.q, k, t.rows, keys, want_slope=True)
        prob = s.sub_(t.lse).exp_()
        ds = torch.bmm(t.dout, v.transpose(1, 2))
        if p.dropout_p:
            kept = tile.survivors(unit, t.rows, keys).to(prob.dtype).div_(1 - p.dropout_p)
            ds.mul_(kept)
            dv.baddbmm_((prob * kept).transpose(1, 2), t.dout)
        else:
            dv.baddbmm_(prob.transpose(1, 2), t.dout)
        ds.sub_(t.delta).mul_(prob)
        if slope is not None:
            ds.mul_(slope)
        t.dq.baddbmm_(ds, k)
        dk.baddbmm_(ds.transpose(1, 2), t.q)
    return dk, dv


def _sink_gradient(unit: tile.Unit, sink: Tensor, row_tiles: list[RowTile]) -> Tensor:
    """(heads of the unit,): the sum over rows of exp(sink - lse) * delta."""
    n, hk, G = unit.shape
    logit = sink[unit.heads].to(unit.dtype).view(1, hk, G, 1)
    total = torch.zeros(hk * G, dtype=unit.dtype)
    for t in row_tiles:
        lse, delta = (x.view(n, hk, G, -1) for x in (t.lse, t.delta))
        total += (torch.exp(logit - lse) * delta).sum((0, 3)).flatten()
    return total
