"""One consumer warpgroup of the Hopper backward for head dimensions above 128; its kernel is in `hopper.py`.

64 queries by 64 keys a step: dK and dV of more keys would not fit the registers. The warpgroups split the keys for
S and dP, and the head dimension for dV, dK and dQ; P and dS go through double-buffered shared memory. dQ leaves by
vector reductions straight from registers, which frees the 64 KiB that keep Q and dO double buffered.
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

from flash_attn.backward.hopper_ops import program_again, reduce_add_quads, spin_until
from flash_attn.backward.hopper_tiles import (
    BAR_DO,
    BAR_DS,
    BAR_Q,
    box,
    direction,
    first_tile,
    needs_mask,
    place,
    query_range,
    turn_of,
    unmasked_range,
)
from flash_attn.tile.hopper import barrier_arrive, barrier_sync, random_delay, tma_store
from flash_attn.tile.score import capped, dcapped


@gluon.jit
def _probabilities(s, lse, masked, rows, cols, M, N, band, scores, F: gl.constexpr):
    """(P, x of `tile/score.py`) of a tile of products, queries down, keys across."""
    inner, outer = scores
    x = capped(s, inner, F)
    kept = x
    if masked:
        hi = gl.full([rows.shape[0]], N, gl.int32, rows.type.layout)
        if F.right:
            hi = gl.minimum(rows + (N - M + band[1] + 1), hi)
        ok = gl.expand_dims(cols, 0) < gl.expand_dims(hi, 1)
        if F.left:
            ok = ok & (gl.expand_dims(cols, 0) >= gl.expand_dims(rows + (N - M - band[0]), 1))
        kept = gl.where(ok, x, float("-inf"))
    return gl.exp2(kept * outer + gl.expand_dims(lse, 1)), x


@gluon.jit
def consume(work, WG: gl.constexpr, F: gl.constexpr, T: gl.constexpr):
    """Warpgroup WG: half the keys of S and dP, half the columns of dQ, dK and dV."""
    descs, units, dq_acc, turns, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    dk_desc, dv_desc = descs
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    D: gl.constexpr = T.D
    DV: gl.constexpr = T.DV
    BLOCK_M: gl.constexpr = T.BLOCK_M
    STAGES: gl.constexpr = T.STAGES
    BLOCK_N: gl.constexpr = T.BLOCK_N
    COLS: gl.constexpr = D // 2
    COLS_V: gl.constexpr = DV // 2
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    VL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS_V, 16])
    dtype: gl.constexpr = q_s.dtype
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, tile0 = q_side[3], q_side[4]
    N = k_side[3]
    m_lo, m_hi = query_range(n, M, N, band, F, T)
    group = sizes[2] // sizes[3]
    total = (m_hi - m_lo) * group
    key0 = n * BLOCK_N
    whole = unmasked_range(key0, BLOCK_N, M, N, band, m_hi, F, T)
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SL))
    cols = key0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SL))
    k_t = k_s.index(0).reshape([BLOCK_N, D])
    v_t = v_s.index(0).reshape([BLOCK_N, DV])
    k_half = k_t.slice(WG * COLS, COLS, 1)
    dk = gl.zeros([BLOCK_N, COLS], gl.float32, KL)
    dv = gl.zeros([BLOCK_N, COLS_V], gl.float32, VL)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SL)
    STEP: gl.constexpr = direction(F, T)
    m = first_tile(m_lo, m_hi, STEP)
    qt = hk * group * sizes[7] + tile0 + m
    if total > 0:
        mbarrier.wait(kv_full.index(0), 0)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        st = it % STAGES
        ph = (it // STAGES) & 1
        q = q_s.index(st).reshape([BLOCK_M, D])
        do = do_s.index(st).reshape([BLOCK_M, DV])
        p_t, ds_t = p_s.index(it % 2), ds_s.index(it % 2)
        # Q K^T by one warpgroup and dO V^T by the other: half of each would read Q and dO twice
        if WG == 0:
            mbarrier.wait(q_full.index(st), ph)
            s = warpgroup_mma(q, k_t.permute((1, 0)), zeros, use_acc=False, is_async=True)
            lse = lse_s.index(st).load(gl.SliceLayout(1, SL))
        else:
            mbarrier.wait(q_full.index(st), ph)
            mbarrier.wait(do_full.index(st), ph)
            dp = warpgroup_mma(do, v_t.permute((1, 0)), zeros, use_acc=False, is_async=True)
            delta = delta_s.index(st).load(gl.SliceLayout(1, SL))
        if WG == 0:
            s = warpgroup_mma_wait(0, deps=(s,))
            masked = needs_mask(m, whole, F)
            p, x = _probabilities(s, lse, masked, m * BLOCK_M + rows, cols, M, N, band, scores, F)
            p_t.store(p.to(dtype))
            if F.softcap:
                ds_t.store(dcapped(p, x, F).to(dtype))
            fence_async_shared()
            mbarrier.wait(do_full.index(st), ph)
        else:
            dp = warpgroup_mma_wait(0, deps=(dp,))
        barrier_sync(BAR_DS, 256)
        dv = warpgroup_mma(p_t.permute((1, 0)), do.slice(WG * COLS_V, COLS_V, 1), dv, is_async=True)
        if T.DELAY:
            random_delay(T.DELAY)
        if WG == 1:
            p = (ds_t if F.softcap else p_t).load(SL).to(gl.float32)
            ds_t.store((p * (dp + gl.expand_dims(delta, 1))).to(dtype))
            fence_async_shared()
        barrier_sync(BAR_DS, 256)
        part = warpgroup_mma(
            ds_t, k_half, gl.zeros([BLOCK_M, COLS], gl.float32, KL), use_acc=False, is_async=True
        )
        dk = warpgroup_mma(ds_t.permute((1, 0)), q.slice(WG * COLS, COLS, 1), dk, is_async=True)
        dv, part = warpgroup_mma_wait(1, deps=(dv, part))
        barrier_arrive(BAR_DO + st, 288)
        if T.ORDERED:
            # the producer passes the turn on
            spin_until(turns + qt * 2 + WG, turn_of(n, m, M, N, band, F, T))
        reduce_add_quads(dq_acc + (qt * 2 + WG).to(gl.int64) * (64 * COLS), part, COLS // 8)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        barrier_arrive(BAR_Q + st, 288)
        m += STEP
        qt += STEP
        if (m == m_hi) | (m < m_lo):
            m = first_tile(m_lo, m_hi, STEP)
            qt += sizes[7] - (m_hi - m_lo) * STEP
    barrier_sync(BAR_DS, 256)  # the other warpgroup has read its last K and V
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    row, slot = n * BLOCK_N, k_side[2]
    v_t.slice(WG * COLS_V, COLS_V, 1).store(dv.to(dtype))
    k_half.store((dk * scale).to(dtype))
    fence_async_shared()
    barrier_sync(BAR_DS, 256)
    # both warpgroups have filled half of each tile; each writes one of them
    if WG == 0:
        tma_store(dv_desc, box(k_side, hk, row, slot, units[5], F.ragged), v_s.index(0))
    else:
        tma_store(dk_desc, box(k_side, hk, row, slot, units[4], F.ragged), k_s.index(0))
    tma.store_wait(0)
