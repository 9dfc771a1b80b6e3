"""The backward kernels: attn_bwd_dq (one program per row block), then attn_bwd_dkdv (one per key block).

Neither uses atomics: every gradient is summed in a fixed order, in fp32, over the query heads of a group too, so all
of them are bitwise reproducible. The price is that the scores are computed twice (7 products instead of 5).

attn_bwd_dq has the rows of O and dO at hand, so it also makes what attn_bwd_dkdv needs to know about rows:
delta = rowsum(dO * O) - dLSE, and lse in base 2.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn.tile import dropout, mask, rows, score

sequence, packed_tile, row_offsets = rows.sequence, rows.packed_tile, rows.row_offsets
key_range, full_range, keep = mask.key_range, mask.full_range, mask.keep
row_range, full_row_range = mask.row_range, mask.full_row_range
capped, biased, dcapped = score.capped, score.biased, score.dcapped
key_order, random_pairs, dropped = dropout.key_order, dropout.random_pairs, dropout.dropped
LOG2E = score.LOG2E

# The row statistics of a packed sequence start at a multiple of this many rows and fill whole blocks, so that they
# are read without a mask; every block_m divides it.
PAD = tl.constexpr(128)


class Features(NamedTuple):
    """Compile-time switches; each is a line in `tile/`, never another kernel."""

    left: bool
    right: bool
    softcap: bool
    alibi: bool
    dropout: bool
    halves: bool  # `tile.dropout.by_halves`


class Tiling(NamedTuple):
    """How a program is cut, and what it cuts; compile-time."""

    block_m: int
    block_n: int
    D: int  # head dim of q and k
    DV: int  # of v and out
    d1: int  # columns of the first tile that covers D
    d2: int  # and of the second; 0: there is none
    v1: int  # the same for DV
    v2: int
    rows_first: (
        bool  # dkdv holds S as rows x keys and gradients as dims x keys; otherwise S^T, and keys x dims
    )
    precision: str  # of products of fp32: "ieee", "tf32" or "tf32x3"
    pipelined: bool  # Triton loads tiles ahead of the products: more than one stage
    one_loop: bool  # over all tiles, asking each whether it needs the mask; otherwise a loop for each kind


@triton.jit
def _locate(
    cu_seqlens, cu_others, pid, blocks, heads, batch, max_len, max_other, total,
    REVERSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where program `pid` works: (head, sequence, block in it, first row, rows it owns, rows in use, first row and
    length of the other side).

    The blocks of a head come one after the other, from the last if REVERSED. The rows behind the last packed sequence
    are owned by it too (they want zeros), none of them in use.
    """
    block, pid = pid % blocks, pid // blocks
    if REVERSED:
        block = blocks - 1 - block
    if cu_seqlens is None:
        head, b = pid % heads, pid // heads
        start, owned = 0, max_len
        used = owned
        other, other_len = sequence(cu_others, None, max_other, b)
    else:
        head = pid
        b, block, start, owned, other, other_len = packed_tile(
            cu_seqlens, cu_others, batch, total, block, BLOCK
        )
        used = tl.where(b < batch, owned, 0)
        b = tl.minimum(b, batch - 1)
        if cu_others is None:
            other_len = max_other
    return head.to(tl.int64), b.to(tl.int64), block, start, owned, used, other, other_len


@triton.jit
def _stats_start(cu_seqlens, start, b):
    """First row of sequence `b` in the statistics; `start` is its first row in q."""
    if cu_seqlens is not None:
        return (start + b * PAD) // PAD * PAD
    else:
        return 0


@triton.jit
def _used_keys(start, owned, N, seqused, leftpad, b):
    """(first row, rows to write, keys in use) of a sequence; key 0 is the row at leftpad."""
    if seqused is not None:
        N = tl.minimum(N, tl.load(seqused + b))
    if leftpad is not None:
        pad = tl.load(leftpad + b)
        start, owned, N = start + pad, owned - pad, tl.maximum(N - pad, 0)
    return start, owned, N


