"""Merge of partial attention results over disjoint spans of keys, by their log-sum-exp."""

import triton
import triton.language as tl
from torch import Tensor

from flash_attn.forward import launch
from flash_attn.problem import Problem
from flash_attn.tile import rows, score, softmax

LOG2E, LN2 = score.LOG2E, softmax.LN2
row_offsets = rows.row_offsets


@triton.jit
def attn_combine(
    partial, partial_lse, out, lse, partial_strides, out_strides, lse_strides, span_strides, sizes, cu_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = sum over spans s of exp(lse_s - lse) out_s, with exp(lse) = sum over s of exp(lse_s).

    One program per row and head, heads fastest. Strides are (batch, row, head), of lse (batch, head), from span to
    span (partial, partial_lse); sizes is (spans, rows of a sequence, heads, sequences). Spans are added in order, so
    the result does not depend on timing. A span without keys has lse -inf and is not read: it may hold anything.
    """
    spans, length, heads, batch = sizes
    head, row = tl.program_id(0) % heads, tl.program_id(0) // heads
    b, i = row // length, row % length
    if cu_q is not None:  # a row behind the last sequence is nobody's, and nobody has written its spans
        spans = tl.where(i < tl.load(cu_q + batch), spans, 0)
    dims, s = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_S)
    partial += row_offsets(i, 0, b, partial_strides) + head * partial_strides[2]
    lse_off = b.to(tl.int64) * lse_strides[0] + head * lse_strides[1] + i
    m, l = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, spans, BLOCK_S):
        at = (first + s).to(tl.int64)
        x = (
            tl.load(partial_lse + lse_off + at * span_strides[1], mask=at < spans, other=float("-inf"))
            * LOG2E
        )
        m_new = tl.maximum(m, tl.max(x, 0))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, rescale = tl.math.exp2(x - pivot), tl.math.exp2(m - pivot)
        in_tile = (x > float("-inf"))[:, None] & (dims < DV)[None, :]
        tile = tl.load(partial + (at * span_strides[0])[:, None] + dims[None, :], mask=in_tile, other=0.0)
        acc = acc * rescale + tl.sum(tile * weight[:, None], 0)
        l = l * rescale + tl.sum(weight, 0)
        m = m_new
    inv, row_lse = softmax.finish(m, l)
    out += row_offsets(i, 0, b, out_strides) + head * out_strides[2]
    tl.store(out + dims, (acc * inv).to(out.dtype.element_ty), mask=dims < DV)
    tl.store(lse + lse_off, row_lse)


def plan(
    problem: Problem, partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None
) -> launch.Launch:
    """The launch that merges partial (spans, *out) and partial_lse (spans, *lse) into out and lse."""
    packed = problem.varlen_q
    length, sequences = (out.shape[0], 1) if packed else (problem.max_q, problem.batch)
    block_dv = max(16, triton.next_power_of_2(problem.head_dim_v))
    args = (
        partial, partial_lse, out, lse, launch.strides(partial[0]), launch.strides(out),
        (0, lse.stride(0)) if packed else lse.stride()[:2], (partial.stride(0), partial_lse.stride(0)),
        (partial.shape[0], length, problem.heads, problem.batch), cu_q,
    )  # fmt: skip
    constants = dict(DV=problem.head_dim_v, BLOCK_DV=block_dv, BLOCK_S=max(4, 4096 // block_dv))
    return launch.Launch(attn_combine, (sequences * length * problem.heads, 1, 1), args, constants, 4, 2)
