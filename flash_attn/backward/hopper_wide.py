"""The three warpgroups of the Hopper backward for head dimensions above 128; its kernel is in `hopper.py`.

64 queries by 64 keys a step, on transposed tiles. One warpgroup owns dV and computes P, the next owns dK and computes
dS, the third computes dQ, adds it to the sums and loads what all of them read. A sum of 64 keys by 256 columns takes
half of the registers of a warpgroup, so each has one; P and dS enter the products from registers and go on to the
next warpgroup through two buffers. The three work on different steps at a time, so that the tensor cores have work
while one of them computes exponentials, or waits until the L2 cache has taken its reductions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attn.backward.hopper_narrow import probabilities
from flash_attn.backward.hopper_ops import (
    count_up,
    fence_gpu,
    peek,
    per_column,
    program_again,
    reduce_add_quads,
    spin_unless,
)
from flash_attn.backward.hopper_tiles import (
    BAR_DO,
    BAR_Q,
    box,
    direction,
    first_tile,
    needs_mask,
    place,
    query_range,
    turn_of,
    unmasked_range,
    wait_for_zeros,
    zero_ahead,
)
from flash_attn.tile.hopper import barrier_arrive, barrier_sync, random_delay, tma_load, tma_store
from flash_attn.tile.score import dcapped

# Named barriers of this schedule; BAR_Q and BAR_DO count all three warpgroups here.
BAR_QUARTER: gl.constexpr = gl.constexpr(
    4
)  # the third warpgroup has begun to add a quarter of dQ (128 threads)
BAR_END: gl.constexpr = gl.constexpr(5)  # all products are done
BAR_DS_FREE: gl.constexpr = gl.constexpr(6)  # + step % 2: dS has been multiplied
BAR_P: gl.constexpr = gl.constexpr(8)  # + step % 2: P is written
BAR_DS: gl.constexpr = gl.constexpr(10)  # + step % 2: dS is written


@gluon.jit
def _start_s(k, q_s, lse_s, q_full, it, F: gl.constexpr, T: gl.constexpr, SL: gl.constexpr):
    """Begin S^T of step `it`; -lse / scale is its initial value."""
    BLOCK_M: gl.constexpr = T.BLOCK_M
    st = it % T.STAGES
    q = q_s.index(st).reshape([BLOCK_M, T.D])
    mbarrier.wait(q_full.index(st), (it // T.STAGES) & 1)
    if F.softcap:
        zeros = gl.zeros([64, BLOCK_M], gl.float32, SL)
        return warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        s_init = per_column(lse_s.index(st), BLOCK_M, SL)
        return warpgroup_mma(k, q.permute((1, 0)), s_init, is_async=True)


@gluon.jit
def _finish_p(
    s, it, m, whole, lo, hi, lse_s, p_s, scores, F: gl.constexpr, T: gl.constexpr, SL: gl.constexpr
):
    """P^T of step `it` in 16 bits; hands what dS needs of it to the second warpgroup."""
    dtype: gl.constexpr = p_s.dtype
    st = it % T.STAGES
    p, x = probabilities(
        s, lse_s.index(st), needs_mask(m, whole, F), lo - m * T.BLOCK_M, hi - m * T.BLOCK_M, scores, T.BLOCK_M,
        SL, F,
    )  # fmt: skip
    p16 = p.to(dtype)
    if F.softcap:
        p_s.index(it % 2).store(dcapped(p, x, F).to(dtype))
    else:
        p_s.index(it % 2).store(p16)
    # who read this buffer two steps ago released Q after that: waiting for Q was waiting for the buffer
    barrier_arrive(BAR_P + it % 2, 256)
    barrier_arrive(BAR_Q + st, 384)
    return p16


@gluon.jit
def _add_dv(p16, dv, do_s, do_full, it, T: gl.constexpr, VL: gl.constexpr):
    """Begin dV += P^T dO of step `it`."""
    st = it % T.STAGES
    mbarrier.wait(do_full.index(st), (it // T.STAGES) & 1)
    p_r = gl.convert_layout(p16, gl.DotOperandLayout(0, VL, 2), assert_trivial=True)
    return warpgroup_mma(p_r, do_s.index(st).reshape([T.BLOCK_M, T.DV]), dv, is_async=True)


@gluon.jit
def sum_dv(work, F: gl.constexpr, T: gl.constexpr):
    """The first warpgroup: dV += P^T dO, P^T = exp(K Q^T - lse)."""
    descs, units, dq_acc, turns, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    BLOCK_M: gl.constexpr = T.BLOCK_M
    BLOCK_N: gl.constexpr = T.BLOCK_N
    DV: gl.constexpr = T.DV
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    VL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    dtype: gl.constexpr = q_s.dtype
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    m_lo, m_hi = query_range(n, M, N, band, F, T)
    total = (m_hi - m_lo) * sizes[13]
    key0 = n * BLOCK_N
    whole = unmasked_range(key0, BLOCK_N, M, N, band, m_hi, F, T)
    # queries that see a key: lo <= query <= hi
    keys = key0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SL))
    lo = gl.zeros([BLOCK_N], gl.int32, gl.SliceLayout(1, SL))
    hi = lo
    if F.right:
        lo = keys - (N - M) - band[1]
    if F.left:
        hi = keys - (N - M) + band[0]
    lo = gl.where(keys < N, lo, 1 << 30)
    k = k_s.index(0).reshape([BLOCK_N, T.D])
    v = v_s.index(0).reshape([BLOCK_N, DV])
    dv = gl.zeros([BLOCK_N, DV], gl.float32, VL)
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(m_lo, m_hi, STEP)
    if total > 0:
        mbarrier.wait(kv_full.index(0), 0)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        s = _start_s(k, q_s, lse_s, q_full, it, F, T, SL)
        s = warpgroup_mma_wait(0, deps=(s,))
        p16 = _finish_p(s, it, m, whole, lo, hi, lse_s, p_s, scores, F, T, SL)
        dv = _add_dv(p16, dv, do_s, do_full, it, T, VL)
        m += STEP
        if (m == m_hi) | (m < m_lo):
            m = first_tile(m_lo, m_hi, STEP)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        barrier_arrive(BAR_DO + it % T.STAGES, 384)
    barrier_sync(BAR_END, 384)  # V has been read
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    v.store(dv.to(dtype))
    fence_async_shared()
    tma_store(descs[1], box(k_side, hk, n * BLOCK_N, k_side[2], units[5], F.ragged), v_s.index(0))
    tma.store_wait(0)


@gluon.jit
def _start_dp(v, do_s, delta_s, q_full, do_full, it, T: gl.constexpr, SL: gl.constexpr):
    """Begin dP^T of step `it`; -delta is its initial value."""
    st = it % T.STAGES
    ph = (it // T.STAGES) & 1
    mbarrier.wait(q_full.index(st), ph)  # delta comes with Q
    dp_init = per_column(delta_s.index(st), T.BLOCK_M, SL)
    mbarrier.wait(do_full.index(st), ph)
    do = do_s.index(st).reshape([T.BLOCK_M, T.DV])
    return warpgroup_mma(v, do.permute((1, 0)), dp_init, is_async=True)


@gluon.jit
def _finish_ds(dp, it, p_s, ds_s, T: gl.constexpr, SL: gl.constexpr):
    """dS^T of step `it` in 16 bits; hands it to the third warpgroup."""
    dtype: gl.constexpr = ds_s.dtype
    barrier_arrive(BAR_DO + it % T.STAGES, 384)
    barrier_sync(BAR_P + it % 2, 256)
    ds16 = (p_s.index(it % 2).load(SL).to(gl.float32) * dp).to(dtype)
    if it >= 2:
        barrier_sync(BAR_DS_FREE + it % 2, 256)
    ds_s.index(it % 2).store(ds16)
    fence_async_shared()
    barrier_arrive(BAR_DS + it % 2, 256)
    return ds16


@gluon.jit
def _add_dk(ds16, dk, q_s, it, T: gl.constexpr, KL: gl.constexpr):
    """Begin dK += dS^T Q of step `it`."""
    ds_r = gl.convert_layout(ds16, gl.DotOperandLayout(0, KL, 2), assert_trivial=True)
    return warpgroup_mma(ds_r, q_s.index(it % T.STAGES).reshape([T.BLOCK_M, T.D]), dk, is_async=True)


@gluon.jit
def sum_dk(work, F: gl.constexpr, T: gl.constexpr):
    """The second warpgroup: dK += dS^T Q, dS^T = P^T (V dO^T - delta)."""
    descs, units, dq_acc, turns, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    D: gl.constexpr = T.D
    BLOCK_M: gl.constexpr = T.BLOCK_M
    BLOCK_N: gl.constexpr = T.BLOCK_N
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = q_s.dtype
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    m_lo, m_hi = query_range(n, q_side[3], k_side[3], band, F, T)
    total = (m_hi - m_lo) * sizes[13]
    k = k_s.index(0).reshape([BLOCK_N, D])
    v = v_s.index(0).reshape([BLOCK_N, T.DV])
    dk = gl.zeros([BLOCK_N, D], gl.float32, KL)
    if total > 0:
        mbarrier.wait(kv_full.index(0), 0)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        dp = _start_dp(v, do_s, delta_s, q_full, do_full, it, T, SL)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds16 = _finish_ds(dp, it, p_s, ds_s, T, SL)
        dk = _add_dk(ds16, dk, q_s, it, T, KL)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        barrier_arrive(BAR_Q + it % T.STAGES, 384)
    barrier_sync(BAR_END, 384)  # K has been read
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    k.store((dk * scale).to(dtype))
    fence_async_shared()
    tma_store(descs[0], box(k_side, hk, n * BLOCK_N, k_side[2], units[4], F.ragged), k_s.index(0))
    tma.store_wait(0)


@gluon.jit
def _load_q(load, it, tile, h, m, q_side, F: gl.constexpr, T: gl.constexpr):
    """Load Q of step `it` with its row statistics; `tile` is its padded query tile."""
    descs, units, smems, bars = load
    q_desc, stats_desc = descs[0], descs[4]
    st = it % T.STAGES
    full = bars[0].index(st)
    mbarrier.expect(full, q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
    tma_load(q_desc, box(q_side, h, m * T.BLOCK_M, q_side[3], units[0], F.ragged), full, smems[0].index(st))
    tma_load(stats_desc, [2 * tile * T.BLOCK_M], full, smems[4].index(st))
    tma_load(stats_desc, [(2 * tile + 1) * T.BLOCK_M], full, smems[5].index(st))


@gluon.jit
def _load_do(load, it, h, m, q_side, F: gl.constexpr, T: gl.constexpr):
    """Load dO of step `it`."""
    descs, units, smems, bars = load
    st = it % T.STAGES
    full = bars[1].index(st)
    mbarrier.expect(full, descs[1].block_type.nbytes)
    tma_load(descs[1], box(q_side, h, m * T.BLOCK_M, q_side[3], units[1], F.ragged), full, smems[1].index(st))


@gluon.jit
def _following(h, m, tile, lo, hi, sizes, STEP: gl.constexpr):
    """(head, query tile, padded query tile) of the step after this one."""
    m += STEP
    tile += STEP
    if (m == hi) | (m < lo):
        m = first_tile(lo, hi, STEP)
        h += 1
        tile += sizes[7] - (hi - lo) * STEP
    return h, m, tile


@gluon.jit
def sum_dq(work, load, zeroed, F: gl.constexpr, T: gl.constexpr):
    """The third warpgroup: dQ = dS K, a quarter of the columns at a time, added straight from registers.

    It has time left. A producer warp would cost a fourth group of four warps, and with that registers of the others.
    """
    descs, units, dq_acc, turns, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s = smems
    k_desc, v_desc = load[0][2], load[0][3]
    kv_full = bars[2]
    D: gl.constexpr = T.D
    BLOCK_M: gl.constexpr = T.BLOCK_M
    COLS: gl.constexpr = 64
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    m_lo, m_hi = query_range(n, M, N, band, F, T)
    group = sizes[13]
    total = (m_hi - m_lo) * group
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(m_lo, m_hi, STEP)
    tile = hk * group * sizes[7] + q_side[4] + m
    # the step to load next
    h_next, m_next, tile_next = hk * group, m, tile
    if total > 0:
        mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        key0 = n * T.BLOCK_N
        tma_load(k_desc, box(k_side, hk, key0, N, units[2], F.ragged), kv_full.index(0), k_s.index(0))
        _load_q(load, 0, tile_next, h_next, m_next, q_side, F, T)
        tma_load(v_desc, box(k_side, hk, key0, N, units[3], F.ragged), kv_full.index(0), v_s.index(0))
        _load_do(load, 0, h_next, m_next, q_side, F, T)
        h_next, m_next, tile_next = _following(h_next, m_next, tile_next, m_lo, m_hi, sizes, STEP)
        if total > 1:
            _load_q(load, 1, tile_next, h_next, m_next, q_side, F, T)
            _load_do(load, 1, h_next, m_next, q_side, F, T)
    zero_ahead(dq_acc, zeroed, seqs, sizes, T)
    k = k_s.index(0).reshape([T.BLOCK_N, D])
    zeros = gl.zeros([BLOCK_M, COLS], gl.float32, QL)
    h, passed = hk * group, tile
    if total > 0:
        wait_for_zeros(zeroed, sizes, 4)
        mbarrier.wait(kv_full.index(0), 0)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        h_next, m_next, tile_next = _following(h_next, m_next, tile_next, m_lo, m_hi, sizes, STEP)
        barrier_sync(BAR_DS + it % 2, 256)
        ds = ds_s.index(it % 2).permute((1, 0))
        sums = dq_acc + tile.to(gl.int64) * (BLOCK_M * D)
        for i in gl.static_range(D // COLS):
            part = warpgroup_mma(ds, k.slice(i * COLS, COLS, 1), zeros, use_acc=False, is_async=True)
            if T.ORDERED and i == 0:
                seen = peek(turns + tile * 2)
                # what was added a step ago has arrived by now, or nearly so; each of four warps passes the turn on
                fence_gpu()
                if it > 0:
                    count_up(turns + passed * 2)
                passed = tile + 0
                spin_unless(seen, turns + tile * 2, 4 * turn_of(n, m, M, N, band, F, T))
            part = warpgroup_mma_wait(0, deps=(part,))
            if i == D // COLS - 1:
                barrier_arrive(BAR_DS_FREE + it % 2, 256)
            reduce_add_quads(sums + i * (BLOCK_M * COLS), part, COLS // 8)
            # ptxas would begin the next product among these reductions, and run out of registers
            barrier_sync(BAR_QUARTER, 128)
        if it + 2 < total:
            barrier_sync(BAR_DO + it % T.STAGES, 384)
            _load_do(load, it, h_next, m_next, q_side, F, T)
            barrier_sync(BAR_Q + it % T.STAGES, 384)
            _load_q(load, it, tile_next, h_next, m_next, q_side, F, T)
        h, m, tile = _following(h, m, tile, m_lo, m_hi, sizes, STEP)
    if T.ORDERED:  # noqa: SIM102  compile time outside, run time inside
        if total > 0:
            fence_gpu()
            count_up(turns + passed * 2)
    barrier_arrive(BAR_END, 384)
