"""Which tile comes next, and which keys it needs: the scheduler of the Hopper forward.

`C` is the forward's Config. Only the producer decides; the consumers read its decision from shared memory.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attn.tile.mask import key_range

SEARCH = gl.constexpr(128)  # sequences looked at together when a packed tile is located


class Work(NamedTuple):
    """One tile: what the producer tells the consumers."""

    m: gl.tensor  # block of queries; -1: no more work
    h: gl.tensor
    b: gl.tensor
    start: gl.tensor  # first query row in a packed tensor
    M: gl.tensor  # valid queries
    rows: gl.tensor  # query rows there are (>= M)
    N: gl.tensor  # valid keys


@gluon.jit
def blocks(m, M, N, band, C: gl.constexpr):
    """(first key tile, number of key tiles, at least 1) that the queries of block m need."""
    BM: gl.constexpr = 64 * C.WARPGROUPS
    BN: gl.constexpr = C.BN
    lo, hi = key_range(m * BM, gl.minimum(m * BM + BM, M), M, N, band, C)
    first = lo // BN
    return first, gl.maximum(gl.cdiv(gl.maximum(hi, 0), BN) - first, 1)


@gluon.jit
def key_tile(first, n, j, C: gl.constexpr):
    """The j-th key tile to work on. With a right bound upwards: programs that start together then read the same keys at
    the same time, although their diagonals differ. Without one downwards: only the first tile then needs a mask."""
    if C.right:
        return first + j
    else:
        return first + n - 1 - j


@gluon.jit
def _decode(tile, num_m, heads, num_bh, swizzle, C: gl.constexpr):
    """(m, h, b) of a tile. Groups of `swizzle` (sequence, head) pairs keep their keys in L2; in a group the query
    blocks descend when their work grows with m."""
    group = tile // (num_m * swizzle)
    r = tile - group * (num_m * swizzle)
    size = gl.minimum(swizzle, num_bh - group * swizzle)
    m = r // size
    bh = group * swizzle + (r - m * size)
    if C.right:
        m = num_m - 1 - m
    b = bh // heads
    return m, bh - b * heads, b


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _sequence_ends(cu_q, lo, batch, heads, BM: gl.constexpr):
    """Tiles up to and with each of the SEARCH sequences from `lo` on."""
    L: gl.constexpr = gl.BlockedLayout([SEARCH // 32], [32], [1], [0])
    i = lo + gl.arange(0, SEARCH, L)
    ok = i < batch
    length = gl.load(cu_q + i + 1, mask=ok, other=0) - gl.load(cu_q + i, mask=ok, other=0)
    return gl.associative_scan(gl.cdiv(length, BM) * heads, 0, _add)


@gluon.jit
def locate(tile, seek, lengths, sizes, C: gl.constexpr):
    """(Work of a tile, seek): `seek` = (first sequence, tiles before it) resumes the search, as tiles only grow."""
    cu_q, cu_k, used_q, used_k = lengths
    max_q, max_k, heads, group, batch, swizzle, num_m, num_tiles = sizes[:8]
    BM: gl.constexpr = 64 * C.WARPGROUPS
    seq, before = seek
    start = gl.to_tensor(0)
    if C.packed_q:
        ends = _sequence_ends(cu_q, seq, batch, heads, BM)
        total = gl.max(ends, 0)
        while (before + total <= tile) & (seq + SEARCH < batch):
            before += total
            seq += SEARCH
            ends = _sequence_ends(cu_q, seq, batch, heads, BM)
            total = gl.max(ends, 0)
        passed = before + ends <= tile
        b = seq + gl.sum(passed.to(gl.int32), 0)
        valid = b < batch
        b = gl.minimum(b, batch - 1)
        start = gl.load(cu_q + b)
        rows = gl.load(cu_q + b + 1) - start
        r = tile - before - gl.max(gl.where(passed, ends, 0), 0)
        m, h, _ = _decode(r, gl.maximum(gl.cdiv(rows, BM), 1), heads, heads, gl.minimum(swizzle, heads), C)
    else:
        valid = tile < num_tiles
        m, h, b = _decode(tile, num_m, heads, batch * heads, swizzle, C)
        b = gl.minimum(b, batch - 1)
        rows = max_q
    M = rows
    if C.used_q:
        M = gl.load(used_q + b)
    N = max_k
    if C.packed_k:
        N = gl.load(cu_k + b + 1) - gl.load(cu_k + b)
    if C.used_k:
        N = gl.load(used_k + b)
    m = gl.where(valid, m, -1)
    return Work(m, h, b, start, M, rows, N), (seq, before)


@gluon.jit
def publish(work, slot, C: gl.constexpr):
    """Write `work` for the consumers, as far as they do not know it from the sizes."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot.index(0).store(gl.full([1], work.m, gl.int32, L))
    slot.index(1).store(gl.full([1], work.h, gl.int32, L))
    slot.index(2).store(gl.full([1], work.b, gl.int32, L))
    if C.packed_q:
        slot.index(3).store(gl.full([1], work.start, gl.int32, L))
        slot.index(5).store(gl.full([1], work.rows, gl.int32, L))
    if C.packed_q or C.used_q:
        slot.index(4).store(gl.full([1], work.M, gl.int32, L))
    if C.packed_k or C.used_k:
        slot.index(6).store(gl.full([1], work.N, gl.int32, L))


@gluon.jit
def _read(slot, i: gl.constexpr):
    return gl.max(slot.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def receive(slot, full, empty, count, sizes, C: gl.constexpr):
    """Work number `count`; frees the slot."""
    mbarrier.wait(full.index(0), count & 1)
    start = gl.to_tensor(0)
    rows = sizes[0]
    M = sizes[0]
    N = sizes[1]
    if C.packed_q:
        start = _read(slot, 3)
        rows = _read(slot, 5)
    if C.packed_q or C.used_q:
        M = _read(slot, 4)
    if C.packed_k or C.used_k:
        N = _read(slot, 6)
    work = Work(_read(slot, 0), _read(slot, 1), _read(slot, 2), start, M, rows, N)
    mbarrier.arrive(empty.index(0), count=1)
    return work


@gluon.jit
def zero_tail(out, lse, cu_q, sizes, DV: gl.constexpr):
    """Rows of a packed tensor behind the last sequence: out 0, lse -inf. Usually there are none."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    heads, batch, total = sizes[2], sizes[4], sizes[8]
    i = gl.arange(0, 128, L)
    for row in range(gl.load(cu_q + batch) + gl.program_id(0), total, gl.num_programs(0)):
        for at in range(0, heads * DV, 128):
            offset = gl.to_tensor(row).to(gl.int64) * (heads * DV) + at + i
            gl.store(out + offset, gl.zeros([128], out.dtype.element_ty, L), mask=at + i < heads * DV)
        for at in range(0, heads, 128):
            h = at + i
            empty = gl.full([128], float("-inf"), gl.float32, L)
            gl.store(lse + h.to(gl.int64) * sizes[10] + row, empty, mask=h < heads)