@triton.jit
def _load(base, row_offsets, valid, D: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """Rows of D columns as tiles of C1 and C2 columns (powers of two); 0 where there is nothing.

    Where one tile is enough, C2 is 0 and the first stands in for it. Memory that is not valid may hold NaN.
    Two tiles of 128 share their row addresses, of which one of 256 has twice as many to keep in registers.
    """
    dims = tl.arange(0, C1)
    at = base + row_offsets[:, None] + dims[None, :]
    if C1 <= D:
        first = tl.load(at, mask=valid[:, None], other=0.0)
    else:
        first = tl.load(at, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    second = first
    if C2 > 0:
        dims2 = tl.arange(0, C2)
        at2 = base + row_offsets[:, None] + (C1 + dims2)[None, :]
        if C1 + C2 <= D:
            second = tl.load(at2, mask=valid[:, None], other=0.0)
        else:
            second = tl.load(at2, mask=valid[:, None] & (dims2 < D - C1)[None, :], other=0.0)
    return first, second


@triton.jit
def _zeros(ROWS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Two accumulators of C1 and C2 columns; where there is no second one, as small as a tile can be."""
    if TRANSPOSED:
        return tl.zeros([C1, ROWS], tl.float32), tl.zeros([C2 if C2 > 0 else 16, ROWS], tl.float32)
    else:
        return tl.zeros([ROWS, C1], tl.float32), tl.zeros([ROWS, C2 if C2 > 0 else 16], tl.float32)


@triton.jit
def _inner(a, b, C2: tl.constexpr, T: tl.constexpr):
    """a b^T over all columns, [rows of a, rows of b] fp32."""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision=T.precision)
    if C2 > 0:
        x = tl.dot(a[1], tl.trans(b[1]), x, input_precision=T.precision)
    return x


@triton.jit
def _p_and_ds(qk, dp, r, c, M, N, lse2, delta, pairs, threshold, factors, slope, band, edge, F: tl.constexpr):
    """(P, dS) of a tile, either way round: r, lse2 and delta broadcast along keys, c along rows.

    The mask is applied where `edge`, which is the same for all threads (known at compile time in a loop over one kind
    of tile).
    Both lack the factor 1 / (1 - dropout_p) and dS the factor `scale`; whole gradients get them at the end.
    """
    x = capped(qk, factors[0], F)
    s = biased(x, factors[1], r, c, M, N, slope, F)
    p = tl.math.exp2(s - lse2)
    if edge:
        p = tl.where(keep(r, c, M, N, band, F), p, 0.0)
    if F.dropout:
        dp = dropped(dp, pairs, threshold, F)
    return p, dcapped(p * (dp - delta), x, F)


@triton.jit
def _plus(acc, w, b, C2: tl.constexpr, T: tl.constexpr):
    """acc + w b for both tiles of b; w is rounded to b's dtype."""
    w = w.to(b[0].dtype)
    first, second = tl.dot(w, b[0], acc[0], input_precision=T.precision), acc[1]
    if C2 > 0:
        second = tl.dot(w, b[1], acc[1], input_precision=T.precision)
    return first, second


@triton.jit
def _plus_transposed(acc, w, b, C2: tl.constexpr, T: tl.constexpr):
    """acc + b^T w for both tiles of b."""
    w = w.to(b[0].dtype)
    first, second = tl.dot(tl.trans(b[0]), w, acc[0], input_precision=T.precision), acc[1]
    if C2 > 0:
        second = tl.dot(tl.trans(b[1]), w, acc[1], input_precision=T.precision)
    return first, second


@triton.jit
def _store(
    base,
    row_offsets,
    valid,
    acc,
    factor,
    D: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Write factor * acc, two tiles [rows, columns] (or [columns, rows]) as `_load` makes them."""
    for part in tl.static_range(2 if C2 > 0 else 1):
        dims = part * C1 + tl.arange(0, C2 if part == 1 else C1)
        x = (acc[part] * factor).to(base.dtype.element_ty)
        if TRANSPOSED:
            tl.store(
                base + row_offsets[None, :] + dims[:, None], x, mask=valid[None, :] & (dims < D)[:, None]
            )
        else:
            tl.store(
                base + row_offsets[:, None] + dims[None, :], x, mask=valid[:, None] & (dims < D)[None, :]
            )


@triton.jit
def _over_rows(
    dk, dv, k_tile, v_tile, q, do, q_rows, do_rows, q_stride, do_stride, lse2_at, delta_at, own, where, c, col_lo,
    span, M, N, bh, factors, slope, band, rng, threshold, F: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add the rows [span[0], span[3]) of one head to dk and dv; [span[1], span[2]) see all keys of the block.

    where: (first row, head, sequence); `own` as for attn_bwd_dkdv.

    KIND 0: both sorts of tiles, with a uniform branch; 1: all of them need the mask; 2: none does.

    Transposed, S^T, P^T and dS^T stay in registers, and the products that use them run while the next tile is
    prepared. A thread holds lse and delta of many rows then, so each is loaded only where it is used. With rows first
    P and dS go through shared memory, but lse and delta take one register per row of a thread, and the head dim is
    the long side of the products: it fills two warp groups where 64 keys do not. There, without a pipeline, offsets
    are made of 64-bit rows, which are computed again in each step where `q_rows` would stay in registers (and spill).
    """
    for m in range(span[0], span[3], T.block_m):
        r = m + tl.arange(0, T.block_m)
        if T.rows_first and not T.pipelined:
            q_tile = _load(q, r.to(tl.int64) * q_stride, r < M, T.D, T.d1, T.d2)
            do_tile = _load(do, r.to(tl.int64) * do_stride, r < M, T.DV, T.v1, T.v2)
        else:
            q_tile = _load(q + m * q_stride, q_rows, r < M, T.D, T.d1, T.d2)
            do_tile = _load(do + m * do_stride, do_rows, r < M, T.DV, T.v1, T.v2)
        late: tl.constexpr = lse2_at is not None and T.pipelined and not T.rows_first
        if lse2_at is not None and not late:
            lse2, delta = tl.load(lse2_at + r), tl.load(delta_at + r)
        elif lse2_at is None:
            out = own[0] + where[1] * own[1][2]
            lse2, delta = _statistics(
                out, do_tile, own[1], own[2], own[3], own[4], where[0], where[1], where[2], r, M, T
            )  # fmt: skip
            delta *= own[5]
        edge, pairs = KIND == 1, None
        if KIND == 0:
            edge = (m < span[1]) | (m >= span[2])
        if T.rows_first:
            qk, dp = (
                _inner(q_tile, k_tile, T.d2, T),
                _inner(do_tile, v_tile, T.v2, T),
            )  # [block_m, block_n] fp32
            if F.dropout:
                pairs = random_pairs(rng, bh, r, col_lo, T.block_n, F)
            p, ds = _p_and_ds(
                qk, dp, r[:, None], c[None, :], M, N, lse2[:, None], delta[:, None], pairs, threshold, factors, slope,
                band, edge, F,
            )  # fmt: skip
            if F.dropout:
                p = dropped(p.to(do_tile[0].dtype), pairs, threshold, F)
            if not T.pipelined:  # both stored before either product
                p, ds = p.to(do_tile[0].dtype), ds.to(q_tile[0].dtype)
            dv = _plus_transposed(dv, p, do_tile, T.v2, T)
            dk = _plus_transposed(dk, ds, q_tile, T.d2, T)
        else:
            qk = _inner(k_tile, q_tile, T.d2, T)  # [block_n, block_m] fp32
            if late:
                lse2 = tl.load(lse2_at + r)
            dp = _inner(v_tile, do_tile, T.v2, T)
            if late:
                delta = tl.load(delta_at + r)
            p, ds = _p_and_ds(
                qk, dp, r[None, :], c[:, None], M, N, lse2[None, :], delta[None, :], pairs, threshold, factors, slope,
                band, edge, F,
            )  # fmt: skip
            dv = _plus(dv, p, do_tile, T.v2, T)
            dk = _plus(dk, ds, q_tile, T.d2, T)
    return dk, dv


@triton.jit
def attn_bwd_dkdv(
    q, k, v, dout, dk, dv, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    stats, stats_strides,  # (lse2, delta), their (batch, head) strides
    own,  # (out, its strides, lse, dlse, lse_strides, keep_share) of attn_bwd_dq to make statistics of; else None
    lengths,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k): pointers or None
    sizes,  # (max_q, max_k, query heads per kv head, query heads, batch, blocks, rows of a packed k)
    band,
    factors,  # of tile/score.py, then those of dk and dv
    alibi,  # (slopes or None, batch stride)
    drop,  # (rng_state or None, threshold)
    F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of block_n keys of one kv head. Grid: blocks * kv heads * batch, blocks fastest.

    Ascending key blocks are also the longest first when causal.
    """
    BLOCK_M: tl.constexpr = T.block_m
    BLOCK_N: tl.constexpr = T.block_n
    kv_heads = sizes[3] // sizes[2]
    kv_head, b, block, start_k, owned, N, start_q, M = _locate(
        lengths[1], lengths[0], tl.program_id(0), sizes[5], kv_heads, sizes[4], sizes[1], sizes[0], sizes[6],
        False, BLOCK_N,
    )  # fmt: skip
    col_lo = block * BLOCK_N
    if col_lo < owned:
        if lengths[2] is not None:
            M = tl.load(lengths[2] + b)
        start_k, owned, N = _used_keys(start_k, owned, N, lengths[3], lengths[4], b)
        c = col_lo + key_order(BLOCK_N, F)
        k_rows, v_rows = row_offsets(c, start_k, b, k_strides), row_offsets(c, start_k, b, v_strides)
        k_tile = _load(k + kv_head * k_strides[2], k_rows, c < N, T.D, T.d1, T.d2)
        v_tile = _load(v + kv_head * v_strides[2], v_rows, c < N, T.DV, T.v1, T.v2)
        dk_acc = _zeros(BLOCK_N, T.d1, T.d2, T.rows_first)
        dv_acc = _zeros(BLOCK_N, T.v1, T.v2, T.rows_first)

        lo, hi = row_range(col_lo, tl.minimum(col_lo + BLOCK_N, N), M, N, band, F)
        full_lo, full_hi = full_row_range(col_lo, col_lo + BLOCK_N, M, N, band, F)
        lo = tl.multiple_of(lo // BLOCK_M * BLOCK_M, BLOCK_M)
        hi = tl.where(col_lo < N, hi, 0)  # keys that nobody uses get zeros
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
        # offsets inside a tile have 32 bits (launch.py sees to it): addresses are what runs out of registers
        steps = tl.arange(0, BLOCK_M)
        q_rows, do_rows = steps * q_strides[1].to(tl.int32), steps * dout_strides[1].to(tl.int32)
        for g in range(sizes[2]):
            head = kv_head * sizes[2] + g
            q_at = q + b * q_strides[0] + start_q * q_strides[1] + head * q_strides[2]
            do_at = dout + b * dout_strides[0] + start_q * dout_strides[1] + head * dout_strides[2]
            if stats is not None:
                at = b * stats_strides[0] + head * stats_strides[1] + _stats_start(lengths[0], start_q, b)
                lse2_at, delta_at = stats[0] + at, stats[1] + at
                lse2_at, delta_at = tl.multiple_of(lse2_at, 16), tl.multiple_of(delta_at, 16)  # bytes
            else:
                lse2_at, delta_at = None, None
            slope = 0.0
            if F.alibi:
                slope = tl.load(alibi[0] + b * alibi[1] + head) * LOG2E
            # One loop fills its pipeline once, which pays where it is short; two have no branch in the interior.
            for part in tl.static_range(1 if T.one_loop else 2):
                span = (lo, a, z, hi)
                if not T.one_loop:
                    span = (lo, a, a, a) if part == 0 else (a, a, hi, hi)
                dk_acc, dv_acc = _over_rows(
                    dk_acc, dv_acc, k_tile, v_tile, q_at, do_at, q_rows, do_rows, q_strides[1], dout_strides[1],
                    lse2_at, delta_at, own, (start_q, head, b), c, col_lo, span, M, N, b * sizes[3] + head, factors,
                    slope, band, rng, threshold, F, 0 if T.one_loop else part + 1, T,
                )  # fmt: skip

        dk_rows, dv_rows = row_offsets(c, start_k, b, dk_strides), row_offsets(c, start_k, b, dv_strides)
        dk += kv_head * dk_strides[2]
        dv += kv_head * dv_strides[2]
        _store(dk, dk_rows, c < owned, dk_acc, factors[2], T.D, T.d1, T.d2, T.rows_first)
        _store(dv, dv_rows, c < owned, dv_acc, factors[3], T.DV, T.v1, T.v2, T.rows_first)


@triton.jit
def _over_keys(
    dq, q_tile, do_tile, k, v, k_rows, v_rows, k_stride, v_stride, lse2, delta, r, span, M, N, bh,
    factors, slope, band, rng, threshold, F: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add the keys [span[0], span[3]) to dq; all rows see those of [span[1], span[2])."""
    for n in range(span[0], span[3], T.block_n):
        c = n + key_order(T.block_n, F)
        k_tile = _load(k + n * k_stride, k_rows, c < N, T.D, T.d1, T.d2)
        v_tile = _load(v + n * v_stride, v_rows, c < N, T.DV, T.v1, T.v2)
        qk = _inner(q_tile, k_tile, T.d2, T)  # [block_m, block_n] fp32
        dp = _inner(do_tile, v_tile, T.v2, T)
        edge, pairs = KIND == 1, None
        if KIND == 0:
            edge = (n < span[1]) | (n >= span[2])
        if F.dropout:
            pairs = random_pairs(rng, bh, r, n, T.block_n, F)
        p, ds = _p_and_ds(
            qk, dp, r[:, None], c[None, :], M, N, lse2[:, None], delta[:, None], pairs, threshold, factors, slope, band,
            edge, F,
        )  # fmt: skip
        dq = _plus(dq, ds, k_tile, T.d2, T)
    return dq


@triton.jit
def _statistics(out, do_tile, out_strides, lse, dlse, lse_strides, start, head, b, r, M, T: tl.constexpr):
    """(lse in base 2, rowsum(dO * O) - dLSE) of rows r.

    lse2 is +inf in a row that sees no key, whichever infinity came, and behind the last row: exp2(s - inf) = 0.
    """
    o_tile = _load(out, row_offsets(r, start, b, out_strides), r < M, T.DV, T.v1, T.v2)
    delta = tl.sum(o_tile[0].to(tl.float32) * do_tile[0].to(tl.float32), 1)
    if T.v2 > 0:
        delta += tl.sum(o_tile[1].to(tl.float32) * do_tile[1].to(tl.float32), 1)
    row = (start + r).to(tl.int64)
    at = b * lse_strides[0][0] + head * lse_strides[0][1] + row * lse_strides[0][2]
    lse2 = tl.load(lse + at, mask=r < M, other=float("inf")) * LOG2E
    if dlse is not None:
        at = b * lse_strides[1][0] + head * lse_strides[1][1] + row * lse_strides[1][2]
        delta -= tl.load(dlse + at, mask=r < M, other=0.0)
    return tl.where(lse2 == float("-inf"), float("inf"), lse2), delta


@triton.jit
def attn_bwd_dq(
    q, k, v, out, dout, dq, q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides,
    lse, dlse, lse_strides,  # natural log; dlse may be None; ((batch, head, row) strides of each)
    sink, dsink,  # (H,) logits or None; room for one partial sum per program
    keep_share,  # 1 - dropout_p
    stats, stats_strides, lengths,  # stats may be None
    sizes,  # (max_q, max_k, query heads per kv head, query heads, batch, blocks, rows of a packed q)
    band, factors, alibi, drop,  # as for attn_bwd_dkdv
    F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program: dQ of block_m rows of one query head. Grid: blocks * query heads * batch, blocks fastest."""
    BLOCK_M: tl.constexpr = T.block_m
    BLOCK_N: tl.constexpr = T.block_n
    # the last rows see the most keys: longest first
    head, b, block, start_q, owned, M, start_k, N = _locate(
        lengths[0], lengths[1], tl.program_id(0), sizes[5], sizes[3], sizes[4], sizes[0], sizes[1], sizes[6],
        F.right, BLOCK_M,
    )  # fmt: skip
    row_lo = block * BLOCK_M
    if row_lo < owned:
        if lengths[2] is not None:
            M = tl.minimum(M, tl.load(lengths[2] + b))
        start_k, _, N = _used_keys(start_k, N, N, lengths[3], lengths[4], b)
        r = row_lo + tl.arange(0, BLOCK_M)
        q_rows, do_rows = row_offsets(r, start_q, b, q_strides), row_offsets(r, start_q, b, dout_strides)
        q_tile = _load(q + head * q_strides[2], q_rows, r < M, T.D, T.d1, T.d2)
        do_tile = _load(dout + head * dout_strides[2], do_rows, r < M, T.DV, T.v1, T.v2)
        lse2, delta = _statistics(
            out + head * out_strides[2],
            do_tile,
            out_strides,
            lse,
            dlse,
            lse_strides,
            start_q,
            head,
            b,
            r,
            M,
            T,
        )
        if row_lo < M:
            if sink is not None:
                share = tl.math.exp2(tl.load(sink + head).to(tl.float32) * LOG2E - lse2)
                tl.store(dsink + tl.program_id(0), -tl.sum(share * delta, 0))
            delta *= keep_share  # the other factors of dropout are applied to whole gradients at the end
            if stats is not None:
                at = b * stats_strides[0] + head * stats_strides[1] + _stats_start(lengths[0], start_q, b)
                tl.store(stats[0] + at + r, lse2)
                tl.store(stats[1] + at + r, delta)
        slope = 0.0
        if F.alibi:
            slope = tl.load(alibi[0] + b * alibi[1] + head) * LOG2E
        rng, threshold = (0, 0), drop[1]
        if F.dropout:
            rng = (tl.load(drop[0]), tl.load(drop[0] + 1))

        row_hi = tl.minimum(row_lo + BLOCK_M, M)
        lo, hi = key_range(row_lo, row_hi, M, N, band, F)
        full_lo, full_hi = full_range(row_lo, row_hi, M, N, band, F)
        lo = lo // BLOCK_N * BLOCK_N
        hi = tl.where(row_lo < M, hi, 0)  # rows that nobody uses get zeros
        # three spans: [lo, a) masked by the left edge, [a, z) visible to all rows, [z, hi) masked by the right edge
        a = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, lo), tl.maximum(hi, lo))
        z = tl.minimum(tl.maximum(full_hi // BLOCK_N * BLOCK_N, a), tl.maximum(hi, a))
        kv_head = head // sizes[2]
        steps = key_order(BLOCK_N, F)
        k_rows, v_rows = steps * k_strides[1].to(tl.int32), steps * v_strides[1].to(tl.int32)
        k_at = k + b * k_strides[0] + start_k * k_strides[1] + kv_head * k_strides[2]
        v_at = v + b * v_strides[0] + start_k * v_strides[1] + kv_head * v_strides[2]
        acc = _zeros(BLOCK_M, T.d1, T.d2, False)
        for part in tl.static_range(1 if T.one_loop else 2):  # as in attn_bwd_dkdv
            span = (lo, a, z, hi)
            if not T.one_loop:
                span = (a, a, z, z) if part == 0 else (z, z, z, hi)
            acc = _over_keys(
                acc, q_tile, do_tile, k_at, v_at, k_rows, v_rows, k_strides[1], v_strides[1], lse2, delta, r,
                span, M, N, b * sizes[3] + head, factors, slope, band, rng, threshold,
                F, 0 if T.one_loop else 2 - part, T,
            )  # fmt: skip
        dq_rows = row_offsets(r, start_q, b, dq_strides)
        _store(dq + head * dq_strides[2], dq_rows, r < owned, acc, factors[2], T.D, T.d1, T.d2, False)
