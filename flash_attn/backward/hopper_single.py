"""The Hopper backward for short sequences of head dimension 64: one warpgroup a program, two programs a processor.

A program owns 128 keys, as two blocks of 64, and takes 64 queries a step. It has no producer: the warpgroup that
multiplies starts the loads itself, two steps ahead. What a program waits for at its start (its keys) and at its end
(its gradients) passes while the other program of the processor multiplies; with few steps that is a third of its time.
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

from flash_attn.backward.hopper_ops import fragment_rows, mask_columns, per_column, program_again, stacked
from flash_attn.backward.hopper_tiles import (
    box,
    count_zeroed,
    needs_mask,
    place,
    query_range,
    unmasked_range,
    wait_for_zeros,
    zero_share,
    zeroing_warps,
)
from flash_attn.tile.hopper import random_delay, tma_load, tma_reduce_add, tma_store
from flash_attn.tile.score import capped, dcapped


@gluon.jit
def opaque(x):
    """x, which the compiler must take for something new: what is computed from it is not kept across the loop."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def probabilities(s, lse_s, masked, key0, row0, sides, band, scores, BLOCK_M: gl.constexpr, F: gl.constexpr):
    """(P^T, x of `tile/score.py`) of products of the 64 keys from key0 on with the queries from row0 on.

    Like `hopper_narrow.probabilities`, but the mask's limits are made where they are needed: no registers are left.
    """
    inner, outer = scores
    M, N = sides
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    x = capped(s, inner, F)
    kept = x
    if masked:
        keys = key0 + opaque(gl.arange(0, 64, gl.SliceLayout(1, SL)))
        lo = gl.zeros([64], gl.int32, gl.SliceLayout(1, SL))
        hi = lo
        if F.right:
            lo = keys - (N - M) - band[1] - row0
        if F.left:
            hi = keys - (N - M) + band[0] - row0
        lo = gl.where(keys < N, lo, 1 << 30)
        kept = mask_columns(x, lo, hi, F.left, BLOCK_M, SL)
    if F.softcap:
        return gl.exp2(kept * outer + gl.expand_dims(lse_s.load(gl.SliceLayout(0, SL)), 0)), x
    else:
        return gl.exp2(kept * outer), x  # s began as -lse / scale, so this is relative to the row's lse


@gluon.jit
def start_scores(k, q, lse_s, BLOCK_M: gl.constexpr, D: gl.constexpr, F: gl.constexpr):
    """S^T of 64 keys and the queries of a step, in flight; without a softcap it begins as -lse / scale."""
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    if F.softcap:  # noqa: SIM108  compile time
        init = gl.zeros([64, BLOCK_M], gl.float32, SL)
    else:
        init = per_column(lse_s, BLOCK_M, SL)
    return warpgroup_mma(k.reshape([64, D]), q.reshape([BLOCK_M, D]).permute((1, 0)), init, is_async=True)


@gluon.jit
def fetch(it, at, wanted, load, q_side, F: gl.constexpr, T: gl.constexpr):
    """Start the loads of step `it` if `wanted`: query tile m of head h, at = (h, m). Returns where the next one is."""
    descs, units, rings, full, sizes, tiles = load
    q_desc, do_desc, stats_desc = descs
    q_s, do_s, stats_s = rings
    h, m = at
    st = it % T.STAGES
    bar = full.index(st)
    M, stats = q_side[3], (h * sizes[7] + q_side[4] + m) * (2 * T.BLOCK_M)
    size: gl.constexpr = q_desc.block_type.nbytes + do_desc.block_type.nbytes + stats_desc.block_type.nbytes
    mbarrier.expect(bar, size, pred=wanted)
    tma_load(q_desc, box(q_side, h, m * T.BLOCK_M, M, units[0], F.ragged), bar, q_s.index(st), pred=wanted)
    tma_load(stats_desc, [stats], bar, stats_s.index(st), pred=wanted)
    tma_load(do_desc, box(q_side, h, m * T.BLOCK_M, M, units[1], F.ragged), bar, do_s.index(st), pred=wanted)
    m += 1
    if m >= tiles[1]:
        m = tiles[0]
        h += 1
    return h, m


