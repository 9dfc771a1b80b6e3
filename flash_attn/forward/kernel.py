"""The forward kernel: dense, packed and paged storage; any band mask; soft cap, ALiBi, dropout, sink; grouped heads."""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn.tile import dropout, mask, rows, score, softmax

sequence, packed_tile, row_offsets, key_offsets = (
    rows.sequence,
    rows.packed_tile,
    rows.row_offsets,
    rows.key_offsets,
)
load_rows = rows.load
key_range, full_range, keep = mask.key_range, mask.full_range, mask.keep
capped, biased, score_pivot = score.capped, score.biased, score.pivot
key_order, random_pairs, dropped = dropout.key_order, dropout.random_pairs, dropout.dropped
update, finish, exp2_mixed = softmax.update, softmax.finish, softmax.exp2_mixed
LOG2E = score.LOG2E


class Features(NamedTuple):
    """Compile-time switches; each is a line in `tile/`, never another kernel."""

    left: bool
    right: bool
    softcap: bool
    alibi: bool
    dropout: bool
    halves: bool  # `tile.dropout.by_halves`
    bounded: bool  # `tile.score.bounded`
    positive: bool  # the factor that turns scores into logits is above 0, so it commutes with the maximum
    fast_tanh: bool  # one instruction, for inputs of 16 bits
    page_tiles: bool  # a tile of keys never crosses a page
    precision: str  # of products of fp32: "ieee" or "tf32"


@triton.jit
def _over_keys(
    acc, acc2, m, l, q_tile, q_tile2, q_rows, k, v, k_rows, v_rows, k_strides, v_strides, start_k, b_k,
    lo, hi, full_lo, full_hi, M, N, paging, band, factors, slope, rng, bh, threshold,
    F: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr,
):  # fmt: skip
    """Fold keys [lo, hi) into (acc, m, l); unless MASKED, all of them are inside [full_lo, full_hi) and exist."""
    dims, dims2 = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_D2)
    dims_v, dims_v2 = tl.arange(0, BLOCK_DV), BLOCK_DV + tl.arange(0, BLOCK_DV2)
    for n in range(lo, hi, BLOCK_N):
        cols = n + key_order(BLOCK_N, F)
        valid = cols < N
        if paging[0] is None:
            k_off = n * k_strides[1] + k_rows
            v_off = n * v_strides[1] + v_rows
        elif F.page_tiles:
            page = tl.load(paging[0] + b_k * paging[1] + n // paging[2]).to(tl.int64)
            slot = n % paging[2]
            k_off = page * k_strides[0] + slot * k_strides[1] + k_rows
            v_off = page * v_strides[0] + slot * v_strides[1] + v_rows
        else:
            k_off = key_offsets(cols, valid, start_k, b_k, k_strides, paging)
            v_off = key_offsets(cols, valid, start_k, b_k, v_strides, paging)
        k_tile = load_rows(k, k_off, valid, dims, D, BLOCK_D <= D, MASKED)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N] fp32
        if D > BLOCK_D:
            k_tile2 = load_rows(k, k_off, valid, dims2, D, BLOCK_D + BLOCK_D2 <= D, MASKED)
            x = tl.dot(q_tile2, tl.trans(k_tile2), x, input_precision=F.precision)
        x = capped(x, factors[0], F, F.fast_tanh)
        outer = factors[1]
        if F.alibi or not F.positive:
            x = biased(x, outer, q_rows[:, None], cols[None, :], M, N, slope, F)
            outer = 1.0
        # the outer condition on a mask folds at compile time, the inner is a uniform branch
        if F.bounded:
            p = exp2_mixed(x, outer, score_pivot(outer), F.fast_tanh)
            if MASKED:  # noqa: SIM102
                if (n < full_lo) | (n + BLOCK_N > full_hi):
                    p = tl.where(keep(q_rows[:, None], cols[None, :], M, N, band, F), p, 0.0)
            l += tl.sum(p, 1)
        else:
            if MASKED:  # noqa: SIM102
                if (n < full_lo) | (n + BLOCK_N > full_hi):
                    x = tl.where(keep(q_rows[:, None], cols[None, :], M, N, band, F), x, float("-inf"))
            m, l, p, rescale = update(m, l, x, outer, MASKED)
            acc *= rescale[:, None]
            if DV > BLOCK_DV:
                acc2 *= rescale[:, None]
        p = p.to(v.dtype.element_ty)
        if F.dropout:
            p = dropped(p, random_pairs(rng, bh, q_rows, n, BLOCK_N, F), threshold, F)
        v_tile = load_rows(v, v_off, valid, dims_v, DV, BLOCK_DV <= DV, MASKED)
        acc = tl.dot(p, v_tile, acc, input_precision=F.precision)
        if DV > BLOCK_DV:
            v_tile2 = load_rows(v, v_off, valid, dims_v2, DV, BLOCK_DV + BLOCK_DV2 <= DV, MASKED)
            acc2 = tl.dot(p, v_tile2, acc2, input_precision=F.precision)
    return acc, acc2, m, l


