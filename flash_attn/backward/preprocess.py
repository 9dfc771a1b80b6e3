"""Per-row statistics for the backward: delta = rowsum(dO * O) - dLSE, lse in base 2; and gradients nobody computes.

It reads out and dout once, so it runs at memory speed.
"""

import triton
import triton.language as tl

from flash_attn.tile import rows, score

sequence, row_offsets = rows.sequence, rows.row_offsets
LOG2E = score.LOG2E

# The statistics of each sequence start at a multiple of this many rows and fill whole blocks of as many, so that the
# kernels read them without a mask; every BLOCK_M divides it.
PAD = tl.constexpr(128)


@triton.jit
def stats_start(cu_seqlens, start, b):
    """First row of sequence `b` in the statistics; `start` is its first row in q."""
    if cu_seqlens is not None:
        return (start + b * PAD) // PAD * PAD
    else:
        return 0


@triton.jit
def attn_bwd_preprocess(
    out, dout, out_strides, dout_strides,
    stats,  # lse and dlse (natural log; dlse may be None), as read; lse2 and delta, as written
    stats_strides,  # (batch, head, row) of each
    lengths,  # (cu_seqlens_q, seqused_q): pointers or None
    max_q, keep_share,
    sink, dsink, dsink_strides,  # (H,) logits or None; partial sums (H, B, row blocks), contiguous in the last
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M = PAD rows of one head. Grid: (row blocks, heads, batch).

    lse2 is +inf in a row that sees no key, whichever infinity came, and behind the last row: exp2(s - inf) = 0.
    delta is multiplied by `keep_share` = 1 - dropout_p, because the kernels apply 1 / (1 - dropout_p) to whole
    gradients at the end.
    """
    block, head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, M = sequence(lengths[0], lengths[1], max_q, b)
    if block * BLOCK_M < M:
        r = block * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_DV)
        valid = r < M
        in_tile = valid[:, None] & (dims < DV)[None, :]
        o_off = row_offsets(r, start, b, out_strides) + head * out_strides[2]
        do_off = row_offsets(r, start, b, dout_strides) + head * dout_strides[2]
        o_tile = tl.load(out + o_off[:, None] + dims[None, :], mask=in_tile, other=0.0).to(tl.float32)
        do_tile = tl.load(dout + do_off[:, None] + dims[None, :], mask=in_tile, other=0.0).to(tl.float32)
        at = (start + r).to(tl.int64)
        lse = tl.load(
            stats[0] + b * stats_strides[0][0] + head * stats_strides[0][1] + at * stats_strides[0][2],
            mask=valid,
            other=float("inf"),
        )
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
        delta = tl.sum(o_tile * do_tile, 1)
        if stats[1] is not None:
            delta -= tl.load(
                stats[1] + b * stats_strides[1][0] + head * stats_strides[1][1] + at * stats_strides[1][2],
                mask=valid,
                other=0.0,
            )
        to = b * stats_strides[2][0] + head * stats_strides[2][1] + stats_start(lengths[0], start, b) + r
        tl.store(stats[2] + to, lse2)
        tl.store(stats[3] + to, tl.where(valid, delta * keep_share, 0.0))
        if sink is not None:
            share = tl.math.exp2(tl.load(sink + head).to(tl.float32) * LOG2E - lse2)
            part = -tl.sum(tl.where(valid, share * delta, 0.0), 0)
            tl.store(dsink + head * dsink_strides[0] + b * dsink_strides[1] + block, part)


@triton.jit
def zero_tail(
    x, x_strides, cu_seqlens, batch, rows_total, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr
):
    """Zero the rows of a packed tensor behind its last sequence. Grid: (programs, heads)."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(cu_seqlens + batch)
    for lo in range(first + tl.program_id(0) * BLOCK_M, rows_total, tl.num_programs(0) * BLOCK_M):
        r = (lo + tl.arange(0, BLOCK_M)).to(tl.int64)
        at = x + r[:, None] * x_strides[1] + head * x_strides[2] + dims[None, :]
        tl.store(
            at,
            tl.zeros([BLOCK_M, BLOCK_D], x.dtype.element_ty),
            mask=(r < rows_total)[:, None] & (dims < D)[None, :],
        )
