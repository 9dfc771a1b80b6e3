"""The forward for Hopper (sm_90a) in Gluon: one TMA producer warp feeds two to four warpgroups of 64 query rows.

Each warpgroup runs the softmax of a key tile while tensor cores work for it (P V of the tile before, OVERLAP) or for
the others; P stays in registers. Programs are persistent: the producer (`hopper_load.py`) draws tiles from an atomic
counter, longest first (`hopper_tiles.py`). The arithmetic is in `hopper_step.py` and `hopper_softmax.py`, the host side
in `hopper_launch.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from flash_attn.forward.hopper_config import k_free, passes_over, q_free, threads, turn, v_free
from flash_attn.forward.hopper_load import producer
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
from flash_attn.forward.hopper_tiles import blocks, key_tile, receive, zero_tail
from flash_attn.tile.hopper import (
    barrier_arrive,
    barrier_sync,
    declare_answer,
    random_delay,
    tma_rows,
    tma_store,
)
from flash_attn.tile.mask import full_range, key_range
from flash_attn.tile.score import capped


@gluon.jit
def _here(x):
    """`x`, but what is made of it is made here and not kept in registers from further up."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _rows(work, WG: gl.constexpr, C: gl.constexpr):
    """The query rows of a warpgroup."""
    return (_here(work.m) * C.WARPGROUPS + WG) * 64 + gl.arange(0, 64, rows_layout(C.BN))


@gluon.jit
def _limits(work, band, WG: gl.constexpr, C: gl.constexpr):
    """Keys [lo, hi) of each of them."""
    R: gl.constexpr = rows_layout(C.BN)
    rows = _rows(work, WG, C)
    lo, hi = key_range(rows, rows + 1, work.M, work.N, band, C)
    return lo + gl.zeros([64], gl.int32, R), hi + gl.zeros([64], gl.int32, R)


@gluon.jit
def _first_tile(s, work, band, scale, dtype: gl.constexpr, WG: gl.constexpr, C: gl.constexpr):
    """(pivot, l, P) after the first key tile of `work`, whose products are `s`; it is always masked.

    Without OVERLAP its softmax comes later: (pivot, 0, scores).
    """
    lo, hi = _limits(work, band, WG, C)
    first, n = blocks(work.m, work.M, work.N, band, C)
    s = mask(capped(s, scale[0], C), key_tile(first, n, 0, C), lo, hi, C)
    if C.OVERLAP:
        p16, pivot, l = first_softmax(s, scale[1], dtype, C)
        return pivot, l, p16
    else:
        return first_pivot(s, scale[1], dtype, C), gl.zeros([64, 4], gl.float32, quad_layout(C.BN)), s


@gluon.jit
def _scores(s, n, full, work, band, scale, WG: gl.constexpr, C: gl.constexpr):
    """Soft cap and mask. One loop with a uniform branch: a second, mask-free loop spills at head dim 64."""
    s = capped(s, scale[0], C)
    if (C.left or C.right) and ((n >= full[1]) | (n < full[0])):
        lo, hi = _limits(work, band, WG, C)
        s = mask(s, n, lo, hi, C)
    return s


@gluon.jit
def _overlapped_step(
    q, rings, bars, it, n, full, work, band, state, scale, WG: gl.constexpr, C: gl.constexpr
):  # fmt: skip
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
        barrier_sync(turn(C) + WG, 256)
    s = issue_scores(q, k_ring, nxt, C)
    acc = issue_output(p16, v_ring, cur, scale_output(acc, factor, True, C), C)
    if C.PINGPONG:
        barrier_arrive(turn(C) + (WG + 1) % C.WARPGROUPS, 256)
    OUTPUTS: gl.constexpr = 2 if C.V1 else 1
    s = warpgroup_mma_wait(OUTPUTS, deps=(s,))
    barrier_arrive(k_free(C) + nxt, threads(C))
    s = _scores(s, n, full, work, band, scale, WG, C)
    p16, pivot, l, _, factor = softmax(s, pivot, l, acc, scale[1], v_ring[0].dtype, C)
    mbarrier.wait(v_full.index(nxt), phase)
    acc = wait_output(0, acc)
    if C.DELAY:
        random_delay(C.DELAY)
    barrier_arrive(v_free(C) + cur, threads(C))
    return pivot, l, acc, p16, factor


@gluon.jit
def _serial_step(
    q, rings, bars, it, n, full, work, band, state, scale, WG: gl.constexpr, C: gl.constexpr
):  # fmt: skip
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
        barrier_sync(turn(C) + WG, 256)
    acc = issue_output(p16, v_ring, cur, acc, C)
    s = issue_scores(q, k_ring, nxt, C)
    if C.PINGPONG:
        barrier_arrive(turn(C) + (WG + 1) % C.WARPGROUPS, 256)
    acc, s = wait_output_and_scores(acc, s)
    if C.DELAY:
        random_delay(C.DELAY)
    barrier_arrive(v_free(C) + cur, threads(C))
    barrier_arrive(k_free(C) + nxt, threads(C))
    return pivot, l, acc, _scores(s, n, full, work, band, scale, WG, C)