@triton.jit
def _locate(lengths, sizes, BLOCK_M: tl.constexpr):
    """(sequence, head, block, first query row, valid rows, rows, first key row, keys) of this program."""
    pid = tl.program_id(0)
    heads, batch, blocks, section = sizes[3], sizes[4], sizes[5], sizes[6]
    # Heads go in sections whose keys and values fit the L2 cache; in a section the last blocks of all heads, which see
    # most keys when causal, start first.
    first = pid // (section * blocks) * section
    packed: tl.constexpr = lengths[0] is not None
    width = tl.minimum(section, (heads if packed else heads * batch) - first)
    within = pid - first * blocks
    block = blocks - 1 - within // width
    bh = first + within % width
    if packed:
        head = bh
        b, block, start_q, owned, start_k, N = packed_tile(
            lengths[0], lengths[1], batch, sizes[7], block, BLOCK_M
        )
        # rows behind the last sequence are nobody's: they get zeros as rows beyond seqused_q do
        M = tl.where(b < batch, owned, 0)
        b = tl.minimum(b, batch - 1)
        if lengths[2] is not None:
            M = tl.minimum(M, tl.load(lengths[2] + b))
    else:
        b, head = bh // heads, bh % heads
        start_q, owned = 0, sizes[0]
        _, M = sequence(None, lengths[2], sizes[0], b)
    if packed and lengths[1] is not None:
        if lengths[3] is not None:
            N = tl.load(lengths[3] + b)
    else:
        start_k, N = sequence(lengths[1], lengths[3], sizes[1], b)
    if lengths[4] is not None:
        leftpad = tl.load(lengths[4] + b)
        start_k += leftpad
        N -= leftpad
    return b, head, block, start_q, M, owned, start_k, N


