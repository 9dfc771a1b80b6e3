"""Forward on the CPU: online softmax over key tiles with torch operations; nothing of size M x N is stored."""

import torch
from torch import Tensor

from flash_attn.cpu import tile
from flash_attn.cpu.rows import key_storage, storage
from flash_attn.problem import Operands, Problem


@torch.no_grad()
def forward(p: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) as `dispatch` asks for; lse in the dtype of the arithmetic (float32, float64 for float64).

    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1.
    """
    out = ops.q.new_zeros(*ops.q.shape[:-1], p.head_dim_v)
    shape = (p.heads, ops.q.shape[0]) if p.varlen_q else (p.batch, p.heads, p.max_q)
    lse = torch.full(shape, -torch.inf, dtype=torch.promote_types(torch.float32, p.dtype))
    out_rows, lse_rows = storage(out, p.varlen_q), rows_of_lse(lse, p)
    for unit in tile.units(p, ops):
        for rows in unit.row_tiles():
            o, l = _attend(unit, rows)
            tile.put_row_tile(unit, out_rows, *rows, o)
            tile.put_row_tile(unit, lse_rows, *rows, l)
    return out, lse


def rows_of_lse(lse: Tensor, p: Problem) -> Tensor:
    """lse as storage with rows like q's: (outer, row, head, 1)."""
    return storage(lse.transpose(0, 1), True)[..., None] if p.varlen_q else lse.transpose(1, 2)[..., None]


def _attend(unit: tile.Unit, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """out (U, G * BM, Dv) and lse (U, G * BM, 1) of one tile of rows."""
    p, ops = unit.p, unit.ops
    q = tile.row_tile(unit, storage(ops.q, p.varlen_q), *rows).mul_(p.scale)
    k_rows, v_rows = key_storage(ops.k, p), key_storage(ops.v, p)
    acc = q.new_zeros(*q.shape[:-1], p.head_dim_v)
    m, l = _start(unit, rows, q)
    for keys in unit.key_tiles():
        if not tile.sees(unit, rows, keys)[0]:
            continue
        s = tile.scores(unit, q, tile.key_tile(unit, k_rows, *keys), rows, keys).s
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        s.sub_(m_new).exp_()
        rescale = m.sub_(m_new).exp_()
        l.mul_(rescale).add_(s.sum(-1, keepdim=True))
        if p.dropout_p:
            s.mul_(tile.survivors(unit, rows, keys))
        acc.mul_(rescale).baddbmm_(s, tile.key_tile(unit, v_rows, *keys))
        m = m_new
    acc.div_(l.masked_fill(l == 0, 1.0) * (1 - p.dropout_p))
    return acc, m.add_(l.log_())  # log 0 = -inf where no key was seen


def _start(unit: tile.Unit, rows: tuple[int, int], q: Tensor) -> tuple[Tensor, Tensor]:
    """Running maximum and sum before the first key. A sink is a first key whose value is 0.

    The maximum starts at the lowest finite number: with -inf, a row without keys would meet -inf - -inf.
    """
    lowest = torch.finfo(q.dtype).min
    m, l = q.new_full((*q.shape[:-1], 1), lowest), q.new_zeros(*q.shape[:-1], 1)
    if unit.ops.sink is not None:
        shape = (*unit.shape, rows[1] - rows[0], 1)
        sink = unit.ops.sink[unit.heads].to(q.dtype).view(*unit.shape[1:], 1, 1)
        m.view(shape).copy_(sink.clamp(min=lowest))
        l.view(shape).copy_(sink > -torch.inf)
    return m, l