@gluon.jit
def attn_bwd_hopper_single(
    q_desc, do_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc,
    units, dq_acc, zeroed, turns, seqs, sizes, band, scores, scale,
    F: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one key tile per program; 4 warps. Arguments are those of `hopper.attn_bwd_hopper`; a box of
    the row statistics holds both rows, and turns is None."""
    D: gl.constexpr = T.D
    DV: gl.constexpr = T.DV
    BLOCK_M: gl.constexpr = T.BLOCK_M
    STAGES: gl.constexpr = T.STAGES
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    dtype: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PIECE: gl.constexpr = BLOCK_M * D // 256  # rows of 256 in the sums of a query tile
    q_s = gl.allocate_shared_memory(dtype, stacked(STAGES, q_desc.block_type.shape), q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, stacked(STAGES, do_desc.block_type.shape), do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, stacked(2, k_desc.block_type.shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, stacked(2, v_desc.block_type.shape), v_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_M], SWIZZLED)
    dq_s = gl.allocate_shared_memory(gl.float32, [PIECE, 256], dq_desc.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], stats_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    fence_async_shared()

    n, hk, q_side, k_side = place(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    m_lo, m_hi = query_range(n, M, N, band, F, T)
    group = sizes[13]
    total = (m_hi - m_lo) * group
    key0 = n * T.BLOCK_N
    load = ((q_desc, do_desc, stats_desc), units, (q_s, do_s, stats_s), full, sizes, (m_lo, m_hi))
    works = total > 0
    mbarrier.expect(kv_full.index(0), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes), pred=works)
    for i in gl.static_range(2):
        at = box(k_side, hk, key0 + i * 64, N, units[2], F.ragged)
        tma_load(k_desc, at, kv_full.index(0), k_s.index(i), pred=works)
    following = fetch(0, (hk * group, m_lo), works, load, q_side, F, T)
    for i in gl.static_range(2):
        at = box(k_side, hk, key0 + i * 64, N, units[3], F.ragged)
        tma_load(v_desc, at, kv_full.index(0), v_s.index(i), pred=works)
    following = fetch(1, following, total > 1, load, q_side, F, T)
    zero_share(dq_acc, seqs, sizes, T)  # under the loads
    whole0 = unmasked_range(key0, 64, M, N, band, m_hi, F, T)
    whole1 = unmasked_range(key0 + 64, 64, M, N, band, m_hi, F, T)
    dk0 = gl.zeros([64, D], gl.float32, KL)
    dk1 = gl.zeros([64, D], gl.float32, KL)
    dv0 = gl.zeros([64, DV], gl.float32, VL)
    dv1 = gl.zeros([64, DV], gl.float32, VL)
    m = m_lo
    qt = hk * group * sizes[7] + q_side[4] + m
    if works:
        wait_for_zeros(zeroed, sizes, zeroing_warps(T))
    mbarrier.wait(kv_full.index(0), 0, pred=works)
    mbarrier.wait(full.index(0), 0, pred=works)
    # S of the first block is always started a step ahead; what it is made of behind the last step does not matter
    s = start_scores(k_s.index(0), q_s.index(0), stats_s.index(0).slice(0, BLOCK_M), BLOCK_M, D, F)
    count_zeroed(zeroed, sizes)  # here the fence need not wait for the zeros any more
    s = warpgroup_mma_wait(0, deps=(s,))
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        st = it % STAGES
        q = q_s.index(st).reshape([BLOCK_M, D])
        do = do_s.index(st).reshape([BLOCK_M, DV])
        lse_s = stats_s.index(st).slice(0, BLOCK_M)
        delta_s = stats_s.index(st).slice(BLOCK_M, BLOCK_M)
        # the compiler would keep the addresses of all operands across the loop, and spill them
        zero = opaque(0)
        k0 = k_s.index(zero).reshape([64, D])
        k1 = k_s.index(zero + 1).reshape([64, D])
        v0 = v_s.index(zero).reshape([64, DV])
        v1 = v_s.index(zero + 1).reshape([64, DV])
        ds0, ds1 = ds_s.index(zero), ds_s.index(zero + 1)
        # dP begins as -delta, as S began as -lse: no registers hold the row statistics
        dp = warpgroup_mma(v0, do.permute((1, 0)), per_column(delta_s, BLOCK_M, SL), is_async=True)
        p, x = probabilities(
            s, lse_s, needs_mask(m, whole0, F), key0, m * BLOCK_M, (M, N), band, scores, BLOCK_M, F
        )
        p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, VL, 2), assert_trivial=True)
        dv0 = warpgroup_mma(p16, do, dv0, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds16 = dcapped(p * dp, x, F).to(dtype)
        ds_r = gl.convert_layout(ds16, gl.DotOperandLayout(0, KL, 2), assert_trivial=True)
        dv0 = warpgroup_mma_wait(0, deps=(dv0,))  # its operand's registers are needed
        dp_init = per_column(delta_s, BLOCK_M, SL)
        s = start_scores(k_s.index(zero + 1), q_s.index(st), lse_s, BLOCK_M, D, F)
        dp = warpgroup_mma(v1, do.permute((1, 0)), dp_init, is_async=True)
        dk0 = warpgroup_mma(ds_r, q, dk0, is_async=True)
        ds0.store(ds16)
        s = warpgroup_mma_wait(2, deps=(s,))
        masked = needs_mask(m, whole1, F)
        p, x = probabilities(s, lse_s, masked, key0 + 64, m * BLOCK_M, (M, N), band, scores, BLOCK_M, F)
        dp, dk0 = warpgroup_mma_wait(0, deps=(dp, dk0))
        p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, VL, 2), assert_trivial=True)
        dv1 = warpgroup_mma(p16, do, dv1, is_async=True)
        ds16 = dcapped(p * dp, x, F).to(dtype)
        ds_r = gl.convert_layout(ds16, gl.DotOperandLayout(0, KL, 2), assert_trivial=True)
        dk1 = warpgroup_mma(ds_r, q, dk1, is_async=True)
        ds1.store(ds16)
        fence_async_shared()
        if T.DELAY:
            random_delay(T.DELAY)
        no_dq = gl.zeros([BLOCK_M, D], gl.float32, KL)
        dq = warpgroup_mma(ds0.permute((1, 0)), k0, no_dq, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds1.permute((1, 0)), k1, dq, is_async=True)
        after = (it + 1) % STAGES
        mbarrier.wait(full.index(after), ((it + 1) // STAGES) & 1, pred=it + 1 < total)
        dq, dk1, dv1 = warpgroup_mma_wait(0, deps=(dq, dk1, dv1))
        s = start_scores(
            k_s.index(zero), q_s.index(after), stats_s.index(after).slice(0, BLOCK_M), BLOCK_M, D, F
        )
        tma.store_wait(0)
        dq_s.store(fragment_rows(dq, D // 8))
        fence_async_shared()
        tma_reduce_add(dq_desc, [qt * PIECE, 0], dq_s)
        following = fetch(it, following, it + STAGES < total, load, q_side, F, T)
        s = warpgroup_mma_wait(0, deps=(s,))
        m += 1
        qt += 1
        if m == m_hi:
            m = m_lo
            qt += sizes[7] - (m_hi - m_lo)
    n, hk, q_side, k_side = place(program_again(), seqs, sizes, F, T)
    row, slot = n * T.BLOCK_N, k_side[2]
    v_s.index(0).reshape([64, DV]).store(dv0.to(dtype))
    v_s.index(1).reshape([64, DV]).store(dv1.to(dtype))
    k_s.index(0).reshape([64, D]).store((dk0 * scale).to(dtype))
    k_s.index(1).reshape([64, D]).store((dk1 * scale).to(dtype))
    fence_async_shared()
    for i in gl.static_range(2):
        tma_store(dv_desc, box(k_side, hk, row + i * 64, slot, units[5], F.ragged), v_s.index(i))
        tma_store(dk_desc, box(k_side, hk, row + i * 64, slot, units[4], F.ragged), k_s.index(i))
    tma.store_wait(0)