@gluon.jit
def _pass_over(tiles, bars, it, WG: gl.constexpr, C: gl.constexpr):
    """Free the next key tiles, which this warpgroup sees nothing of, as they come; returns the number of the next.

    With CHAIN, V of the last tile that it sees is free only later, so there must be fewer of them than STAGES.
    """
    for _ in range(tiles):
        st = it % C.STAGES
        phase = (it // C.STAGES) & 1
        if C.PINGPONG:
            barrier_sync(turn(C) + WG, 256)
            barrier_arrive(turn(C) + (WG + 1) % C.WARPGROUPS, 256)
        if C.DELAY:
            random_delay(C.DELAY)
        mbarrier.wait(bars[0].index(st), phase)
        barrier_arrive(k_free(C) + st, threads(C))
        mbarrier.wait(bars[1].index(st), phase)
        barrier_arrive(v_free(C) + st, threads(C))
        it += 1
    return it


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
        barrier_arrive(turn(C), 256)
    work = receive(slot, t_full, t_empty, count, sizes, C)
    # Programs without work still compute scores (of whatever lies in shared memory): a product behind a branch would
    # make ptxas serialise all of them.
    mbarrier.wait(q_full.index(WG), 0, pred=work.m >= 0)
    mbarrier.wait(k_full.index(0), 0, pred=work.m >= 0)
    s = warpgroup_mma_wait(0, deps=(issue_scores(query(q_ring, WG, C), k_ring, 0, C),))
    barrier_arrive(k_free(C), threads(C))
    pivot, l, tile = _first_tile(s, work, band, scale, v_ring[0].dtype, WG, C)  # P, or S without OVERLAP
    while work.m >= 0:
        m_lo = (work.m * W + WG) * 64
        first, n = blocks(work.m, work.M, work.N, band, C)
        own = n
        if passes_over(C):
            _, end = key_range(m_lo, m_lo + 64, work.M, work.N, band, C)
            own = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(end, 0), BN) - first, n), 1)
        full_lo, full_hi = full_range(m_lo, m_lo + 64, work.M, work.N, band, C)
        full = (gl.cdiv(full_lo, BN), gl.maximum(full_hi, 0) // BN)
        buffer = (count % QS) * W + WG
        q = query(q_ring, buffer, C)
        acc = zero_output(C)
        if C.OVERLAP:
            p16 = tile
            factor = gl.full([64, 4], 1.0, gl.float32, quad_layout(BN))
            mbarrier.wait(v_full.index(it % C.STAGES), (it // C.STAGES) & 1)
            for j in range(1, own):
                pivot, l, acc, p16, factor = _overlapped_step(
                    q, (k_ring, v_ring), (k_full, v_full), it, key_tile(first, n, j, C), full, work, band,
                    (pivot, l, acc, p16, factor), scale, WG, C,
                )  # fmt: skip
                it += 1
        else:
            for j in range(1, own):
                pivot, l, acc, tile = _serial_step(
                    q, (k_ring, v_ring), (k_full, v_full), it, key_tile(first, n, j, C), full, work, band,
                    (pivot, l, acc, tile), scale, WG, C,
                )  # fmt: skip
                it += 1
            p16, pivot, l, acc, _ = softmax(tile, pivot, l, acc, scale[1], v_ring[0].dtype, C)
            mbarrier.wait(v_full.index(it % C.STAGES), (it // C.STAGES) & 1)
        if not C.SHARE:
            barrier_arrive(q_free(C) + count % QS, threads(C))
        cur = it % C.STAGES
        it += 1
        if passes_over(C) and C.CHAIN:
            it = _pass_over(n - own, (k_full, v_full), it, WG, C)
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
            barrier_sync(turn(C) + WG, 256)
        if C.OVERLAP:
            acc = scale_output(acc, factor, True, C)
        acc = issue_output(p16, v_ring, cur, acc, C)
        if C.CHAIN:
            s = issue_scores(query(q_ring, next_buffer, C), k_ring, nxt, C)
        if C.PINGPONG:
            barrier_arrive(turn(C) + (WG + 1) % W, 256)
        rows = _rows(work, WG, C)
        inv, log_sum = finish(pivot, l, rows, work, sink, C)
        offset = work.b.to(gl.int64) * sizes[9] + work.h.to(gl.int64) * sizes[10] + work.start
        gl.store(lse + offset + rows, log_sum, mask=rows < work.rows)
        acc = wait_output(SCORES if C.CHAIN else 0, acc)
        barrier_arrive(v_free(C) + cur, threads(C))
        if passes_over(C) and not C.CHAIN:
            it = _pass_over(n - own, (k_full, v_full), it, WG, C)
            nxt = it % C.STAGES
            phase = (it // C.STAGES) & 1
        _store(acc, inv, rows, m_lo, work, o_descs, o_ring, buffer if C.SHARE else WG, units, C)
        if not C.CHAIN:
            if C.SHARE:
                tma.store_wait(0)
                barrier_arrive(q_free(C), threads(C))
            mbarrier.wait(k_full.index(nxt), phase, pred=more)
            mbarrier.wait(q_full.index(next_buffer), next_phase, pred=more)
            s = issue_scores(query(q_ring, next_buffer, C), k_ring, nxt, C)
        s = warpgroup_mma_wait(0, deps=(s,))
        barrier_arrive(k_free(C) + nxt, threads(C))
        pivot, l, tile = _first_tile(s, following, band, scale, v_ring[0].dtype, WG, C)
        if C.CHAIN and C.SHARE:
            tma.store_wait(0)
            barrier_arrive(q_free(C) + count % QS, threads(C))
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
            [(_consumer, (common, 0, C)), (_consumer, (common, 1, C)), (producer, (loads, C))],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    elif W == 3:
        gl.warp_specialize(
            [
                (_consumer, (common, 0, C)),
                (_consumer, (common, 1, C)),
                (_consumer, (common, 2, C)),
                (producer, (loads, C)),
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
                (producer, (loads, C)),
            ],
            [4, 4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )
