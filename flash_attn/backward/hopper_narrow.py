"""One consumer warpgroup of the Hopper backward for head dimensions up to 128; its kernel is in `hopper.py`.

Each of the two warpgroups owns 64 keys and works on transposed tiles, so that P and dS, which the sums over queries
need as left operands, stay in registers: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q. Only dS goes through
shared memory, once, for dQ = dS K, of which each warpgroup computes half.
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

from flash_attn.backward.hopper_ops import (
    ONES_IN_REGISTERS,
    first_columns,
    fragment_rows,
    mask_columns,
    per_column,
    program_again,
)
from flash_attn.backward.hopper_tiles import (
    BAR_DO,
    BAR_DQ,
    BAR_DS,
    BAR_Q,
    BAR_READY,
    box,
    direction,
    first_tile,
    needs_mask,
    place,
    query_range,
    unmasked_range,
)
from flash_attn.tile.hopper import barrier_arrive, barrier_sync, random_delay, tma_reduce_add, tma_store
from flash_attn.tile.score import capped, dcapped


@gluon.jit
def probabilities(s, lse_s, masked, lo, hi, scores, BLOCK_M: gl.constexpr, SL: gl.constexpr, F: gl.constexpr):
    """(P^T, x of `tile/score.py`) of a tile of products, keys down."""
    inner, outer = scores
    x = capped(s, inner, F)
    kept = x
    if masked:
        kept = mask_columns(x, lo, hi, F.left, BLOCK_M, SL)
    if F.softcap:
        return gl.exp2(kept * outer + gl.expand_dims(lse_s.load(gl.SliceLayout(0, SL)), 0)), x
    else:
        return gl.exp2(kept * outer), x  # s began as -lse / scale, so this is relative to the row's lse


@gluon.jit
def _dq_operands(ds_s, k_s, slot, WG: gl.constexpr, COLS: gl.constexpr, T: gl.constexpr):
    """dS and K of both warpgroups' keys for this warpgroup's half of dQ: half the queries, or half the columns."""
    D: gl.constexpr = T.D
    k0 = k_s.index(0).reshape([64, D])
    k1 = k_s.index(1).reshape([64, D])
    if T.BLOCK_M == 128:
        ds0 = ds_s.index(slot * 2).slice(WG * 64, 64, 1).permute((1, 0))
        ds1 = ds_s.index(slot * 2 + 1).slice(WG * 64, 64, 1).permute((1, 0))
    else:
        ds0 = ds_s.index(slot * 2).permute((1, 0))
        ds1 = ds_s.index(slot * 2 + 1).permute((1, 0))
        k0 = k0.slice(WG * COLS, COLS, 1)
        k1 = k1.slice(WG * COLS, COLS, 1)
    return ds0, ds1, k0, k1


@gluon.jit
def consume(work, WG: gl.constexpr, F: gl.constexpr, T: gl.constexpr):
    """Warpgroup WG: keys WG * 64 to WG * 64 + 63 of the program's tile."""
    descs, units, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    dq_desc, dk_desc, dv_desc = descs
    q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, ones_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    D: gl.constexpr = T.D
    DV: gl.constexpr = T.DV
    BLOCK_M: gl.constexpr = T.BLOCK_M
    STAGES: gl.constexpr = T.STAGES
    COLS: gl.constexpr = D if BLOCK_M == 128 else D // 2  # of this warpgroup's piece of dQ, which has 64 rows
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    dtype: gl.constexpr = q_s.dtype
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, tile0 = q_side[3], q_side[4]
    N = k_side[3]
    m_lo, m_hi = query_range(n, M, N, band, F, T)
    group = sizes[13]
    total = (m_hi - m_lo) * group
    key0 = n * T.BLOCK_N + WG * 64
    whole = unmasked_range(key0, 64, M, N, band, m_hi, F, T)
    # queries that see a key: lo <= query <= hi
    keys = key0 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    lo = gl.zeros([64], gl.int32, gl.SliceLayout(1, SL))
    hi = lo
    if F.right:
        lo = keys - (N - M) - band[1]
    if F.left:
        hi = keys - (N - M) + band[0]
    lo = gl.where(keys < N, lo, 1 << 30)
    k_w = k_s.index(WG).reshape([64, D])
    v_w = v_s.index(WG).reshape([64, DV])
    dk = gl.zeros([64, D], gl.float32, KL)
    dv = gl.zeros([64, DV], gl.float32, VL)
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(m_lo, m_hi, STEP)
    qt = hk * group * sizes[7] + tile0 + m
    if T.DEFER:
        # the first step adds the dQ of nothing to its own tile
        ds_s.index(2 * (T.DS_STAGES - 1) + WG).store(gl.zeros([64, BLOCK_M], dtype, SL))
        fence_async_shared()
        barrier_arrive(BAR_READY + WG + 2, 256)
    if T.FOLD:
        if ONES_IN_REGISTERS:
            ones = first_columns(3, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
            ones = gl.convert_layout(ones, gl.DotOperandLayout(0, SL, 2), assert_trivial=True)
        else:
            ones = ones_s.index(WG)
            ones.store(first_columns(3, gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])))
            fence_async_shared()
    if total > 0:
        mbarrier.wait(kv_full.index(0), 0)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        st = it % STAGES
        ph = (it // STAGES) & 1
        q = q_s.index(st).reshape([BLOCK_M, D])
        do = do_s.index(st).reshape([BLOCK_M, DV])
        mbarrier.wait(q_full.index(st), ph)
        # -lse / scale and -delta are the initial values of S and dP: no registers hold them across the exp
        if T.FOLD:
            zeros = gl.zeros([64, BLOCK_M], gl.float32, SL)
            s = warpgroup_mma(ones, lse_s.index(st).permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp = warpgroup_mma(ones, delta_s.index(st).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma(k_w, q.permute((1, 0)), s, is_async=True)
            mbarrier.wait(do_full.index(st), ph)
            dp = warpgroup_mma(v_w, do.permute((1, 0)), dp, is_async=True)
        else:
            dp_init = per_column(delta_s.index(st), BLOCK_M, SL)
            if F.softcap:
                zeros = gl.zeros([64, BLOCK_M], gl.float32, SL)
                s = warpgroup_mma(k_w, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            else:
                s_init = per_column(lse_s.index(st), BLOCK_M, SL)
                s = warpgroup_mma(k_w, q.permute((1, 0)), s_init, is_async=True)
            mbarrier.wait(do_full.index(st), ph)
            dp = warpgroup_mma(v_w, do.permute((1, 0)), dp_init, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        masked = needs_mask(m, whole, F)
        p, x = probabilities(
            s, lse_s.index(st), masked, lo - m * BLOCK_M, hi - m * BLOCK_M, scores, BLOCK_M, SL, F
        )
        p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, VL, 2), assert_trivial=True)
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds16 = dcapped(p * dp, x, F).to(dtype)
        ds_r = gl.convert_layout(ds16, gl.DotOperandLayout(0, KL, 2), assert_trivial=True)
        slot = it % T.DS_STAGES
        ds_s.index(slot * 2 + WG).store(ds16)
        fence_async_shared()
        if T.DEFER:
            barrier_sync(BAR_READY + (1 - WG) + 2 * ((it + 1) % 2), 256)
            slot = (it + T.DS_STAGES - 1) % T.DS_STAGES
        else:
            barrier_sync(BAR_DS, 256)
        ds0, ds1, k0, k1 = _dq_operands(ds_s, k_s, slot, WG, COLS, T)
        part = warpgroup_mma(ds0, k0, gl.zeros([64, COLS], gl.float32, QL), use_acc=False, is_async=True)
        part = warpgroup_mma(ds1, k1, part, is_async=True)
        dk = warpgroup_mma(ds_r, q, dk, is_async=True)
        dv, part = warpgroup_mma_wait(1, deps=(dv, part))
        if T.DELAY:
            random_delay(T.DELAY)
        if T.DEFER:
            barrier_arrive(BAR_READY + WG + 2 * (it % 2), 256)
        barrier_arrive(BAR_DO + st, 288)
        if T.ORDERED:
            mbarrier.wait(bars[3].index(WG), (it & 1) ^ 1)
        else:
            tma.store_wait(0)
        dq_s.index(WG).store(fragment_rows(part, COLS // 8))
        fence_async_shared()
        if T.ORDERED:
            barrier_arrive(BAR_DQ + WG, 160)
        else:
            tma_reduce_add(dq_desc, [(qt * 2 + WG) * (64 * COLS // 256), 0], dq_s.index(WG))
        dk = warpgroup_mma_wait(0, deps=(dk,))
        barrier_arrive(BAR_Q + st, 288)
        if T.DEFER:
            qt += gl.where(it > 0, 1, 0)
            if m == m_lo:
                qt += gl.where(it > 0, sizes[7] - (m_hi - m_lo), 0)
            m += STEP
            if (m == m_hi) | (m < m_lo):
                m = first_tile(m_lo, m_hi, STEP)
        else:
            m += STEP
            qt += STEP
            if (m == m_hi) | (m < m_lo):
                m = first_tile(m_lo, m_hi, STEP)
                qt += sizes[7] - (m_hi - m_lo) * STEP
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    row, slot = n * T.BLOCK_N + WG * 64, k_side[2]
    v_w.store(dv.to(dtype))
    fence_async_shared()
    tma_store(dv_desc, box(k_side, hk, row, slot, units[5], F.ragged), v_s.index(WG))
    if T.DEFER:  # noqa: SIM102
        if total > 0:
            barrier_sync(BAR_READY + (1 - WG) + 2 * ((total - 1) % 2), 256)
            ds0, ds1, k0, k1 = _dq_operands(ds_s, k_s, (total - 1) % T.DS_STAGES, WG, COLS, T)
            part = warpgroup_mma(ds0, k0, gl.zeros([64, COLS], gl.float32, QL), use_acc=False, is_async=True)
            part = warpgroup_mma(ds1, k1, part, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            if T.ORDERED:
                mbarrier.wait(bars[3].index(WG), (total & 1) ^ 1)
            else:
                tma.store_wait(0)
            dq_s.index(WG).store(fragment_rows(part, COLS // 8))
            fence_async_shared()
            if T.ORDERED:
                barrier_arrive(BAR_DQ + WG, 160)
            else:
                tma_reduce_add(dq_desc, [(qt * 2 + WG) * (64 * COLS // 256), 0], dq_s.index(WG))
    barrier_sync(BAR_DS, 256)  # the other warpgroup has read its last K, and this one's dS
    k_w.store((dk * scale).to(dtype))
    fence_async_shared()
    tma_store(dk_desc, box(k_side, hk, row, slot, units[4], F.ragged), k_s.index(WG))
    tma.store_wait(0)
