"""dQ of the Hopper backward for head dimensions above 128, in a kernel of its own: the same bits in every run.

A program owns 128 queries of one head, 64 to a warpgroup, and walks over the key tiles that they see: S = Q K^T,
dP = dO V^T, dQ += dS K. dS goes from registers into the product, so the warpgroups share nothing but K and V, which
a producer brings through TMA, and one computes dS while the tensor cores work for the other.
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

from flash_attn.backward.hopper_ops import mask_columns, program_again, stacked
from flash_attn.backward.hopper_tiles import box, place
from flash_attn.tile.hopper import barrier_arrive, barrier_sync, random_delay, tma_load, tma_store
from flash_attn.tile.mask import full_range, key_range
from flash_attn.tile.score import capped, dcapped

ROWS = gl.constexpr(128)  # queries of a program
KEYS = gl.constexpr(64)  # keys of a step
# Named barriers, all 384 threads
BAR_K: gl.constexpr = gl.constexpr(12)  # + stage: K may be overwritten
BAR_V: gl.constexpr = gl.constexpr(14)  # + stage: V may be overwritten


@gluon.jit
def _query_tile(program, seqs, sizes, F: gl.constexpr, T: gl.constexpr):
    """(first query, head, query side, key side) of a program; with a causal mask the longest first."""
    m, h, q_side, k_side = place(program, seqs, sizes, F, T)
    if F.right:
        m = sizes[6] - 1 - m
    return m * ROWS, h, q_side, k_side


@gluon.jit
def _key_tiles(row, COUNT: gl.constexpr, M, N, band, F: gl.constexpr):
    """(first, number) of the key tiles that COUNT queries from `row` on see."""
    lo, hi = key_range(row, gl.minimum(row + COUNT, M), M, N, band, F)
    first = lo // KEYS
    count = gl.maximum(gl.cdiv(gl.maximum(hi, 0), KEYS) - first, 0)
    return first, gl.where(row < M, count, 0)


@gluon.jit
def _load(desc, it, side, key, h, unit, ring, full, BAR: gl.constexpr, F: gl.constexpr):
    """Keys from `key` on, the program's step `it`, into a ring of K or V once its buffer is free."""
    STAGES: gl.constexpr = ring.shape[0]
    st = it % STAGES
    if it >= STAGES:
        barrier_sync(BAR + st, 384)
    mbarrier.expect(full.index(st), desc.block_type.nbytes)
    tma_load(desc, box(side, h, key, side[3], unit, F.ragged), full.index(st), ring.index(st))


@gluon.jit
def _load_queries(desc, side, row, h, unit, smem, full, F: gl.constexpr):
    """Q or dO of both warpgroups."""
    for w in gl.static_range(2):
        mbarrier.expect(full.index(w), desc.block_type.nbytes)
        tma_load(desc, box(side, h, row + w * 64, side[3], unit, F.ragged), full.index(w), smem.index(w))


@gluon.jit
def _produce(work, F: gl.constexpr, T: gl.constexpr):
    """Q and dO once, and the rings of K and V."""
    descs, units, smems, bars, problem = work
    seqs, sizes, band = problem[0], problem[1], problem[2]
    q_desc, do_desc, k_desc, v_desc = descs
    q_s, do_s, k_s, v_s = smems
    q_full, do_full, k_full, v_full = bars
    row, h, q_side, k_side = _query_tile(gl.program_id(0), seqs, sizes, F, T)
    first, total = _key_tiles(row, ROWS, q_side[3], k_side[3], band, F)
    hk = h // sizes[13]
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        key = (first + it) * KEYS
        _load(k_desc, it, k_side, key, hk, units[2], k_s, k_full, BAR_K, F)
        if it == 0:
            _load_queries(q_desc, q_side, row, h, units[0], q_s, q_full, F)
        _load(v_desc, it, k_side, key, hk, units[3], v_s, v_full, BAR_V, F)
        if it == 0:
            _load_queries(do_desc, q_side, row, h, units[1], do_s, do_full, F)


