"""Which tile a program of the Hopper backward works on, what loads it, and how dQ leaves: shared by both schedules.

A program owns one tile of keys of one (batch, key/value head) and walks over the query tiles that see it, for every
query head of the group, so dK and dV never leave its registers until they are final. dQ is summed over programs in
fp32, in the order in which a warpgroup's accumulator lies in its threads (`hopper_ops.fragments`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flash_attn.backward.hopper_ops import bulk_wait_all, count_up, fence_gpu, spin_until
from flash_attn.tile.hopper import barrier_sync, tma_load, tma_reduce_add, tma_rows
from flash_attn.tile.rows import sequence

# Hardware named barriers. 288 threads: the producer warp and both warpgroups; 256: both warpgroups; 128: one.
BAR_Q: gl.constexpr = gl.constexpr(12)  # + stage: Q (and the row statistics) may be overwritten
BAR_DO: gl.constexpr = gl.constexpr(14)  # + stage: dO may be overwritten
BAR_DS: gl.constexpr = gl.constexpr(11)  # both warpgroups have written their part
BAR_DQ: gl.constexpr = gl.constexpr(7)  # + warpgroup: its piece of dQ waits for the writer warp (160 threads)


@gluon.jit
def place(program, seqs, sizes, F: gl.constexpr, T: gl.constexpr):
    """(key tile, kv head, query side, key side) of a program. A pair is a (batch, kv head).

    A side is (batch, first row, rows of the sequence's slot, valid rows); the query side ends with its first padded
    query tile. Inside a group of `width` pairs the key tiles ascend, so that with a causal mask the longest come first
    while the group's Q and dO stay in L2; in an ordered sum they descend then (see `turn_of`).
    """
    cu_q, cu_k, used_q, used_k = seqs
    max_q, max_k, heads, kv_heads, pairs, width, key_tiles, query_tiles = sizes
    group = key_tiles * width
    g = program // group
    r = program - g * group
    wide = gl.minimum(width, pairs - g * width)
    n = r // wide
    pair = g * width + (r - n * wide)
    if T.ORDERED and F.right:
        n = key_tiles - 1 - n
    b = pair // kv_heads
    row_q, slot_q = sequence(cu_q, None, max_q, b)
    row_k, slot_k = sequence(cu_k, None, max_k, b)
    M, N = slot_q, slot_k
    if used_q is not None:
        M = gl.minimum(gl.load(used_q + b), slot_q)
    if used_k is not None:
        N = gl.minimum(gl.load(used_k + b), slot_k)
    tile0 = b * ((max_q + T.BLOCK_M - 1) // T.BLOCK_M)
    if cu_q is not None:
        # sequence b starts at a padded tile of its own: floor(start / BLOCK_M) + b leaves room for every tail
        tile0 = row_q // T.BLOCK_M + b
    return n, pair - b * kv_heads, (b, row_q, slot_q, M, tile0), (b, row_k, slot_k, N)


@gluon.jit
def box(side, h, row, length, unit, RAGGED: gl.constexpr):
    """TMA coordinates of a tile that starts at `row` of the side's sequence and is clipped at `length`.

    `unit` is (batch stride, row stride) in 16 bytes, for ragged descriptors only.
    """
    end = 0
    if RAGGED:
        end = side[0] * unit[0] + (side[1] + length) * unit[1]
    return tma_rows(side[0], h, row, 0, length, end, RAGGED)


@gluon.jit
def query_range(n, M, N, band, F: gl.constexpr, T: gl.constexpr):
    """Query tiles [lo, hi) that see a key of tile n."""
    last = (M + T.BLOCK_M - 1) // T.BLOCK_M
    lo, hi = 0, last
    if F.right:
        lo = gl.minimum(gl.maximum(n * T.BLOCK_N - (N - M) - band[1], 0) // T.BLOCK_M, last)
    if F.left:
        end = gl.minimum(n * T.BLOCK_N + T.BLOCK_N, N) - (N - M) + band[0]
        hi = gl.minimum((gl.maximum(end, 0) + T.BLOCK_M - 1) // T.BLOCK_M, last)
    if F.ragged:  # noqa: SIM102  compile time outside, run time inside
        if n * T.BLOCK_N >= N:
            hi = lo
    if F.left:
        hi = gl.maximum(hi, lo)
    return lo, hi


@gluon.jit
def unmasked_range(key0, KEYS: gl.constexpr, M, N, band, hi, F: gl.constexpr, T: gl.constexpr):
    """Query tiles [lo, hi) whose every row sees every key of [key0, key0 + KEYS)."""
    lo = 0
    if F.right:
        lo = (gl.maximum(key0 + KEYS - 1 - (N - M) - band[1], 0) + T.BLOCK_M - 1) // T.BLOCK_M
    if F.left:
        hi = gl.minimum(gl.maximum(key0 - (N - M) + band[0] + 1, 0) // T.BLOCK_M, hi)
    if key0 + KEYS > N:
        lo = 1 << 30
    return lo, hi


@gluon.jit
def needs_mask(m, whole, F: gl.constexpr):
    """Whether query tile m lies outside of the tiles that see every key."""
    masked = m < whole[0]
    if F.left:
        masked = masked | (m >= whole[1])
    return masked


@gluon.jit
def turn_of(n, m, M, N, band, F: gl.constexpr, T: gl.constexpr):
    """How many programs add to query tile m of dQ before key tile n does, in an ordered (deterministic) sum.

    Programs only wait for programs that were started before them, so no number of resident ones can deadlock. With a
    bound on the right the key tiles descend, the shortest first: tile n + 1 starts at its diagonal where tile n comes
    by BLOCK_N / BLOCK_M steps later, so nobody waits. Without it they ascend, each a step behind the one before.
    """
    if F.right:
        last = ((m + 1) * T.BLOCK_M - 1 + N - M + band[1]) // T.BLOCK_N
        turn = gl.minimum(last, (N + T.BLOCK_N - 1) // T.BLOCK_N - 1) - n
    else:
        turn = n
        if F.left:
            turn = n - gl.maximum(m * T.BLOCK_M + N - M - band[0], 0) // T.BLOCK_N
    return turn


@gluon.jit
def pass_turns(turns, query_tile):
    """Let the next program add to both pieces of a query tile of dQ; called by one warp that has seen them arrive."""
    fence_gpu()
    count_up(turns + query_tile * 2)
    count_up(turns + query_tile * 2 + 1)


@gluon.jit
def produce(work, F: gl.constexpr, T: gl.constexpr):
    """The producer warp: K and V once, then the rings of Q with its row statistics and of dO."""
    descs, units, turns, smems, bars, problem = work
    seqs, sizes, band = problem[0], problem[1], problem[2]
    q_desc, do_desc, k_desc, v_desc, stats_desc = descs
    q_s, do_s, k_s, v_s, lse_s, delta_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, tile0 = q_side[3], q_side[4]
    N = k_side[3]
    lo, hi = query_range(n, M, N, band, F, T)
    group = sizes[2] // sizes[3]
    total = (hi - lo) * group
    BLOCKS: gl.constexpr = k_s.shape[0]  # of the key tile: one per warpgroup when both own their keys
    ROWS: gl.constexpr = T.BLOCK_N // BLOCKS
    key0 = n * T.BLOCK_N
    if total > 0:
        mbarrier.expect(kv_full.index(0), BLOCKS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for i in gl.static_range(BLOCKS):
            at = box(k_side, hk, key0 + i * ROWS, N, units[2], F.ragged)
            tma_load(k_desc, at, kv_full.index(0), k_s.index(i))
    h = hk * group
    m = lo
    stats = (h * sizes[7] + tile0 + m) * 2
    older, old = stats // 2, stats // 2  # query tiles of the two steps before
    for it in range(total):
        st = it % T.STAGES
        if it >= T.STAGES:
            barrier_sync(BAR_Q + st, 288)
            if T.ORDERED and T.D == 256:
                pass_turns(turns, older)  # both warpgroups have added to it before they gave the slot back
        older, old = old, stats // 2
        full = q_full.index(st)
        mbarrier.expect(full, q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
        tma_load(q_desc, box(q_side, h, m * T.BLOCK_M, M, units[0], F.ragged), full, q_s.index(st))
        tma_load(stats_desc, [stats * T.BLOCK_M], full, lse_s.index(st))
        tma_load(stats_desc, [(stats + 1) * T.BLOCK_M], full, delta_s.index(st))
        if it == 0:
            # behind Q: the first product needs only K and Q
            for i in gl.static_range(BLOCKS):
                at = box(k_side, hk, key0 + i * ROWS, N, units[3], F.ragged)
                tma_load(v_desc, at, kv_full.index(0), v_s.index(i))
        if it >= T.STAGES:
            barrier_sync(BAR_DO + st, 288)
        full = do_full.index(st)
        mbarrier.expect(full, do_desc.block_type.nbytes)
        tma_load(do_desc, box(q_side, h, m * T.BLOCK_M, M, units[1], F.ragged), full, do_s.index(st))
        m += 1
        stats += 2
        if m == hi:
            m = lo
            h += 1
            stats = (h * sizes[7] + tile0 + m) * 2
    if T.ORDERED and T.D == 256:
        for it in range(gl.maximum(total - 2, 0), total):
            barrier_sync(BAR_Q + it % T.STAGES, 288)
            pass_turns(turns, gl.where(it == total - 1, old, older))


@gluon.jit
def write_dq(work, F: gl.constexpr, T: gl.constexpr):
    """The writer warp of an ordered sum: waits for the turn, adds both warpgroups' pieces, passes the turn on.

    In the consumers themselves the wait for completion would sit between products in flight, and spill.
    """
    dq_desc, turns, dq_s, bars, problem = work
    seqs, sizes, band = problem[0], problem[1], problem[2]
    dq_empty = bars[3]
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    lo, hi = query_range(n, M, N, band, F, T)
    group = sizes[2] // sizes[3]
    ROWS: gl.constexpr = dq_s.shape[1]
    m = lo
    qt = hk * group * sizes[7] + q_side[4] + m
    for _ in range((hi - lo) * group):
        turn = turn_of(n, m, M, N, band, F, T)
        for w in gl.static_range(2):
            barrier_sync(BAR_DQ + w, 160)
            spin_until(turns + qt * 2 + w, turn)
            tma_reduce_add(dq_desc, [(qt * 2 + w) * ROWS, 0], dq_s.index(w))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(0), count=1)
        mbarrier.arrive(dq_empty.index(1), count=1)
        bulk_wait_all()
        pass_turns(turns, qt)
        m += 1
        qt += 1
        if m == hi:
            m = lo
            qt += sizes[7] - (hi - lo)
