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


# ---- exponentials that rarely come out too large --------------------------------------------------------------------
# Whether one has, a warp answers for itself: all its threads decide alike, and the same way in every run. Triton can
# make a scalar of a tensor only by asking every warp, so the answer travels in a register of the assembly, which
# `declare_answer` names once per kernel.


@gluon.jit
def declare_answer():
    """Must come before the first `any_large` of a kernel."""
    gl.inline_asm_elementwise(
        ".reg .b32 warp_answer; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _any_large(n):
    union = " ".join(f"or.b32 all, all, ${i};" for i in range(1, n))
    return (
        f"{{ .reg .b32 all; .reg .pred q; mov.b32 all, $0; {union} and.b32 all, all, 0x40004000;"
        " setp.ne.b32 q, all, 0; vote.sync.any.pred q, q, -1; selp.b32 warp_answer, 1, 0, q; }"
    )


@gluon.constexpr_function
def _unchanged(n):
    return ",".join(["=r"] * n + [str(i) for i in range(n)])


@gluon.jit
def any_large(p, N: gl.constexpr):
    """(p, 1 if one of the warp's is 2 or more, infinite or NaN, else 0) of a (64, N) accumulator in bf16 or fp16.

    Numbers that are not negative: those below 2 are those whose highest bit of the exponent is 0.
    """
    n: gl.constexpr = N // 4
    p = gl.inline_asm_elementwise(_any_large(n), _unchanged(n), [p], dtype=p.dtype, is_pure=False, pack=2 * n)
    answer = gl.inline_asm_elementwise(
        "mov.b32 $0, warp_answer;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return p, answer


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
