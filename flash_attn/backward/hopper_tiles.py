"""Which tile a program of the Hopper backward works on, what loads it, and how dQ leaves: shared by both schedules.

A program owns one tile of keys of one (batch, key/value head) and walks over the query tiles that see it, for every
query head of the group, so dK and dV never leave its registers until they are final. Up to head dimension 128 dQ is
summed over programs in fp32, in the order in which a warpgroup's accumulator lies in its threads
(`hopper_ops.fragments`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flash_attn.backward.hopper_ops import bulk_wait_all, count_up, fence_gpu, peek, spin_unless, spin_until
from flash_attn.tile.hopper import barrier_sync, random_delay, tma_load, tma_reduce_add, tma_rows
from flash_attn.tile.rows import sequence

# Hardware named barriers. 288 threads: the producer warp and both warpgroups; 256: both warpgroups; 128: one.
BAR_Q: gl.constexpr = gl.constexpr(12)  # + stage: Q (and the row statistics) may be overwritten
BAR_DO: gl.constexpr = gl.constexpr(14)  # + stage: dO may be overwritten
BAR_DS: gl.constexpr = gl.constexpr(11)  # both warpgroups have written their part
BAR_READY: gl.constexpr = gl.constexpr(5)  # + warpgroup + 2 * (step % 2): its dS is written
BAR_DQ: gl.constexpr = gl.constexpr(9)  # + warpgroup: its piece of dQ waits for the writer warp (160 threads)


@gluon.jit
def quotient(x, by):
    """x // d for 0 <= x < 2**31; `by` is `hopper_launch.divider(d)`. A division proper takes ten times as long."""
    return gl.umulhi(2 * x, by[0]) >> by[1]


@gluon.jit
def order(program, sizes):
    """(key tile, pair) of a program. A pair is a (batch, kv head).

    Inside a group of `width` pairs the key tiles ascend, so that with a causal mask the longest come first while the
    group's Q and dO stay in L2, and an ordered sum seldom waits (see `turn_of`).
    """
    pairs, width, key_tiles = sizes[4], sizes[5], sizes[6]
    group = key_tiles * width
    g = quotient(program, sizes[9])
    r = program - g * group
    wide = gl.minimum(width, pairs - g * width)
    n = gl.where(wide == width, quotient(r, sizes[10]), quotient(r, sizes[11]))
    return n, g * width + (r - n * wide)


