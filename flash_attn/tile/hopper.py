"""What Gluon lacks for warp-specialised kernels on Hopper: named barriers, column views, ragged TMA coordinates.

Forward and backward share this file. It also hides the names that Triton changed between 3.6 and 3.9. Masks, scores
and key ranges are not here but in `mask.py` and `score.py`.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in Triton 3.8; the old names raise in 3.9.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def _tma_reduce_add(desc, coord, src, _semantic=None):
    """Before Triton 3.8 the builder had the reduction and the language did not."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


tma_reduce_add = getattr(tma, "async_atomic_add", None) or _tma_reduce_add


# ---- hardware named barriers -------------------------------------------------------------------------------
# An mbarrier.arrive costs a bar.sync of the whole partition (and often a second one before the next access to shared
# memory), because Triton signals from one thread. A named barrier is one instruction in every warp. Triton itself uses
# ids 0, 1 and 2 + partition, so kernels take theirs from the top of 0..15. `threads` counts all who sync or arrive; a
# one-warp partition counts 32.


@gluon.jit
def barrier_sync(id, threads: gl.constexpr):
    """Wait until `threads` threads have arrived at barrier `id` (constant or run-time value)."""
    gl.inline_asm_elementwise(
        f"bar.sync $1, {threads}; mov.u32 $0, 0;",
        "=r,r",
        [gl.to_tensor(id)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def barrier_arrive(id, threads: gl.constexpr):
    """Arrive at barrier `id` without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive $1, {threads}; mov.u32 $0, 0;",
        "=r,r",
        [gl.to_tensor(id)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def random_delay(MASK: gl.constexpr):
    """Sleep a pseudo-random time up to MASK nanoseconds, per warp: a debug build uses it to provoke races."""
    gl.inline_asm_elementwise(
        f"{{ .reg .u32 t; mov.u32 t, %clock; mul.lo.u32 t, t, 2654435761; shr.u32 t, t, 16; and.b32 t, t, {MASK};"
        " nanosleep.u32 t; mov.u32 $0, 0; }",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def compute_first(l):
    """l itself; whatever it is made of is computed before the waits that follow.

    ptxas hoists wgmma.wait_group and mbarrier waits over arithmetic that does not need them, and with that the overlap
    of softmax and tensor cores is gone. It does not hoist them over a branch. This one depends on l (two registers per
    thread, sums of exponentials, never negative) and is never taken.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred q; setp.lt.f32 q, $2, 0f00000000; setp.lt.or.f32 q, $3, 0f00000000, q;"
        " vote.sync.any.pred q, q, -1; @!q bra.uni FINE; nanosleep.u32 1; FINE: mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f",
        [l],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


# ---- a softmax that rarely rescales -------------------------------------------------------------------------------
# What a row has summed is relative to a pivot, which need not be its maximum: any pivot that keeps the exponentials in
# range gives the same result. So the pivot follows the maximum only when some row of the warp has grown by a factor of
# 2**8 (the idea is FlashAttention-4's). Whether one has, each thread tells from its own columns: only then do the
# threads of a row exchange their maxima. Else the factor of sums and output is 1, and multiplying is branched over.
# All threads of a warp decide alike, and the same way in every run.


@gluon.jit
def follow_maximum(pivot, top):
    """(pivot, factor for what is relative to the old one); base-2 logits, one value per row and thread of a quad.

    Each thread holds two rows. `top` is its own maximum; pivots are equal in the four threads of a row. A row that has
    seen no key keeps pivot -inf and factor 1: -inf - -inf = NaN exceeds nothing.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred q; .reg .f32 a, b, c, d; sub.f32 a, $6, $4; sub.f32 b, $7, $5; max.f32 a, a, b;"
        " setp.gt.f32 q, a, 0f41000000; vote.sync.any.pred q, q, -1;"
        " mov.f32 $0, $4; mov.f32 $1, $5; mov.f32 $2, 0f3F800000; mov.f32 $3, 0f3F800000; @!q bra.uni FINE;"
        " shfl.sync.bfly.b32 a, $6, 1, 31, -1; max.f32 a, a, $6; shfl.sync.bfly.b32 b, $7, 1, 31, -1; max.f32 b, b, $7;"
        " shfl.sync.bfly.b32 c, a, 2, 31, -1; max.f32 a, a, c; shfl.sync.bfly.b32 d, b, 2, 31, -1; max.f32 b, b, d;"
        " max.f32 $0, a, $4; sub.f32 a, $4, $0; setp.eq.f32 q, $0, $4; ex2.approx.ftz.f32 a, a;"
        " selp.f32 $2, 0f3F800000, a, q;"
        " max.f32 $1, b, $5; sub.f32 b, $5, $1; setp.eq.f32 q, $1, $5; ex2.approx.ftz.f32 b, b;"
        " selp.f32 $3, 0f3F800000, b, q; FINE: }",
        "=&f,=&f,=&f,=&f,f,f,f,f",
        [pivot, top],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=2,
    )


@gluon.constexpr_function
def _scale_unless_one(n):
    """n elements, then n factors. A thread's elements alternate between two rows every second one."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return (
        f"{{ .reg .pred q; setp.neu.f32 q, ${2 * n}, 0f3F800000; setp.neu.or.f32 q, ${2 * n + 2}, 0f3F800000, q;"
        f" vote.sync.any.pred q, q, -1; @!q bra.uni FINE; {products} FINE: }}"
    )


@gluon.constexpr_function
def _in_place(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def scale_unless_one(x, factor, N: gl.constexpr):
    """x * factor for a (64, N) wgmma accumulator as `to_columns` gives it, skipped where the two rows' factors are 1.

    Stays behind the products issued before it, and so runs under them: the compiler keeps the order of volatile
    assembly, wgmma included.
    """
    n: gl.constexpr = 32 if N >= 64 else N // 2
    return gl.inline_asm_elementwise(
        _scale_unless_one(n), _in_place(n), [x, factor], dtype=gl.float32, is_pure=False, pack=n
    )


# ---- the accumulator of wgmma, column by column ----------------------------------------------------------------


@gluon.constexpr_function
def column_layout(N):
    """The fp32 accumulator of a (64, N) wgmma seen as (64, N/8, 4, 2): column = 8 j + 2 t + e.

    j and e live in registers, t in the lanes of a quad: an index made of j and e is a compile-time constant in every
    register, and a sum over them needs no shuffle.
    """
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]]
    j = 1
    while j < N // 8:
        registers.append([0, j, 0, 0])
        j *= 2
    return gl.DistributedLinearLayout(
        reg_bases=registers,
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, N // 8, 4, 2],
    )


