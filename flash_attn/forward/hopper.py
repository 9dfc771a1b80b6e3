"""The forward for Hopper (sm_90a) in Gluon: one TMA producer warp feeds two or three warpgroups of 64 query rows.

Each warpgroup runs the softmax of a key tile while tensor cores work for it (P V of the tile before, OVERLAP) or for
the others; P stays in registers. Programs are persistent: the producer draws tiles from an atomic counter, longest
first (`hopper_tiles.py`). The arithmetic is in `hopper_step.py` and
`hopper_softmax.py`, the host side in `hopper_launch.py`.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from flash_attn.forward.hopper_softmax import (
    first_pivot,
    first_softmax,
    quad_layout,
    rows_layout,
    scale_output,
    softmax,
)
from flash_attn.forward.hopper_step import (
    finish,
    issue_output,
    issue_scores,
    mask,
    query,
    scale_part,
    wait_output,
    wait_output_and_scores,
    zero_output,
)
from flash_attn.forward.hopper_tiles import blocks, key_tile, locate, publish, receive, zero_tail
from flash_attn.tile.hopper import (
    barrier_arrive,
    barrier_sync,
    declare_answer,
    random_delay,
    tma_load,
    tma_rows,
    tma_store,
)
from flash_attn.tile.mask import full_range, key_range
from flash_attn.tile.score import capped


class Config(NamedTuple):
    """Everything the compiler must know; `left`, `right`, `softcap`, `alibi` are what `tile/` asks for."""

    D0: int  # head dim of q and k as one or two power-of-two boxes (D1 0: one)
    D1: int
    V0: int  # the same for v and out
    V1: int
    WARPGROUPS: int  # consumers, 64 query rows each
    BN: int  # keys per tile
    STAGES: int  # key tiles in shared memory
    PINGPONG: bool  # warpgroups issue their products in turn
    CHAIN: (
        bool  # the first scores of the next tile are computed while this one is stored; Q is double buffered
    )
    OVERLAP: (
        bool  # P V is in flight under the next softmax; else it and the next scores go one behind the other
    )
    QREG: int  # columns of Q kept in registers: all, half or none; saves shared-memory bandwidth
    SHARE: bool  # O is staged where Q was
    left: bool = False
    right: bool = False
    softcap: bool = False
    alibi: bool = False
    sink: bool = False
    packed_q: bool = False
    packed_k: bool = False
    used_q: bool = False
    used_k: bool = False
    DELAY: int = 0  # debug: random sleeps up to this many ns in every role


# First id of each group of named barriers, counted down from the top: V free and K free (one per stage), Q free (one
# per Q buffer), and whose turn it is to issue products (one per warpgroup).


@gluon.constexpr_function
def _v_free(C):
    return 16 - C.STAGES


@gluon.constexpr_function
def _k_free(C):
    return 16 - 2 * C.STAGES


@gluon.constexpr_function
def _q_free(C):
    return 16 - 2 * C.STAGES - (2 if C.CHAIN else 1)


@gluon.constexpr_function
def _turn(C):
    return 16 - 2 * C.STAGES - (2 if C.CHAIN else 1) - C.WARPGROUPS


@gluon.constexpr_function
def _threads(C):
    return C.WARPGROUPS * 128 + 32


# ---- producer ------------------------------------------------------------------------------------------------


@gluon.jit
def _load(descs, rings, full, st, b, h, row, length, end, RAGGED: gl.constexpr):
    """One tile of K or V, both parts of the head dim, into stage `st`."""
    at = tma_rows(b, h, row, 0, length, end, RAGGED)
    if descs[1] is not None:
        D0: gl.constexpr = descs[0].block_type.shape[-1]
        mbarrier.expect(full.index(st), descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        tma_load(descs[0], at, full.index(st), rings[0].index(st))
        tma_load(descs[1], tma_rows(b, h, row, D0, length, end, RAGGED), full.index(st), rings[1].index(st))
    else:
        mbarrier.expect(full.index(st), descs[0].block_type.nbytes)
        tma_load(descs[0], at, full.index(st), rings[0].index(st))


@gluon.jit
def _acquire(it, ID: gl.constexpr, DEPTH: gl.constexpr, C: gl.constexpr):
    """The buffer that load number `it` goes to, once the consumers have freed it."""
    if C.DELAY:
        random_delay(C.DELAY)
    if it >= DEPTH:
        barrier_sync(ID + it % DEPTH, _threads(C))
    return it % DEPTH


@gluon.jit
def _produce(work, it, count, descs, rings, bars, lengths, sizes, band, units, C: gl.constexpr):
    q_descs, k_descs, v_descs = descs
    q_ring, k_ring, v_ring = rings
    q_full, k_full, v_full = bars
    W: gl.constexpr = C.WARPGROUPS
    QS: gl.constexpr = 2 if C.CHAIN else 1
    BN: gl.constexpr = C.BN
    RAGGED_Q: gl.constexpr = C.packed_q
    RAGGED_K: gl.constexpr = C.packed_k or C.used_k
    m, h, b, start, M, rows, N = work
    hk = h // sizes[3]
    q_end = 0
    k_end = 0
    v_end = 0
    if RAGGED_Q:
        q_end = (start + M) * units[1]
    if RAGGED_K:
        k_start = 0
        if C.packed_k:
            k_start = gl.load(lengths[1] + b)
        k_end = b * units[2] + (k_start + N) * units[3]
        v_end = b * units[4] + (k_start + N) * units[5]
    lo, n = blocks(m, M, N, band, C)
    row = key_tile(lo, n, 0, C) * BN
    STEP: gl.constexpr = BN if C.right else -BN
    st = _acquire(it, _k_free(C), C.STAGES, C)
    _load(k_descs, k_ring, k_full, st, b, hk, row, N, k_end, RAGGED_K)
    buffer = _acquire(count, _q_free(C), QS, C) * W
    BYTES: gl.constexpr = 64 * (C.D0 + C.D1) * 2
    for w in gl.static_range(W):
        full = q_full.index(buffer + w)
        q_row = (m * W + w) * 64
        mbarrier.expect(full, BYTES)
        tma_load(q_descs[0], tma_rows(b, h, q_row, 0, M, q_end, RAGGED_Q), full, q_ring[0].index(buffer + w))
        if C.D1:
            tma_load(
                q_descs[1], tma_rows(b, h, q_row, C.D0, M, q_end, RAGGED_Q), full, q_ring[1].index(buffer + w)
            )
    for _ in range(1, n):
        st = _acquire(it + 1, _k_free(C), C.STAGES, C)
        _load(k_descs, k_ring, k_full, st, b, hk, row + STEP, N, k_end, RAGGED_K)
        st = _acquire(it, _v_free(C), C.STAGES, C)
        _load(v_descs, v_ring, v_full, st, b, hk, row, N, v_end, RAGGED_K)
        row += STEP
        it += 1
    st = _acquire(it, _v_free(C), C.STAGES, C)
    _load(v_descs, v_ring, v_full, st, b, hk, row, N, v_end, RAGGED_K)
    return it + 1


@gluon.jit
def _producer(common, C: gl.constexpr):
    descs, rings, bars, slot, lengths, sizes, band, units, counter = common
    t_full, t_empty = bars[3:]
    it = gl.to_tensor(0)
    count = gl.to_tensor(0)
    work, seek = locate(gl.program_id(0), (gl.to_tensor(0), gl.to_tensor(0)), lengths, sizes, C)
    publish(work, slot, C)
    mbarrier.arrive(t_full.index(0), count=1)
    while work.m >= 0:
        tile = gl.num_programs(0) + gl.program_id(0)
        if counter is not None:
            # drawn before the loads of this tile, needed after them: the atomic's latency hides behind them
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        it = _produce(work, it, count, descs, rings, bars[:3], lengths, sizes, band, units, C)
        work, seek = locate(tile, seek, lengths, sizes, C)
        mbarrier.wait(t_empty.index(0), count & 1)
        publish(work, slot, C)
        mbarrier.arrive(t_full.index(0), count=1)
        count += 1
    if counter is not None:
        # the last program to finish resets the counters for the next launch
        done = gl.atomic_add(counter + 1, 1, sem="relaxed")
        if done == gl.num_programs(0) - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


# ---- consumers -----------------------------------------------------------------------------------------------


@gluon.jit
def _limits(work, band, WG: gl.constexpr, C: gl.constexpr):
    """(first query row, rows, keys [lo, hi) of each row) of a warpgroup."""
    R: gl.constexpr = rows_layout(C.BN)
    m_lo = (work.m * C.WARPGROUPS + WG) * 64
    rows = m_lo + gl.arange(0, 64, R)
    lo, hi = key_range(rows, rows + 1, work.M, work.N, band, C)
    return m_lo, rows, lo + gl.zeros([64], gl.int32, R), hi + gl.zeros([64], gl.int32, R)


@gluon.jit
def _first_tile(s, work, band, scale, dtype: gl.constexpr, WG: gl.constexpr, C: gl.constexpr):
    """(pivot, l, P) after the first key tile of `work`, whose products are `s`; it is always masked.

    Without OVERLAP its softmax comes later: (pivot, 0, scores).
    """
    _, _, lo, hi = _limits(work, band, WG, C)
    first, n = blocks(work.m, work.M, work.N, band, C)
    s = mask(capped(s, scale[0], C), key_tile(first, n, 0, C), lo, hi, C)
    if C.OVERLAP:
        p16, pivot, l = first_softmax(s, scale[1], dtype, C)
        return pivot, l, p16
    else:
        return first_pivot(s, scale[1], dtype, C), gl.zeros([64, 4], gl.float32, quad_layout(C.BN)), s


@gluon.jit
def _scores(s, n, full, lo, hi, scale, C: gl.constexpr):
    """Soft cap and mask. One loop with a uniform branch: a second, mask-free loop spills at head dim 64."""
    s = capped(s, scale[0], C)
    if (C.left or C.right) and ((n >= full[1]) | (n < full[0])):
        s = mask(s, n, lo, hi, C)
    return s


@gluon.jit
def _overlapped_step(q, rings, bars, it, n, full, lo, hi, state, scale, WG: gl.constexpr, C: gl.constexpr):
    """S(j+1) and P(j) V(j) are in flight together; the softmax of S(j+1) runs under the second."""
    k_ring, v_ring = rings
    k_full, v_full = bars
    pivot, l, acc, p16, factor = state
    nxt = (it + 1) % C.STAGES
    phase = ((it + 1) // C.STAGES) & 1
    cur = it % C.STAGES
    if C.DELAY:
        random_delay(C.DELAY)
    mbarrier.wait(k_full.index(nxt), phase)
    if C.PINGPONG:
        barrier_sync(_turn(C) + WG, 256)
    s = issue_scores(q, k_ring, nxt, C)
    acc = issue_output(p16, v_ring, cur, scale_output(acc, factor, True, C), C)
    if C.PINGPONG:
        barrier_arrive(_turn(C) + (WG + 1) % C.WARPGROUPS, 256)
    OUTPUTS: gl.constexpr = 2 if C.V1 else 1
    s = warpgroup_mma_wait(OUTPUTS, deps=(s,))
    barrier_arrive(_k_free(C) + nxt, _threads(C))
    s = _scores(s, n, full, lo, hi, scale, C)
    p16, pivot, l, _, factor = softmax(s, pivot, l, acc, scale[1], v_ring[0].dtype, C)
    mbarrier.wait(v_full.index(nxt), phase)
    acc = wait_output(0, acc)
    if C.DELAY:
        random_delay(C.DELAY)
    barrier_arrive(_v_free(C) + cur, _threads(C))
    return pivot, l, acc, p16, factor


@gluon.jit
def _serial_step(q, rings, bars, it, n, full, lo, hi, state, scale, WG: gl.constexpr, C: gl.constexpr):
    """The softmax of S(j); then P(j) V(j) and S(j+1) in flight together, while the other warpgroups do theirs."""
    k_ring, v_ring = rings
    k_full, v_full = bars
    pivot, l, acc, s = state
    cur = it % C.STAGES
    nxt = (it + 1) % C.STAGES
    p16, pivot, l, acc, _ = softmax(s, pivot, l, acc, scale[1], v_ring[0].dtype, C)
    if C.DELAY:
        random_delay(C.DELAY)
    mbarrier.wait(v_full.index(cur), (it // C.STAGES) & 1)
    mbarrier.wait(k_full.index(nxt), ((it + 1) // C.STAGES) & 1)
    if C.PINGPONG:
        barrier_sync(_turn(C) + WG, 256)
    acc = issue_output(p16, v_ring, cur, acc, C)
    s = issue_scores(q, k_ring, nxt, C)
    if C.PINGPONG:
        barrier_arrive(_turn(C) + (WG + 1) % C.WARPGROUPS, 256)
    acc, s = wait_output_and_scores(acc, s)
    if C.DELAY:
        random_delay(C.DELAY)
    barrier_arrive(_v_free(C) + cur, _threads(C))
    barrier_arrive(_k_free(C) + nxt, _threads(C))
    return pivot, l, acc, _scores(s, n, full, lo, hi, scale, C)


@gluon.jit
def _store_part(acc, inv, rows, M, buffer, desc, coordinates, D: gl.constexpr, C: gl.constexpr):
    acc = scale_part(acc, inv, D)
    if C.used_q:  # a select, not a factor 0: unused rows of q may hold NaN
        valid = gl.convert_layout(rows < M, rows_layout(D), assert_trivial=True)
        acc = gl.where(gl.expand_dims(valid, 1), acc, 0.0)
    buffer.reshape([64, D]).store(acc.to(buffer.dtype))
    fence_async_shared()
    tma_store(desc, coordinates, buffer)


@gluon.jit
def _store(acc, inv, rows, m_lo, work, o_descs, ring, buffer, units, C: gl.constexpr):
    """O of this warpgroup, through shared memory."""
    o_end = 0
    if C.packed_q:
        o_end = (work.start + work.rows) * units[7]
    tma.store_wait(0)
    at = tma_rows(work.b, work.h, m_lo, 0, work.rows, o_end, C.packed_q)
    _store_part(acc[0], inv, rows, work.M, ring[0].index(buffer), o_descs[0], at, C.V0, C)
    if C.V1:
        at = tma_rows(work.b, work.h, m_lo, C.V0, work.rows, o_end, C.packed_q)
        _store_part(acc[1], inv, rows, work.M, ring[1].index(buffer), o_descs[1], at, C.V1, C)


@gluon.jit
def _consumer(common, WG: gl.constexpr, C: gl.constexpr):
    o_descs, lse, sink, rings, bars, slot, sizes, band, units, scale = common
    q_ring, k_ring, v_ring, o_ring = rings
    q_full, k_full, v_full, t_full, t_empty = bars
    W: gl.constexpr = C.WARPGROUPS
    QS: gl.constexpr = 2 if C.CHAIN else 1
    BN: gl.constexpr = C.BN
    SCORES: gl.constexpr = 2 if (C.D1 or (C.QREG and C.QREG < C.D0)) else 1
    it = gl.to_tensor(0)
    count = gl.to_tensor(0)
    if C.PINGPONG and WG == 0:
        barrier_arrive(_turn(C), 256)
    work = receive(slot, t_full, t_empty, count, sizes, C)
    # Programs without work still compute scores (of whatever lies in shared memory): a product behind a branch would
    # make ptxas serialise all of them.
    mbarrier.wait(q_full.index(WG), 0, pred=work.m >= 0)
    mbarrier.wait(k_full.index(0), 0, pred=work.m >= 0)
    s = warpgroup_mma_wait(0, deps=(issue_scores(query(q_ring, WG, C), k_ring, 0, C),))
    barrier_arrive(_k_free(C), _threads(C))
    pivot, l, tile = _first_tile(s, work, band, scale, v_ring[0].dtype, WG, C)  # P, or S without OVERLAP
    while work.m >= 0:
        m_lo, rows, lo, hi = _limits(work, band, WG, C)
        first, n = blocks(work.m, work.M, work.N, band, C)
        full_lo, full_hi = full_range(m_lo, m_lo + 64, work.M, work.N, band, C)
        full = (gl.cdiv(full_lo, BN), gl.maximum(full_hi, 0) // BN)
        buffer = (count % QS) * W + WG
        q = query(q_ring, buffer, C)
        acc = zero_output(C)
        if C.OVERLAP:
            p16 = tile
            factor = gl.full([64, 4], 1.0, gl.float32, quad_layout(BN))
            mbarrier.wait(v_full.index(it % C.STAGES), (it // C.STAGES) & 1)
            for j in range(1, n):
                pivot, l, acc, p16, factor = _overlapped_step(
                    q, (k_ring, v_ring), (k_full, v_full), it, key_tile(first, n, j, C), full, lo, hi,
                    (pivot, l, acc, p16, factor), scale, WG, C,
                )  # fmt: skip
                it += 1
        else:
            for j in range(1, n):
                pivot, l, acc, tile = _serial_step(
                    q, (k_ring, v_ring), (k_full, v_full), it, key_tile(first, n, j, C), full, lo, hi,
                    (pivot, l, acc, tile), scale, WG, C,
                )  # fmt: skip
                it += 1
            p16, pivot, l, acc, _ = softmax(tile, pivot, l, acc, scale[1], v_ring[0].dtype, C)
            mbarrier.wait(v_full.index(it % C.STAGES), (it // C.STAGES) & 1)
        if not C.SHARE:
            barrier_arrive(_q_free(C) + count % QS, _threads(C))
        cur = it % C.STAGES
        it += 1
        nxt = it % C.STAGES
        phase = (it // C.STAGES) & 1
        following = receive(slot, t_full, t_empty, count + 1, sizes, C)
        more = following.m >= 0
        next_buffer = ((count + 1) % QS) * W + WG
        next_phase = ((count + 1) // QS) & 1
        if C.CHAIN:
            mbarrier.wait(k_full.index(nxt), phase, pred=more)
            mbarrier.wait(q_full.index(next_buffer), next_phase, pred=more)
        if C.PINGPONG:
            barrier_sync(_turn(C) + WG, 256)
        if C.OVERLAP:
            acc = scale_output(acc, factor, True, C)
        acc = issue_output(p16, v_ring, cur, acc, C)
        if C.CHAIN:
            s = issue_scores(query(q_ring, next_buffer, C), k_ring, nxt, C)
        if C.PINGPONG:
            barrier_arrive(_turn(C) + (WG + 1) % W, 256)
        inv, log_sum = finish(pivot, l, rows, work, sink, C)
        offset = work.b.to(gl.int64) * sizes[9] + work.h.to(gl.int64) * sizes[10] + work.start
        gl.store(lse + offset + rows, log_sum, mask=rows < work.rows)
        acc = wait_output(SCORES if C.CHAIN else 0, acc)
        barrier_arrive(_v_free(C) + cur, _threads(C))
        _store(acc, inv, rows, m_lo, work, o_descs, o_ring, buffer if C.SHARE else WG, units, C)
        if not C.CHAIN:
            if C.SHARE:
                tma.store_wait(0)
                barrier_arrive(_q_free(C), _threads(C))
            mbarrier.wait(k_full.index(nxt), phase, pred=more)
            mbarrier.wait(q_full.index(next_buffer), next_phase, pred=more)
            s = issue_scores(query(q_ring, next_buffer, C), k_ring, nxt, C)
        s = warpgroup_mma_wait(0, deps=(s,))
        barrier_arrive(_k_free(C) + nxt, _threads(C))
        pivot, l, tile = _first_tile(s, following, band, scale, v_ring[0].dtype, WG, C)
        if C.CHAIN and C.SHARE:
            tma.store_wait(0)
            barrier_arrive(_q_free(C) + count % QS, _threads(C))
        work = following
        count += 1
    tma.store_wait(0)


RUN_TIME = ["lse", "out", "sink", "counter", "lengths", "sizes", "band", "units", "scale"]


@gluon.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=RUN_TIME)
def attn_fwd_hopper(
    q0, q1, k0, k1, v0, v1, o0, o1,  # TMA descriptors of the parts; the second may be None
    lse, out, sink, counter, lengths, sizes, band, units, scale, C: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """softmax(scale Q K^T) V for all tiles.

    Args:
        lse: fp32, (B, H, M) or (H, total_q). out: pointer of packed outputs, else None. sink: (H,) or None.
        counter: int32 (2,), zero; is zero again at the end. None: there are no more tiles than programs.
        lengths: (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), int32 or None.
        sizes: (max_q, max_k, heads, query heads per key head, batch, swizzle, query blocks, tiles, total_q,
            lse strides of batch and head).
        band: (left, right). units: (batch, row) strides of q, k, v, out in 16 bytes, or None if no box is ragged.
        scale: `tile/score.py: factors`.
    """
    W: gl.constexpr = C.WARPGROUPS
    STAGES: gl.constexpr = C.STAGES
    QBUF: gl.constexpr = W * 2 if C.CHAIN else W
    q0_ring = gl.allocate_shared_memory(q0.dtype, [QBUF] + q0.block_type.shape, q0.layout)
    k0_ring = gl.allocate_shared_memory(k0.dtype, [STAGES] + k0.block_type.shape, k0.layout)
    v0_ring = gl.allocate_shared_memory(v0.dtype, [STAGES] + v0.block_type.shape, v0.layout)
    q_ring, k_ring, v_ring = (q0_ring, None), (k0_ring, None), (v0_ring, None)
    if q1 is not None:
        q_ring = (q0_ring, gl.allocate_shared_memory(q1.dtype, [QBUF] + q1.block_type.shape, q1.layout))
    if k1 is not None:
        k_ring = (k0_ring, gl.allocate_shared_memory(k1.dtype, [STAGES] + k1.block_type.shape, k1.layout))
    if v1 is not None:
        v_ring = (v0_ring, gl.allocate_shared_memory(v1.dtype, [STAGES] + v1.block_type.shape, v1.layout))
    if C.SHARE:
        o_ring = q_ring
    else:
        o0_ring = gl.allocate_shared_memory(o0.dtype, [W] + o0.block_type.shape, o0.layout)
        o_ring = (o0_ring, None)
        if o1 is not None:
            o_ring = (o0_ring, gl.allocate_shared_memory(o1.dtype, [W] + o1.block_type.shape, o1.layout))
    q_full = gl.allocate_shared_memory(gl.int64, [QBUF, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    slot = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(QBUF):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    mbarrier.init(t_full.index(0), count=1)
    mbarrier.init(t_empty.index(0), count=W)
    fence_async_shared()

    declare_answer()
    if out is not None:
        zero_tail(out, lse, lengths[0], sizes, DV)
    bars = (q_full, k_full, v_full, t_full, t_empty)
    rings = (q_ring, k_ring, v_ring, o_ring)
    common = ((o0, o1), lse, sink, rings, bars, slot, sizes, band, units, scale)
    loads = (((q0, q1), (k0, k1), (v0, v1)), rings[:3], bars, slot, lengths, sizes, band, units, counter)
    if W == 2:
        gl.warp_specialize(
            [(_consumer, (common, 0, C)), (_consumer, (common, 1, C)), (_producer, (loads, C))],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    elif W == 3:
        gl.warp_specialize(
            [
                (_consumer, (common, 0, C)),
                (_consumer, (common, 1, C)),
                (_consumer, (common, 2, C)),
                (_producer, (loads, C)),
            ],
            [4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (common, 0, C)),
                (_consumer, (common, 1, C)),
                (_consumer, (common, 2, C)),
                (_consumer, (common, 3, C)),
                (_producer, (loads, C)),
            ],
            [4, 4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )
