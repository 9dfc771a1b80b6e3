"""dK and dV of the Hopper backward for head dimensions above 128; the kernel is in `hopper.py`, dQ's in `hopper_dq.py`.

64 queries by 64 keys a step, on transposed tiles. A sum of 64 keys by 256 columns takes half of the registers of a
warpgroup, so each has one: the first owns dV and computes P, the second owns dK and computes dS. P and dS enter the
products from registers; P goes on to the second through shared memory. Adding dQ here, 64 KiB of fp32 reductions a
step, would cost more than the three products of a second kernel.
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
from flash_attn.backward.hopper_ops import per_column, program_again
from flash_attn.backward.hopper_tiles import (
    BAR_DO,
    BAR_Q,
    box,
    needs_mask,
    place,
    query_range,
    unmasked_range,
)
from flash_attn.tile.hopper import barrier_arrive, barrier_sync, random_delay, tma_store
from flash_attn.tile.score import dcapped

HELD: gl.constexpr = gl.constexpr(128)  # columns of K and of V in registers, see `_times`
# Named barriers of this schedule, both warpgroups
BAR_END: gl.constexpr = gl.constexpr(5)  # all products are done
BAR_P: gl.constexpr = gl.constexpr(8)  # + step % 2: P is written


@gluon.jit
def _held(x, D: gl.constexpr, SL: gl.constexpr):
    """(64, D) in shared memory as a left operand of `_times`: its first columns in registers."""
    L: gl.constexpr = gl.DotOperandLayout(0, SL, 2)
    if D <= HELD:
        return (x.load(L),)
    else:
        return x.slice(0, HELD, 1).load(L), x.slice(HELD, D - HELD, 1)


@gluon.jit
def _times(a, b, acc, USE: gl.constexpr, D: gl.constexpr):
    """Begin a b^T, added to `acc` if USE; b is (64, D).

    A product of 64 by 64 with both operands in shared memory reads all of the 128 bytes a cycle that there are.
    """
    if len(a) == 1:
        return warpgroup_mma(a[0], b.permute((1, 0)), acc, use_acc=USE, is_async=True)
    else:
        acc = warpgroup_mma(a[0], b.slice(0, HELD, 1).permute((1, 0)), acc, use_acc=USE, is_async=True)
        return warpgroup_mma(a[1], b.slice(HELD, D - HELD, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _start_s(k, q_s, lse_s, q_full, it, F: gl.constexpr, T: gl.constexpr, SL: gl.constexpr):
    """Begin S^T of step `it`; -lse / scale is its initial value."""
    BLOCK_M: gl.constexpr = T.BLOCK_M
    st = it % T.STAGES
    mbarrier.wait(q_full.index(st), (it // T.STAGES) & 1)
    q = q_s.index(st).reshape([BLOCK_M, T.D])
    if F.softcap:
        return _times(k, q, gl.zeros([64, BLOCK_M], gl.float32, SL), False, T.D)
    else:
        return _times(k, q, per_column(lse_s.index(st), BLOCK_M, SL), True, T.D)


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
    barrier_arrive(BAR_Q + st, 288)
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
    descs, units, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s = smems
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
    v = v_s.index(0).reshape([BLOCK_N, DV])
    dv = gl.zeros([BLOCK_N, DV], gl.float32, VL)
    m = m_lo
    mbarrier.wait(kv_full.index(0), 0, pred=total > 0)
    k = _held(k_s.index(0).reshape([BLOCK_N, T.D]), T.D, SL)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        s = warpgroup_mma_wait(0, deps=(_start_s(k, q_s, lse_s, q_full, it, F, T, SL),))
        p16 = _finish_p(s, it, m, whole, lo, hi, lse_s, p_s, scores, F, T, SL)
        dv = _add_dv(p16, dv, do_s, do_full, it, T, VL)
        m += 1
        if m == m_hi:
            m = m_lo
        dv = warpgroup_mma_wait(0, deps=(dv,))
        barrier_arrive(BAR_DO + it % T.STAGES, 288)
    barrier_sync(BAR_END, 256)  # V has been read
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
    return _times(v, do_s.index(st).reshape([T.BLOCK_M, T.DV]), dp_init, True, T.DV)


@gluon.jit
def _finish_ds(dp, it, p_s, T: gl.constexpr, SL: gl.constexpr):
    """dS^T of step `it` in 16 bits."""
    barrier_arrive(BAR_DO + it % T.STAGES, 288)
    barrier_sync(BAR_P + it % 2, 256)
    return (p_s.index(it % 2).load(SL).to(gl.float32) * dp).to(p_s.dtype)


@gluon.jit
def _add_dk(ds16, dk, q_s, it, T: gl.constexpr, KL: gl.constexpr):
    """Begin dK += dS^T Q of step `it`."""
    ds_r = gl.convert_layout(ds16, gl.DotOperandLayout(0, KL, 2), assert_trivial=True)
    return warpgroup_mma(ds_r, q_s.index(it % T.STAGES).reshape([T.BLOCK_M, T.D]), dk, is_async=True)


@gluon.jit
def sum_dk(work, F: gl.constexpr, T: gl.constexpr):
    """The second warpgroup: dK += dS^T Q, dS^T = P^T (V dO^T - delta)."""
    descs, units, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    q_s, do_s, k_s, v_s, lse_s, delta_s, p_s = smems
    q_full, do_full, kv_full = bars[0], bars[1], bars[2]
    D: gl.constexpr = T.D
    BLOCK_M: gl.constexpr = T.BLOCK_M
    BLOCK_N: gl.constexpr = T.BLOCK_N
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    m_lo, m_hi = query_range(n, q_side[3], k_side[3], band, F, T)
    total = (m_hi - m_lo) * sizes[13]
    k = k_s.index(0).reshape([BLOCK_N, D])
    dk = gl.zeros([BLOCK_N, D], gl.float32, KL)
    mbarrier.wait(kv_full.index(0), 0, pred=total > 0)
    v = _held(v_s.index(0).reshape([BLOCK_N, T.DV]), T.DV, SL)
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        dp = warpgroup_mma_wait(0, deps=(_start_dp(v, do_s, delta_s, q_full, do_full, it, T, SL),))
        ds16 = _finish_ds(dp, it, p_s, T, SL)
        dk = warpgroup_mma_wait(0, deps=(_add_dk(ds16, dk, q_s, it, T, KL),))
        barrier_arrive(BAR_Q + it % T.STAGES, 288)
    barrier_sync(BAR_END, 256)  # K has been read
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    k.store((dk * scale).to(k_s.dtype))
    fence_async_shared()
    tma_store(descs[0], box(k_side, hk, n * BLOCK_N, k_side[2], units[4], F.ragged), k_s.index(0))
    tma.store_wait(0)