@gluon.jit
def to_columns(s, N: gl.constexpr):
    """(64, N) accumulator -> (64, N/8, 4, 2) in `column_layout(N)`; moves no data."""
    return gl.convert_layout(gl.reshape(s, [64, N // 8, 4, 2]), column_layout(N), assert_trivial=True)


@gluon.jit
def from_columns(s, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Inverse of `to_columns`, into the accumulator layout LAYOUT."""
    return gl.convert_layout(gl.reshape(s, [64, N]), LAYOUT, assert_trivial=True)


@gluon.jit
def column_registers(N: gl.constexpr):
    """8 j + e of every element, (1, N/8, 1, 2): the part of its column that the compiler knows."""
    L: gl.constexpr = column_layout(N)
    j = gl.arange(0, N // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    j = gl.expand_dims(gl.expand_dims(gl.expand_dims(j * 8, 0), 2), 3)
    return j + gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 0), 1), 2)


@gluon.jit
def row_limit(limit, N: gl.constexpr):
    """A column limit per row, (64,), as (64, 1, 4, 1) to compare with `column_registers`.

    The lane's part of the column (2 t) is taken off the limit here, so that what remains on the other side of the
    comparison is a constant; comparing whole columns keeps N/4 index registers alive.
    """
    L: gl.constexpr = column_layout(N)
    limit = gl.convert_layout(
        limit, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))), assert_trivial=True
    )
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
    limit = gl.expand_dims(gl.expand_dims(gl.expand_dims(limit, 1), 2), 3)
    return limit - gl.expand_dims(gl.expand_dims(gl.expand_dims(t * 2, 0), 1), 3)


# ---- TMA boxes that end where a sequence ends ------------------------------------------------------------------
# TMA clips at the edges of the tensor, not of a sequence inside it. A "ragged" descriptor (the idea of Triton's
# triton.tools.ragged_tma) has a row dimension of 2**30 rows: row r of a sequence of n rows lies at 2**30 - n + r,
# so rows from n on fall off the tensor: loads give zeros there and stores write nothing. Two more dimensions move
# the base: one has stride 16 bytes (the end of the sequence), one brings -2**30 rows by wrapping around 2**64.
RAGGED_ROWS = gl.constexpr(1 << 30)


@gluon.jit
def tma_rows(b, h, row, column, length, end, RAGGED: gl.constexpr):
    """Coordinates of row `row` of head `h` in sequence `b`.

    Args:
        length, end: rows of the sequence and where they end, in units of 16 bytes from the base (ragged only).
        RAGGED: the descriptor is ragged (batch, end, head, row, dim), not dense (batch, head, row, dim).
    """
    if RAGGED:
        return (RAGGED_ROWS, end, h, RAGGED_ROWS - length + row, column)
    else:
        return (b, h, row, column)