@gluon.jit
def query_side(b, cu_q, used_q, max_q, T: gl.constexpr):
    """(batch, first row, rows of the sequence's slot, valid rows, first padded query tile)."""
    row_q, slot_q = sequence(cu_q, None, max_q, b)
    M = slot_q
    if used_q is not None:
        M = gl.minimum(gl.load(used_q + b), slot_q)
    tile0 = b * ((max_q + T.BLOCK_M - 1) // T.BLOCK_M)
    if cu_q is not None:
        # sequence b starts at a padded tile of its own: floor(start / BLOCK_M) + b leaves room for every tail
        tile0 = row_q // T.BLOCK_M + b
    return b, row_q, slot_q, M, tile0


@gluon.jit
def place(program, seqs, sizes, F: gl.constexpr, T: gl.constexpr):
    """(key tile, kv head, query side, key side) of a program; a side is as in `query_side`, keys have no tile.

    With packed lengths `order` counts entries of the list that `hopper_pre.list_key_tiles` made, and kv heads.
    """
    n, pair = order(program, sizes)
    if seqs[4] is not None:
        at = seqs[4] + n * 8
        b = gl.load(at + 1)
        row_q = gl.load(at + 5)
        q_side = b, row_q, gl.load(at + 6), gl.load(at + 7), row_q // T.BLOCK_M + b
        return gl.load(at), pair, q_side, (b, gl.load(at + 2), gl.load(at + 3), gl.load(at + 4))
    else:
        return _place_of_pair(n, pair, seqs, sizes, T)


@gluon.jit
def _place_of_pair(n, pair, seqs, sizes, T: gl.constexpr):
    b = quotient(pair, sizes[12])
    row_k, slot_k = sequence(seqs[1], None, sizes[1], b)
    N = slot_k
    if seqs[3] is not None:
        N = gl.minimum(gl.load(seqs[3] + b), slot_k)
    q_side = query_side(b, seqs[0], seqs[2], sizes[0], T)
    return n, pair - b * sizes[3], q_side, (b, row_k, slot_k, N)


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


@gluon.constexpr_function
def direction(F, T):
    """In which order a program visits query tiles: 1 up, -1 down.

    With a causal mask all key tiles see the last query tile. If an ordered sum starts there, tile n is one step behind
    tile n - 1; if it started at the diagonal, tile n would wait until tile n - 1 has come that far.
    """
    return -1 if T.ORDERED and F.right and not F.left else 1


@gluon.jit
def first_tile(lo, hi, STEP: gl.constexpr):
    """The query tile of [lo, hi) to begin with."""
    return lo if STEP == 1 else hi - 1


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

    Key tiles add in the order in which they were started, so no number of resident programs can deadlock. The
    pairs of a group alternate (`place`), so tile n - 1 was started some programs before tile n, and is ahead.
    """
    turn = n
    if F.left:
        turn = n - gl.maximum(m * T.BLOCK_M + N - M - band[0], 0) // T.BLOCK_N
    return turn


@gluon.constexpr_function
def zeroing_warps(T):
    """Warps of a program that take part in `zero_ahead` and count in `zeroed`."""
    return 4 if T.SINGLE else 1


@gluon.jit
def zero_share(dq_acc, seqs, sizes, T: gl.constexpr):
    """Zero this program's share of the sums of dQ of a pair that is worked on some waves later; by one warp, or four.

    Zeroed before the kernel, they would go to memory and back.
    """
    n, pair = order(gl.program_id(0), sizes)
    later = pair + sizes[8]
    if later < sizes[4]:
        group = sizes[13]
        if seqs[4] is not None:
            h, tile0, tiles = later * group, 0, sizes[7]
        else:
            b = later // sizes[3]
            side = query_side(b, seqs[0], None, sizes[0], T)
            h = (later - b * sizes[3]) * group
            tile0, tiles = side[4], (side[2] + T.BLOCK_M - 1) // T.BLOCK_M
        WARPS: gl.constexpr = zeroing_warps(T)
        L: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        nothing = gl.zeros([1024], gl.float32, L)
        for _ in range(group):
            for m in range(n, tiles, sizes[6]):
                at = dq_acc + (h * sizes[7] + tile0 + m).to(gl.int64) * (T.BLOCK_M * T.D)
                at = gl.multiple_of(at, 16) + gl.arange(0, 1024, L)
                for i in range(0, T.BLOCK_M * T.D, 1024):
                    gl.store(at + i, nothing)
            h += 1


@gluon.jit
def count_zeroed(zeroed, sizes):
    """Behind `zero_share`: `zeroed` counts the warps that are done with a pair."""
    _, pair = order(gl.program_id(0), sizes)
    later = pair + sizes[8]
    if later < sizes[4]:
        fence_gpu()
        count_up(zeroed + later)


@gluon.jit
def zero_ahead(dq_acc, zeroed, seqs, sizes, T: gl.constexpr):
    """`zero_share` and `count_zeroed`, for warps without other work."""
    zero_share(dq_acc, seqs, sizes, T)
    count_zeroed(zeroed, sizes)


@gluon.jit
def wait_for_zeros(zeroed, sizes, WARPS: gl.constexpr):
    """Wait until the sums of dQ of this program's pair are zeroed; WARPS: how many count in a program."""
    n, pair = order(gl.program_id(0), sizes)
    spin_until(zeroed + pair, sizes[6] * WARPS)


@gluon.jit
def produce(work, F: gl.constexpr, T: gl.constexpr):
    """The producer warp: K and V once, then the rings of Q with its row statistics and of dO."""
    descs, units, zeroed, turns, smems, bars, problem = work
    seqs, sizes, band = problem[0], problem[1], problem[2]
    q_desc, do_desc, k_desc, v_desc, stats_desc = descs
    q_s, do_s, k_s, v_s, lse_s, delta_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, tile0 = q_side[3], q_side[4]
    N = k_side[3]
    lo, hi = query_range(n, M, N, band, F, T)
    group = sizes[13]
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
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(lo, hi, STEP)
    stats = (h * sizes[7] + tile0 + m) * 2
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        st = it % T.STAGES
        if it >= T.STAGES:
            barrier_sync(BAR_Q + st, 288)
        full = q_full.index(st)
        mbarrier.expect(full, q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
        tma_load(q_desc, box(q_side, h, m * T.BLOCK_M, M, units[0], F.ragged), full, q_s.index(st))
        if it == 0:
            # behind Q: the first product needs only K and Q
            for i in gl.static_range(BLOCKS):
                at = box(k_side, hk, key0 + i * ROWS, N, units[3], F.ragged)
                tma_load(v_desc, at, kv_full.index(0), v_s.index(i))
            if zeroed is not None:
                # under the loads: nobody adds to the sums before the row statistics are there
                wait_for_zeros(zeroed, sizes, 1)
        if T.FOLD:
            # eight columns lie in memory; TMA makes zeros of the other eight
            tma_load(stats_desc, [stats * T.BLOCK_M, 0], full, lse_s.index(st))
            tma_load(stats_desc, [(stats + 1) * T.BLOCK_M, 0], full, delta_s.index(st))
        else:
            tma_load(stats_desc, [stats * T.BLOCK_M], full, lse_s.index(st))
            tma_load(stats_desc, [(stats + 1) * T.BLOCK_M], full, delta_s.index(st))
        if it >= T.STAGES:
            barrier_sync(BAR_DO + st, 288)
        full = do_full.index(st)
        mbarrier.expect(full, do_desc.block_type.nbytes)
        tma_load(do_desc, box(q_side, h, m * T.BLOCK_M, M, units[1], F.ragged), full, do_s.index(st))
        m += STEP
        stats += 2 * STEP
        if (m == hi) | (m < lo):
            m = first_tile(lo, hi, STEP)
            h += 1
            stats = (h * sizes[7] + tile0 + m) * 2


@gluon.jit
def write_dq(work, WG: gl.constexpr, F: gl.constexpr, T: gl.constexpr):
    """A writer warp: adds warpgroup WG's pieces of dQ; in an ordered sum waits for the turn and passes it on.

    In the consumers the barriers round the copy, or the wait for completion, would sit between products in flight.
    """
    dq_desc, dq_acc, zeroed, turns, dq_s, bars, problem = work
    seqs, sizes, band = problem[0], problem[1], problem[2]
    dq_empty = bars[3].index(WG)
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    lo, hi = query_range(n, M, N, band, F, T)
    group = sizes[13]
    ROWS: gl.constexpr = dq_s.shape[1]
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(lo, hi, STEP)
    piece = (hk * group * sizes[7] + q_side[4] + m) * 2 + WG
    if WG == 0:
        zero_ahead(dq_acc, zeroed, seqs, sizes, T)
    if T.DEFER:  # noqa: SIM102
        if hi > lo:
            barrier_sync(BAR_DQ + WG, 160)  # the first piece is the dQ of nothing
            mbarrier.arrive(dq_empty, count=1)
    seen = gl.to_tensor(-1)
    for _ in range((hi - lo) * group):
        if T.ORDERED:
            spin_unless(seen, turns + piece, turn_of(n, m, M, N, band, F, T))
        if T.DELAY:
            random_delay(T.DELAY)
        barrier_sync(BAR_DQ + WG, 160)
        tma_reduce_add(dq_desc, [piece * ROWS, 0], dq_s.index(WG))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty, count=1)
        added = turns + piece
        m += STEP
        piece += 2 * STEP
        if (m == hi) | (m < lo):
            m = first_tile(lo, hi, STEP)
            piece += (sizes[7] - (hi - lo) * STEP) * 2
        if T.ORDERED:
            seen = peek(turns + piece)  # the next turn, on its way while this piece is
            bulk_wait_all()
            fence_gpu()
            count_up(added)
