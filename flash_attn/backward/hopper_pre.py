"""The plain Triton kernels around the Hopper backward: row statistics before it, dQ's conversion after it."""

import triton
import triton.language as tl

from flash_attn.tile.rows import packed_tile, sequence


@triton.jit
def thirds(x, ROWS: tl.constexpr):
    """(ROWS, 8) bf16: x as a sum of three, then zeros; exact, as three times 8 bits are the 24 of fp32."""
    column = tl.arange(0, 8)[None, :]
    x = x[:, None] + tl.zeros([ROWS, 8], tl.float32)
    high = x.to(tl.bfloat16).to(tl.float32)
    whole = x == high  # infinities, too, have no rest
    rest = tl.where(whole, 0.0, x) - tl.where(whole, 0.0, high)
    middle = rest.to(tl.bfloat16).to(tl.float32)
    x = tl.where(column == 0, high, tl.where(column == 1, middle, rest - middle))
    return tl.where(column < 3, x, 0.0).to(tl.bfloat16)


@triton.jit
def list_key_tiles(work_list, b, seqs, batch, slots, BLOCK_N: tl.constexpr):
    """Write the entries of sequence b's key tiles: (tile, b, first key, keys of the slot, keys, first query, queries of
    the slot, queries), int32; by sequence 0 also those that remain, as tiles without keys or queries.

    Sorted by the number of tiles from the tile to the end of its sequence, so that with a causal mask the longest
    come first, and those of a sequence in their order.
    """
    start_k, slot_k = sequence(seqs[1], None, 0, b)
    start_q, slot_q = sequence(seqs[0], None, 0, b)
    N, M = slot_k, slot_q
    if seqs[3] is not None:
        N = tl.minimum(tl.load(seqs[3] + b), slot_k)
    if seqs[2] is not None:
        M = tl.minimum(tl.load(seqs[2] + b), slot_q)
    own = (slot_k + BLOCK_N - 1) // BLOCK_N
    for first in range(0, own, 32):
        n = first + tl.arange(0, 32)
        left = own - n
        position = tl.zeros([32], tl.int32)
        for c in range(0, batch, 32):
            i = c + tl.arange(0, 32)
            k0 = tl.load(seqs[1] + i, mask=i < batch, other=0)
            k1 = tl.load(seqs[1] + i + 1, mask=i < batch, other=0)
            tiles = (k1 - k0 + BLOCK_N - 1) // BLOCK_N
            ahead = tl.maximum(tiles[:, None] - left[None, :], 0)
            ahead += ((i < b)[:, None] & (tiles[:, None] >= left[None, :])).to(tl.int32)
            position += tl.sum(ahead, 0)
        at = work_list + position * 8
        valid = n < own
        tl.store(at, n, valid)
        tl.store(at + 1, b, valid)
        tl.store(at + 2, start_k, valid)
        tl.store(at + 3, slot_k, valid)
        tl.store(at + 4, N, valid)
        tl.store(at + 5, start_q, valid)
        tl.store(at + 6, slot_q, valid)
        tl.store(at + 7, M, valid)
    if b == 0:
        total = 0
        for c in range(0, batch, 32):
            i = c + tl.arange(0, 32)
            k0 = tl.load(seqs[1] + i, mask=i < batch, other=0)
            k1 = tl.load(seqs[1] + i + 1, mask=i < batch, other=0)
            total += tl.sum((k1 - k0 + BLOCK_N - 1) // BLOCK_N, 0)
        zeros = tl.zeros([256], tl.int32)
        for first in range(total * 8, slots * 8, 256):
            i = first + tl.arange(0, 256)
            tl.store(work_list + i, zeros, i < slots * 8)


@triton.jit
def bwd_before(
    out, dout, lse, dlse, sink, stats, dq_acc, zeroed, turns, dsink,
    out_strides, dout_strides,  # (batch, seq, head)
    of_lse_strides, of_dlse_strides,  # (batch, head, row)
    seqs,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, list of key tiles), each may be None
    sizes,  # (max_q, padded query tiles, kv_heads, pairs whose sums are zeroed here, warps that zero, total_q, batch,
    # entries of the list)
    lse_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DIM_V: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Per query row: -lse * lse_scale and -delta, delta = rowsum(dout * out) - dlse; zeroes turns, and dq_acc (each
    may be None) of the first pairs: the main kernel zeroes the others as it goes (`hopper_tiles.zero_ahead`).

    Rows that must give P = 0 (past the end, or seeing no key: lse of either infinity) get -inf and delta 0, so the
    main kernel needs no query mask. With a sink, dsink gets each program's -sum exp(sink - lse) * delta.
    Grid (blocks of ROWS padded rows, heads, batch); with a list (blocks of all sequences, heads, 1).
    """
    # backwards: what the main kernel reads first is then still in L2
    i, h = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b = tl.num_programs(2) - 1 - tl.program_id(2)
    max_q, tiles, kv_heads, first_pairs, zeroing, total_q, batch, slots = sizes
    group = tl.num_programs(1) // kv_heads
    pair = b * kv_heads + h // group
    if dq_acc is not None:  # noqa: SIM102  compile time outside, run time inside
        if i == 0:
            tl.store(zeroed + pair, tl.where(pair < first_pairs, zeroing, 0))
    if seqs[4] is not None:
        if (h == 0) & (i < batch):
            list_key_tiles(seqs[4], i, seqs, batch, slots, BLOCK_N)
        SPLIT: tl.constexpr = BLOCK_M // ROWS
        b, in_sequence, start, slot, start_k, keys = packed_tile(
            seqs[0], None, batch, total_q, i // SPLIT, BLOCK_M
        )
        slot = tl.where(b < batch, slot, 0)
        i = in_sequence * SPLIT + i % SPLIT
    else:
        start, slot = sequence(seqs[0], None, max_q, b)
    used = slot
    if seqs[2] is not None:
        used = tl.minimum(tl.load(seqs[2] + b, mask=b < batch, other=0), slot)
    first = b * ((max_q + BLOCK_M - 1) // BLOCK_M)
    if seqs[0] is not None:
        first = start // BLOCK_M + b
    base = b.to(tl.int64)  # the batch stride of a packed tensor is 0
    padded = (slot + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    rows = i * ROWS + tl.arange(0, ROWS)
    loss = 0.0
    if i * ROWS < padded:
        dims = tl.arange(0, DV)
        valid = rows < used
        keep = (
            valid[:, None] & (dims < DIM_V)[None, :]
        )  # a bound known only at run time would split every load
        at_rows = (start + rows).to(tl.int64)[:, None]
        o = tl.load(
            out + base * out_strides[0] + h * out_strides[2] + at_rows * out_strides[1] + dims[None, :],
            keep,
            0.0,
        )
        do = tl.load(
            dout + base * dout_strides[0] + h * dout_strides[2] + at_rows * dout_strides[1] + dims[None, :],
            keep,
            0.0,
        )
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        at_rows = (start + rows).to(tl.int64)
        L = tl.load(
            lse + base * of_lse_strides[0] + h * of_lse_strides[1] + at_rows * of_lse_strides[2],
            valid,
            float("inf"),
        )
        if dlse is not None:
            delta -= tl.load(
                dlse + base * of_dlse_strides[0] + h * of_dlse_strides[1] + at_rows * of_dlse_strides[2],
                valid,
                0.0,
            )
        empty = tl.abs(L) == float("inf")
        delta = tl.where(empty, 0.0, delta)
        if sink is not None:
            p = tl.math.exp2((tl.load(sink + h).to(tl.float32) - L) * 1.4426950408889634)
            loss = -tl.sum(tl.where(empty, 0.0, p * delta), 0)
        block = h.to(tl.int64) * tiles + first
        # what the launcher does not know: a tile of our own buffers starts at 16 bytes
        at_stats = block * (2 * BLOCK_M) + (rows // BLOCK_M) * (2 * BLOCK_M) + rows % BLOCK_M
        minus_lse = tl.where(empty, float("-inf"), -L * lse_scale)
        if FOLD:
            at_stats = stats + (at_stats * 8)[:, None] + tl.arange(0, 8)[None, :]
            at_stats = tl.multiple_of(at_stats, [1, 8])
            tl.store(at_stats, thirds(minus_lse, ROWS), (rows < padded)[:, None])
            tl.store(at_stats + BLOCK_M * 8, thirds(-delta, ROWS), (rows < padded)[:, None])
        else:
            at_stats = tl.multiple_of(stats, 16) + at_stats
            tl.store(at_stats, minus_lse, rows < padded)
            tl.store(at_stats + BLOCK_M, -delta, rows < padded)
        if turns is not None:
            at_turns = turns + (block + rows // BLOCK_M) * 2
            starts = (rows < padded) & (rows % BLOCK_M == 0)
            tl.store(at_turns, tl.zeros([ROWS], tl.int32), starts)
            tl.store(at_turns + 1, tl.zeros([ROWS], tl.int32), starts)
        if dq_acc is not None:  # noqa: SIM102
            if pair < first_pairs:
                at_acc = tl.multiple_of(dq_acc + block * (BLOCK_M * D), 16)
                at_acc = at_acc + (rows * D)[:, None] + tl.arange(0, D)[None, :]
                tl.store(at_acc, tl.zeros([ROWS, D], tl.float32), (rows < padded)[:, None])
    if sink is not None:
        at = (h * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dsink + at, loss)


@triton.jit
def bwd_after(
    dq_acc, dq,
    dq_strides,  # (batch, seq, head)
    cu_seqlens_q,
    sizes,  # (max_q, padded query tiles, total_q, batch)
    scale,
    BLOCK_M: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """dq = scale * dq_acc, from the order of a warpgroup's accumulator [column / 8, warp, r, t, upper or lower, 2].

    Grid (pieces of 64 rows by COLS columns, D or D / 2, heads, batch); LISTED: (pieces of all sequences, heads, 1).
    """
    # backwards: what the main kernel wrote last is still in L2
    i, h = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b = tl.num_programs(2) - 1 - tl.program_id(2)
    ACROSS: tl.constexpr = D // COLS
    PIECES: tl.constexpr = BLOCK_M // 64 * ACROSS  # of a tile
    if LISTED:
        b, block, start, slot, start_k, keys = packed_tile(
            cu_seqlens_q, None, sizes[3], sizes[2], i // PIECES, BLOCK_M
        )
        slot = tl.where(b < sizes[3], slot, 0)
        i = block * PIECES + i % PIECES
    else:
        start, slot = sequence(cu_seqlens_q, None, sizes[0], b)
    first = b * ((sizes[0] + BLOCK_M - 1) // BLOCK_M)
    at = b.to(tl.int64) * dq_strides[0]
    if cu_seqlens_q is not None:
        first = start // BLOCK_M + b
        at = start.to(tl.int64) * dq_strides[1]
    row, col = (i // ACROSS) * 64, (i % ACROSS) * COLS
    if row < slot:
        piece = (h.to(tl.int64) * sizes[1] + first) * PIECES + i
        x = tl.load(tl.multiple_of(dq_acc + piece * (64 * COLS), 16) + tl.arange(0, 64 * COLS))
        x = tl.permute(tl.reshape(x, [COLS // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
        x = (tl.reshape(x, [64, COLS]) * scale).to(dq.dtype.element_ty)
        rows = row + tl.arange(0, 64)
        cols = col + tl.arange(0, COLS)
        offsets = rows.to(tl.int64)[:, None] * dq_strides[1] + cols[None, :]
        tl.store(dq + at + h * dq_strides[2] + offsets, x, (rows < slot)[:, None] & (cols < DIM)[None, :])


@triton.jit
def zero_after_end(
    dq, dk, dv, dq_strides, dk_strides, dv_strides, cu_seqlens_q, cu_seqlens_k, totals, batch,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr,
):  # fmt: skip
    """Zero the rows of packed gradients that belong to no sequence: [cu_seqlens[-1], total)."""
    dims, dims_v = tl.arange(0, PD), tl.arange(0, PDV)
    if cu_seqlens_q is not None:
        for row in range(tl.load(cu_seqlens_q + batch) + tl.program_id(0), totals[0], tl.num_programs(0)):
            for h in range(HEADS):
                at = row * dq_strides[1] + h * dq_strides[2] + dims
                tl.store(dq + at, tl.zeros([PD], dq.dtype.element_ty), dims < D)
    if cu_seqlens_k is not None:
        for row in range(tl.load(cu_seqlens_k + batch) + tl.program_id(0), totals[1], tl.num_programs(0)):
            for h in range(KV_HEADS):
                at = row * dk_strides[1] + h * dk_strides[2] + dims
                tl.store(dk + at, tl.zeros([PD], dk.dtype.element_ty), dims < D)
                at = row * dv_strides[1] + h * dv_strides[2] + dims_v
                tl.store(dv + at, tl.zeros([PDV], dv.dtype.element_ty), dims_v < DV)