@gluon.jit
def _start_s(q, k_s, k_full, it, total, T: gl.constexpr, SL: gl.constexpr):
    """Begin S of step `it`.

    Behind the last step this multiplies what lies in shared memory: a product behind a branch would make ptxas
    serialise all of them.
    """
    STAGES: gl.constexpr = k_s.shape[0]
    st = it % STAGES
    mbarrier.wait(k_full.index(st), (it // STAGES) & 1, pred=it < total)
    k = k_s.index(st).reshape([KEYS, T.D]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([64, KEYS], gl.float32, SL), use_acc=False, is_async=True)


@gluon.jit
def _consume(work, WG: gl.constexpr, F: gl.constexpr, T: gl.constexpr):
    """Warpgroup WG: queries WG * 64 to WG * 64 + 63 of the program."""
    dq_desc, units, stats, smems, bars, problem = work
    seqs, sizes, band, scores, scale = problem
    inner, outer = scores
    q_s, do_s, k_s, v_s = smems
    q_full, do_full, k_full, v_full = bars
    D: gl.constexpr = T.D
    K_STAGES: gl.constexpr = k_s.shape[0]
    V_STAGES: gl.constexpr = v_s.shape[0]
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = q_s.dtype
    row, h, q_side, k_side = _query_tile(gl.program_id(0), seqs, sizes, F, T)
    M, N = q_side[3], k_side[3]
    first, loaded = _key_tiles(row, ROWS, M, N, band, F)
    total = loaded
    row += WG * 64
    if F.right and WG == 0:
        # what only the second warpgroup sees comes last, and nobody waits until that is free again
        total = _key_tiles(row, 64, M, N, band, F)[1]
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, SL))
    at = stats + (h * sizes[7] + q_side[4]).to(gl.int64) * (2 * T.BLOCK_M)
    at += rows // T.BLOCK_M * (2 * T.BLOCK_M) + rows % T.BLOCK_M
    lse = gl.load(at, mask=rows < M, other=float("-inf"))
    if not F.softcap:
        lse *= outer  # it comes in the units of the products
    delta = gl.load(at + T.BLOCK_M, mask=rows < M, other=0.0)
    lse, delta = gl.expand_dims(lse, 1), gl.expand_dims(delta, 1)
    whole_lo, whole_hi = full_range(row, row + 64, M, N, band, F)
    # keys that a query sees: lo <= key <= hi
    lo = gl.zeros([64], gl.int32, gl.SliceLayout(1, SL))
    hi = lo + (N - 1)
    if F.left:
        lo = rows + (N - M - band[0])
    if F.right:
        hi = gl.minimum(rows + (N - M + band[1]), N - 1)
    q = q_s.index(WG).reshape([64, T.D])
    do = do_s.index(WG).reshape([64, T.DV])
    dq = gl.zeros([64, D], gl.float32, QL)
    key = first * KEYS
    # also if only the other warpgroup sees a key: dQ leaves through the memory of Q
    mbarrier.wait(q_full.index(WG), 0, pred=loaded > 0)
    s = _start_s(q, k_s, k_full, 0, total, T, SL)
    mbarrier.wait(do_full.index(WG), 0, pred=loaded > 0)
    s = warpgroup_mma_wait(0, deps=(s,))
    for it in range(total):
        if T.DELAY:
            random_delay(T.DELAY)
        k_st, v_st = it % K_STAGES, it % V_STAGES
        mbarrier.wait(v_full.index(v_st), (it // V_STAGES) & 1)
        v = v_s.index(v_st).reshape([KEYS, T.DV]).permute((1, 0))
        dp = warpgroup_mma(do, v, gl.zeros([64, KEYS], gl.float32, SL), use_acc=False, is_async=True)
        x = capped(s, inner, F)
        kept = x
        if (key < whole_lo) | (key + KEYS > whole_hi):
            kept = mask_columns(x, lo - key, hi - key, True, KEYS, SL)
        p = dcapped(gl.exp2(kept * outer + lse), x, F)
        # nothing to wait for; but without a branch here ptxas moves the wait for dP ahead of the exponentials
        mbarrier.wait(k_full.index(k_st), (it // K_STAGES) & 1)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        barrier_arrive(BAR_V + v_st, 384)
        ds = gl.convert_layout(
            (p * (dp + delta)).to(dtype), gl.DotOperandLayout(0, QL, 2), assert_trivial=True
        )
        dq = warpgroup_mma(ds, k_s.index(k_st).reshape([KEYS, T.D]), dq, is_async=True)
        s = _start_s(q, k_s, k_full, it + 1, total, T, SL)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        barrier_arrive(BAR_K + k_st, 384)
        s = warpgroup_mma_wait(0, deps=(s,))
        key += KEYS
    row, h, q_side, k_side = _query_tile(program_again(), seqs, sizes, F, T)
    q.store((dq * scale).to(dtype))
    fence_async_shared()
    at = box(q_side, h, row + WG * 64, q_side[2], units[4], F.ragged)
    tma_store(dq_desc, at, q_s.index(WG))
    tma.store_wait(0)


@gluon.jit
def attn_bwd_dq(
    q_desc, do_desc, k_desc, v_desc, dq_desc,  # 64 rows of (batch, heads, rows, dim), or ragged (see tile/hopper.py)
    units,  # of q, dout, k, v, dq: (batch stride, row stride) in 16 bytes; None unless ragged
    stats,  # fp32: per padded query tile, BLOCK_M of -lse (in the score's units), then BLOCK_M of -delta
    seqs,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), each may be None
    sizes,  # those of `hopper.attn_bwd_hopper`, with heads for kv heads and tiles of ROWS queries for key tiles
    band,  # keys (left, right) of the diagonal
    scores,  # `tile/score.py: factors`
    scale,
    F: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """dQ of ROWS queries of one head per program; grid (tiles * batch * heads,), 12 warps."""
    dtype: gl.constexpr = q_desc.dtype
    V_STAGES: gl.constexpr = 1 if T.DV == 256 else 2  # what shared memory holds
    q_s = gl.allocate_shared_memory(dtype, stacked(2, q_desc.block_type.shape), q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, stacked(2, do_desc.block_type.shape), do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, stacked(2, k_desc.block_type.shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, stacked(V_STAGES, v_desc.block_type.shape), v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    smems = (q_s, do_s, k_s, v_s)
    bars = (q_full, do_full, k_full, v_full)
    problem = (seqs, sizes, band, scores, scale)
    load = ((q_desc, do_desc, k_desc, v_desc), units, smems, bars, problem)
    work = (dq_desc, units, stats, smems, bars, problem)
    # 240 registers for a consumer's thread, which leaves 24 for the producer's. As the first partition a consumer
    # would compute the addresses of all its operands ahead of the loop, and spill them.
    gl.warp_specialize([
        (_produce, (load, F, T)), (_consume, (work, 0, F, T)), (_consume, (work, 1, F, T)),
    ], [4, 4], [240, 240])  # fmt: skip
