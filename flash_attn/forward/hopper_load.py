"""The producer of the Hopper forward: one warp that draws tiles and loads Q, K and V for the consumers by TMA.

`C` is the forward's Config.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attn.forward.hopper_config import k_free, q_free, threads, v_free
from flash_attn.forward.hopper_tiles import blocks, key_tile, locate, publish
from flash_attn.tile.hopper import barrier_sync, random_delay, tma_load, tma_rows


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
        barrier_sync(ID + it % DEPTH, threads(C))
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
    st = _acquire(it, k_free(C), C.STAGES, C)
    _load(k_descs, k_ring, k_full, st, b, hk, row, N, k_end, RAGGED_K)
    buffer = _acquire(count, q_free(C), QS, C) * W
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
        st = _acquire(it + 1, k_free(C), C.STAGES, C)
        _load(k_descs, k_ring, k_full, st, b, hk, row + STEP, N, k_end, RAGGED_K)
        st = _acquire(it, v_free(C), C.STAGES, C)
        _load(v_descs, v_ring, v_full, st, b, hk, row, N, v_end, RAGGED_K)
        row += STEP
        it += 1
    st = _acquire(it, v_free(C), C.STAGES, C)
    _load(v_descs, v_ring, v_full, st, b, hk, row, N, v_end, RAGGED_K)
    return it + 1


@gluon.jit
def producer(common, C: gl.constexpr):
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
