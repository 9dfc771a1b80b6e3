"""Merge of partial attention results over disjoint spans of keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn.forward import launch
from flash_attn.problem import Problem
from flash_attn.tile import rows, softmax
from flash_attn.utils import launcher

row_offsets, finish = rows.row_offsets, softmax.finish
BLOCK_S = 16  # spans that a program of the merge holds at a time


@triton.jit
def attn_combine(
    partial, stats, out, lse, partial_strides, out_strides, lse_strides, span_strides, sizes, cu_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = sum over spans s of 2^(m_s - m) partial_s / l, with m = max of m_s and l = sum of 2^(m_s - m) l_s.

    One program per row and head, heads fastest. Strides are (batch, row, head), of lse (batch, head), from span to
    span (rows of partial, entries of stats); sizes is (spans, rows of a sequence, heads, sequences). stats holds all
    m_s, then all l_s. Spans are added in order, so the result does not depend on timing.
    """
    all_spans, length, heads, batch = sizes
    head, row = tl.program_id(0) % heads, tl.program_id(0) // heads
    b, i = row // length, row % length
    spans = all_spans
    if cu_q is not None:  # a row behind the last sequence is nobody's, and nobody has written its spans
        spans = tl.where(i < tl.load(cu_q + batch), spans, 0)
    dims, s = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_S)
    partial += row_offsets(i, 0, b, partial_strides) + head * partial_strides[2]
    lse_off = b.to(tl.int64) * lse_strides[0] + head * lse_strides[1] + i
    stats += lse_off
    m, l = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, spans, BLOCK_S):
        at = first + s
        there = at < spans
        m_s = tl.load(stats + at * span_strides[1], mask=there, other=float("-inf"))
        l_s = tl.load(stats + (all_spans + at) * span_strides[1], mask=there, other=0.0)
        in_tile = there[:, None] & (dims < DV)[None, :]
        tile = tl.load(
            partial + (at * span_strides[0] * DV)[:, None] + dims[None, :], mask=in_tile, other=0.0
        )
        m_new = tl.maximum(m, tl.max(m_s, 0))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf would be NaN
        weight, rescale = tl.math.exp2(m_s - pivot), tl.math.exp2(m - pivot)
        acc = acc * rescale + tl.sum(tile * weight[:, None], 0)
        l = l * rescale + tl.sum(weight * l_s, 0)
        m = m_new
    inv, row_lse = finish(m, l)
    out += row_offsets(i, 0, b, out_strides) + head * out_strides[2]
    tl.store(out + dims, (acc * inv).to(out.dtype.element_ty), mask=dims < DV)
    tl.store(lse + lse_off, row_lse)


class Fixed(NamedTuple):
    """What a merge needs beside addresses."""

    grid: tuple[int, int, int]
    numbers: tuple  # strides of partial, out, lse, spans; sizes
    constants: dict[str, int]


class Prepared(NamedTuple):
    """A compiled merge that only wants tensors."""

    binary: launcher.Binary
    fixed: Fixed


def workspace(spans: int, out: Tensor, lse: Tensor) -> Tensor:
    """Memory for the partial results, `spans` times the shape of out, and behind them the (2, spans, *lse) stats."""
    return torch.empty(spans * (out.numel() + 2 * lse.numel()), dtype=torch.float32, device=out.device)


def lse_strides(problem: Problem, lse: Tensor) -> tuple[int, int]:
    """(batch, head)."""
    return (0, lse.stride(0)) if problem.varlen_q else (lse.stride(0), lse.stride(1))


def span_strides(out: Tensor, lse: Tensor) -> tuple[int, int]:
    """From span to span of partial results laid out like out and lse: rows of DV values, entries."""
    return out.numel() // out.shape[-1], lse.numel()


def fix(problem: Problem, out: Tensor, lse: Tensor, spans: int) -> Fixed:
    """The merge of `spans` spans into contiguous out and lse."""
    length, sequences = (out.shape[0], 1) if problem.varlen_q else (problem.max_q, problem.batch)
    strides = launch.strides(out)
    return Fixed(
        (sequences * length * problem.heads, 1, 1),
        (
            strides, strides, lse_strides(problem, lse), span_strides(out, lse),
            (spans, length, problem.heads, problem.batch),
        ),
        dict(DV=problem.head_dim_v, BLOCK_DV=max(16, triton.next_power_of_2(problem.head_dim_v)), BLOCK_S=BLOCK_S),
    )  # fmt: skip


def plan(
    fixed: Fixed, partial: Tensor, stats: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None
) -> launch.Launch:
    """The launch of `attn_combine` with tensors."""
    args = (partial, stats, out, lse, *fixed.numbers, cu_q)
    return launch.Launch(attn_combine, fixed.grid, args, fixed.constants, 4, 1)


def merge(
    ready: Prepared, partial: Tensor, stats: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None
) -> None:
    """Launch a compiled merge."""
    args = (partial, stats, out, lse, *ready.fixed.numbers, cu_q, *ready.fixed.constants.values())
    ready.binary.launch(ready.fixed.grid, args)