@triton.jit
def attn_fwd(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides,
    lengths,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, cache_batch_idx): pointers or None
    paging,  # (block_table or None, its row stride, page size)
    sizes,  # (max_q, max_k, query heads per kv head, heads, batch, blocks of rows, heads of a section, total_q)
    band, factors, alibi_slopes, alibi_stride_b, sink,
    rng_state, threshold, rescale,  # dropout: (seed, offset), dropped values of 32768, 1 / (1 - p)
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M query rows of one head.

    D (of q and k) and DV (of v and out) are covered by a tile of BLOCK_D and, when that is not enough, a second one of
    BLOCK_D2 (powers of two). Rows of `out` that see no key become 0 and their `lse` -inf (or the sink).
    """
    b, head, block, start_q, M, owned, start_k, N = _locate(lengths, sizes, BLOCK_M)
    row_lo = block * BLOCK_M
    if row_lo < owned:
        b_k = b
        if lengths[5] is not None:
            b_k = tl.load(lengths[5] + b)
        row_hi = tl.minimum(row_lo + BLOCK_M, M)
        q_rows = row_lo + tl.arange(0, BLOCK_M)
        valid_q = q_rows < M
        dims, dims2 = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_D2)
        q_off = row_offsets(q_rows, start_q, b, q_strides)
        q += head * q_strides[2]
        q_tile = load_rows(q, q_off, valid_q, dims, D, BLOCK_D <= D, True)
        q_tile2 = q_tile
        if D > BLOCK_D:
            q_tile2 = load_rows(q, q_off, valid_q, dims2, D, BLOCK_D + BLOCK_D2 <= D, True)
        slope = 0.0
        if F.alibi:
            slope = tl.load(alibi_slopes + b * alibi_stride_b + head) * LOG2E
        rng = (0, 0)
        if F.dropout:
            rng = (tl.load(rng_state), tl.load(rng_state + 1))

        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        acc2 = tl.zeros([BLOCK_M, BLOCK_DV2], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if F.bounded:
            m = tl.zeros([BLOCK_M], tl.float32) + score_pivot(factors[1])
        l = tl.zeros([BLOCK_M], tl.float32)
        if sink is not None:  # a key without a value
            m = l + tl.load(sink + head).to(tl.float32) * LOG2E
            l += 1.0
        lo, hi = key_range(row_lo, row_hi, M, N, band, F)
        hi = tl.where(row_lo < M, hi, 0)
        lo = lo // BLOCK_N * BLOCK_N
        full_lo, full_hi = full_range(row_lo, row_hi, M, N, band, F)
        kv_head = head // sizes[2]
        k += kv_head * k_strides[2]
        v += kv_head * v_strides[2]
        # the part of the offsets of a tile of keys that the loop does not change
        in_tile = key_order(BLOCK_N, F)
        if paging[0] is None:
            k_rows = row_offsets(in_tile, start_k, b_k, k_strides)
            v_rows = row_offsets(in_tile, start_k, b_k, v_strides)
        else:
            k_rows, v_rows = in_tile * k_strides[1], in_tile * v_strides[1]
        # One loop tests every tile for the mask. SPLIT: a loop without a test up to `mid`, then one with; the second
        # fills the pipeline of loads anew, which pays where the first is long.
        mid = lo
        if SPLIT:
            mid = tl.minimum(tl.maximum(full_hi // BLOCK_N * BLOCK_N, lo), tl.maximum(hi, lo))
        for edge in tl.static_range(0 if SPLIT else 1, 2):
            acc, acc2, m, l = _over_keys(
                acc, acc2, m, l, q_tile, q_tile2, q_rows, k, v, k_rows, v_rows, k_strides, v_strides, start_k, b_k,
                mid if edge else lo, hi if edge else mid, full_lo, full_hi, M, N, paging, band, factors, slope, rng,
                b * sizes[3] + head, threshold,
                F, edge == 1 or F.left, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2,
            )  # fmt: skip

        inv, row_lse = finish(m, l)
        inv = tl.where(valid_q, inv, 0.0) * rescale
        row_lse = tl.where(valid_q, row_lse, float("-inf"))
        stored = q_rows < owned
        at = out + head * out_strides[2] + row_offsets(q_rows, start_q, b, out_strides)[:, None]
        dims_v, dims_v2 = tl.arange(0, BLOCK_DV), BLOCK_DV + tl.arange(0, BLOCK_DV2)
        tl.store(
            at + dims_v[None, :], (acc * inv[:, None]).to(out.dtype.element_ty),
            mask=stored[:, None] & (dims_v[None, :] < DV),
        )  # fmt: skip
        if DV > BLOCK_DV:
            tl.store(
                at + dims_v2[None, :], (acc2 * inv[:, None]).to(out.dtype.element_ty),
                mask=stored[:, None] & (dims_v2[None, :] < DV),
            )  # fmt: skip
        lse += b.to(tl.int64) * lse_strides[0] + head * lse_strides[1] + start_q
        tl.store(lse + q_rows, row_lse, mask=stored)
