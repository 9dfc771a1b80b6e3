"""The backward kernels: attn_bwd_dkdv (one program per key block) and attn_bwd_dq (one per row block).

Neither uses atomics: every gradient is summed in a fixed order, in fp32, over the query heads of a group too, so all
of them are bitwise reproducible. The price is that the scores are computed twice (7 products instead of 5).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn.backward import preprocess
from flash_attn.tile import dropout, mask, rows, score

sequence, row_offsets = rows.sequence, rows.row_offsets
key_range, full_range, keep = mask.key_range, mask.full_range, mask.keep
capped, biased, dcapped = score.capped, score.biased, score.dcapped
stats_start = preprocess.stats_start
keep_tile, keep_tile_t = dropout.keep_tile, dropout.keep_tile_t
LOG2E = score.LOG2E


class Features(NamedTuple):
    """Compile-time switches; each is a line in `tile/`, never another kernel."""

    left: bool
    right: bool
    softcap: bool
    alibi: bool
    dropout: bool


@triton.jit
def _key_sequence(cu_seqlens, seqused, leftpad, max_len, b):
    """(first row, length) of the keys of sequence `b`; key 0 is the row at leftpad."""
    start, length = sequence(cu_seqlens, seqused, max_len, b)
    if leftpad is not None:
        pad = tl.load(leftpad + b)
        start, length = start + pad, tl.maximum(length - pad, 0)
    return start, length


@triton.jit
def _row_range(col_lo, col_hi, M, N, band, F: tl.constexpr):
    """Rows [lo, hi) of which each sees at least one key of [col_lo, col_hi)."""
    lo, hi = 0, M
    if F.right:
        lo = tl.maximum(col_lo + M - N - band[1], 0)
    if F.left:
        hi = tl.minimum(col_hi + M - N + band[0], M)
    return lo, hi


@triton.jit
def _full_row_range(col_lo, col_hi, M, N, band, F: tl.constexpr):
    """Rows [lo, hi) of which each sees every key of [col_lo, col_hi)."""
    lo, hi = 0, M
    if F.right:
        lo = tl.maximum(col_hi - 1 + M - N - band[1], 0)
    if F.left:
        hi = tl.minimum(col_lo + 1 + M - N + band[0], M)
    return lo, hi


@triton.jit
def _p_and_ds(
    qk, dp, r, c, M, N, lse2, delta, kept, factors, slope_log2, band, F: tl.constexpr, MASKED: tl.constexpr
):
    """(dropped-out P, dS) of a tile, either way round: r and lse2 broadcast along keys, c along rows.

    Both lack the factor 1 / (1 - dropout_p) and dS the factor `scale`; whole gradients get them at the end.
    """
    x = capped(qk, factors[0], F)
    s = biased(x, factors[1], r, c, M, N, slope_log2, F)
    p = tl.math.exp2(s - lse2)
    if MASKED:
        p = tl.where(keep(r, c, M, N, band, F), p, 0.0)
    if F.dropout:
        ds = p * (tl.where(kept, dp, 0.0) - delta)
        p = tl.where(kept, p, 0.0)
    else:
        ds = p * (dp - delta)
    return p, dcapped(ds, x, F)


@triton.jit
def _over_rows(
    dk, dv, k_tile, v_tile, q_at, do_at, q_stride, do_stride, lse2_at, delta_at, cols, col_lo, lo, hi, M, N, bh,
    factors, slope_log2, band, rng, threshold,
    F: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the rows [lo, hi) of one head to dk and dv. All tiles are keys x rows, so that P and dS stay in registers."""
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for m in range(lo, hi, BLOCK_M):
        r = m + tl.arange(0, BLOCK_M)
        valid = r < M
        q_tile = tl.load(q_at + m * q_stride, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        do_tile = tl.load(do_at + m * do_stride, mask=valid[:, None] & (dims_v < DV)[None, :], other=0.0)
        lse2, delta = tl.load(lse2_at + r), tl.load(delta_at + r)
        qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M] fp32
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        kept = None
        if F.dropout:
            kept = keep_tile_t(rng, bh, r, col_lo, threshold, BLOCK_N)
        p, ds = _p_and_ds(
            qk, dp, r[None, :], cols[:, None], M, N, lse2[None, :], delta[None, :], kept, factors, slope_log2, band,
            F, MASKED,
        )  # fmt: skip
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attn_bwd_dkdv(
    q, k, v, dout, dk, dv, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    stats, stats_strides,  # (lse2, delta), their (batch, head) strides
    lengths,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k): pointers or None
    sizes,  # (max_q, max_k, query heads, query heads per kv head)
    band,
    factors,  # of tile/score.py, then those of dk and dv
    alibi,  # (slopes or None, batch stride)
    drop,  # (rng_state or None, threshold)
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one kv head. Grid: (key blocks, kv heads, batch)."""
    # ascending key blocks are also the longest first when causal
    block, kv_head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start_q, M = sequence(lengths[0], lengths[2], sizes[0], b)
    start_k, N = _key_sequence(lengths[1], lengths[3], lengths[4], sizes[1], b)
    col_lo = block * BLOCK_N
    if col_lo < N:
        cols, dims, dims_v = col_lo + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        k_in = (cols < N)[:, None] & (dims < D)[None, :]
        v_in = (cols < N)[:, None] & (dims_v < DV)[None, :]
        k_off = row_offsets(cols, start_k, b, k_strides) + kv_head * k_strides[2]
        v_off = row_offsets(cols, start_k, b, v_strides) + kv_head * v_strides[2]
        k_tile = tl.load(k + k_off[:, None] + dims[None, :], mask=k_in, other=0.0)
        v_tile = tl.load(v + v_off[:, None] + dims_v[None, :], mask=v_in, other=0.0)
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

        lo, hi = _row_range(col_lo, tl.minimum(col_lo + BLOCK_N, N), M, N, band, F)
        full_lo, full_hi = _full_row_range(col_lo, col_lo + BLOCK_N, M, N, band, F)
        lo = tl.multiple_of(lo // BLOCK_M * BLOCK_M, BLOCK_M)
        # Three spans: [lo, a) masked by the right edge, [a, z) where every row sees every key, [z, hi) masked by the
        # left edge. In a key block that sticks out, all rows are masked: K is 0 there, but exp2(0 - lse2) may be inf.
        a = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_M) * BLOCK_M, lo), tl.maximum(hi, lo))
        if col_lo + BLOCK_N > N:
            a = tl.maximum(hi, lo)
        z = hi
        if F.left:
            z = tl.minimum(tl.maximum(full_hi // BLOCK_M * BLOCK_M, a), tl.maximum(hi, a))

        rng, threshold = (0, 0), drop[1]
        if F.dropout:
            rng = (tl.load(drop[0]), tl.load(drop[0] + 1))
        steps = tl.arange(0, BLOCK_M).to(tl.int64)
        for g in range(sizes[3]):
            head = kv_head * sizes[3] + g
            q_at = (
                q + row_offsets(steps, start_q, b, q_strides)[:, None] + head * q_strides[2] + dims[None, :]
            )
            do_at = (
                dout
                + row_offsets(steps, start_q, b, dout_strides)[:, None]
                + head * dout_strides[2]
                + dims_v[None, :]
            )
            at = b * stats_strides[0] + head * stats_strides[1] + stats_start(lengths[0], start_q, b)
            lse2_at, delta_at = tl.multiple_of(stats[0] + at, 16), tl.multiple_of(stats[1] + at, 16)  # bytes
            slope_log2 = 0.0
            if F.alibi:
                slope_log2 = tl.load(alibi[0] + b * alibi[1] + head) * LOG2E
            for span in tl.static_range(3 if F.left else 2):
                if span == 0:
                    m0, m1 = lo, a
                elif span == 1:
                    m0, m1 = a, z
                else:
                    m0, m1 = z, hi
                dk_acc, dv_acc = _over_rows(
                    dk_acc, dv_acc, k_tile, v_tile, q_at, do_at, q_strides[1], dout_strides[1], lse2_at, delta_at,
                    cols, col_lo, m0, m1, M, N, b * sizes[2] + head, factors, slope_log2, band, rng, threshold,
                    F, span != 1, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, D, DV, PRECISION,
                )  # fmt: skip

        dk_off = row_offsets(cols, start_k, b, dk_strides) + kv_head * dk_strides[2]
        dv_off = row_offsets(cols, start_k, b, dv_strides) + kv_head * dv_strides[2]
        tl.store(
            dk + dk_off[:, None] + dims[None, :], (dk_acc * factors[2]).to(dk.dtype.element_ty), mask=k_in
        )
        tl.store(
            dv + dv_off[:, None] + dims_v[None, :], (dv_acc * factors[3]).to(dv.dtype.element_ty), mask=v_in
        )


@triton.jit
def _over_keys(
    dq, q_tile, do_tile, k_at, v_at, k_stride, v_stride, lse2, delta, r, lo, hi, M, N, bh,
    factors, slope_log2, band, rng, threshold,
    F: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys [lo, hi) to dq."""
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for n in range(lo, hi, BLOCK_N):
        c = n + tl.arange(0, BLOCK_N)
        valid = c < N
        k_tile = tl.load(k_at + n * k_stride, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        v_tile = tl.load(v_at + n * v_stride, mask=valid[:, None] & (dims_v < DV)[None, :], other=0.0)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] fp32
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        kept = None
        if F.dropout:
            kept = keep_tile(rng, bh, r, n, threshold, BLOCK_N)
        p, ds = _p_and_ds(
            qk, dp, r[:, None], c[None, :], M, N, lse2[:, None], delta[:, None], kept, factors, slope_log2, band,
            F, MASKED,
        )  # fmt: skip
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attn_bwd_dq(
    q, k, v, dout, dq, q_strides, k_strides, v_strides, dout_strides, dq_strides,
    stats, stats_strides, lengths, sizes, band, factors, alibi, drop,  # as for attn_bwd_dkdv
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dQ of BLOCK_M rows of one query head. Grid: (row blocks, query heads, batch)."""
    block, head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if F.right:  # the last rows see the most keys: longest first
        block = tl.num_programs(0) - 1 - block
    start_q, M = sequence(lengths[0], lengths[2], sizes[0], b)
    start_k, N = _key_sequence(lengths[1], lengths[3], lengths[4], sizes[1], b)
    row_lo = block * BLOCK_M
    if row_lo < M:
        r, dims, dims_v = row_lo + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        valid = r < M
        q_in = valid[:, None] & (dims < D)[None, :]
        q_off = row_offsets(r, start_q, b, q_strides) + head * q_strides[2]
        do_off = row_offsets(r, start_q, b, dout_strides) + head * dout_strides[2]
        q_tile = tl.load(q + q_off[:, None] + dims[None, :], mask=q_in, other=0.0)
        do_tile = tl.load(
            dout + do_off[:, None] + dims_v[None, :], mask=valid[:, None] & (dims_v < DV)[None, :], other=0.0
        )
        at = b * stats_strides[0] + head * stats_strides[1] + stats_start(lengths[0], start_q, b)
        lse2, delta = tl.load(stats[0] + at + r), tl.load(stats[1] + at + r)
        slope_log2 = 0.0
        if F.alibi:
            slope_log2 = tl.load(alibi[0] + b * alibi[1] + head) * LOG2E
        rng, threshold = (0, 0), drop[1]
        if F.dropout:
            rng = (tl.load(drop[0]), tl.load(drop[0] + 1))

        row_hi = tl.minimum(row_lo + BLOCK_M, M)
        lo, hi = key_range(row_lo, row_hi, M, N, band, F)
        full_lo, full_hi = full_range(row_lo, row_hi, M, N, band, F)
        lo = lo // BLOCK_N * BLOCK_N
        # three spans: [lo, a) masked by the left edge, [a, z) visible to all rows, [z, hi) masked by the right edge
        a = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, lo), tl.maximum(hi, lo))
        z = tl.minimum(tl.maximum(full_hi // BLOCK_N * BLOCK_N, a), tl.maximum(hi, a))
        kv_head = head // sizes[3]
        steps = tl.arange(0, BLOCK_N).to(tl.int64)
        k_at = k + row_offsets(steps, start_k, b, k_strides)[:, None] + kv_head * k_strides[2] + dims[None, :]
        v_at = (
            v + row_offsets(steps, start_k, b, v_strides)[:, None] + kv_head * v_strides[2] + dims_v[None, :]
        )
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for span in tl.static_range(0 if F.left else 1, 3):
            if span == 0:
                n0, n1 = lo, a
            elif span == 1:
                n0, n1 = a, z
            else:
                n0, n1 = z, hi
            acc = _over_keys(
                acc, q_tile, do_tile, k_at, v_at, k_strides[1], v_strides[1], lse2, delta, r, n0, n1, M, N,
                b * sizes[2] + head, factors, slope_log2, band, rng, threshold,
                F, span != 1, BLOCK_N, BLOCK_D, BLOCK_DV, D, DV, PRECISION,
            )  # fmt: skip
        dq_off = row_offsets(r, start_q, b, dq_strides) + head * dq_strides[2]
        tl.store(dq + dq_off[:, None] + dims[None, :], (acc * factors[2]).to(dq.dtype.element_ty), mask=q_in)
