"""Device functions of the Hopper backward: how a warpgroup's accumulator lies in its threads. No kernel lives here.

A warpgroup's fp32 accumulator of 64 rows keeps, in each thread, for every group of eight columns four values:
(row r, columns 2t and 2t + 1) and (row r + 8, the same columns), r = lane / 4, t = lane % 4. The views below name
these register positions, so that dQ leaves as whole 16-byte pieces.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn.tile.hopper import column_registers, from_columns, row_limit, to_columns

# Whether the ones of `first_columns` may stay in registers, which saves 64 accesses of shared memory a step: newer
# versions' ptxas then lacks registers and runs all products one after the other (C7512; seen with 3.9).
ONES_IN_REGISTERS = gl.constexpr(tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7))


@gluon.constexpr_function
def stacked(n, shape):
    """Shape of n buffers of `shape`."""
    return [n, *shape]


@gluon.jit
def program_again():
    """program_id(0), read anew: what is derived from it after a loop then holds no register across the loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bulk_wait_all():
    """Wait until this thread's TMA stores and reductions are complete in memory, not merely read."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fence_gpu():
    """This thread's writes and reductions come before what follows, for every thread of the GPU."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def spin_until(counter, value):
    """Wait until *counter == value. Every thread polls: a branch that only some take costs ptxas its uniform code."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; WAIT: ld.acquire.gpu.global.b32 t, [$1]; setp.ne.b32 p, t, $2;"
        " @p bra.uni WAIT; fence.proxy.async; mov.u32 $0, 0; }",
        "=r,l,r",
        [counter.to(gl.int64), gl.to_tensor(value)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def peek(counter):
    """*counter, loaded while other work is done: what needs the value waits, not this."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];",
        "=r,l",
        [counter.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def spin_unless(seen, counter, value):
    """`spin_until`, but without a load if `seen`, a peek before this thread's last `fence_gpu`, was `value` already."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.b32 t, $1; bra.uni TEST; WAIT: ld.acquire.gpu.global.b32 t, [$2];"
        " TEST: setp.ne.b32 p, t, $3; @p bra.uni WAIT; fence.proxy.async; mov.u32 $0, 0; }",
        "=r,r,l,r",
        [seen, counter.to(gl.int64), gl.to_tensor(value)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def count_up(counter):
    """One thread of a warp adds 1 to *counter, behind everything it has seen complete.

    The thread is elected, not found by %tid: ptxas would treat all that surrounds it as divergent (460 B of spills).
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p red.relaxed.gpu.global.add.u32 [$1], 1; mov.u32 $0, 0; }",
        "=r,l",
        [counter.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _doubling(size, rank, axis):
    """Register bases that step through `size` (a power of two) entries of dimension `axis`."""
    bases, step = [], 1
    while step < size:
        bases.append([step if d == axis else 0 for d in range(rank)])
        step *= 2
    return bases


@gluon.jit
def mask_columns(s, lo, hi, UPPER: gl.constexpr, COLS: gl.constexpr, SL: gl.constexpr):
    """-inf where column < lo(row), and where column > hi(row) when UPPER; s is (64, COLS) in layout SL."""
    s4 = to_columns(s, COLS)
    column = column_registers(COLS)
    s4 = gl.where(column < row_limit(lo, COLS), float("-inf"), s4)
    if UPPER:
        s4 = gl.where(column > row_limit(hi, COLS), float("-inf"), s4)
    return from_columns(s4, COLS, SL)


@gluon.constexpr_function
def _fragment_view(n):
    """A (64, 8 n) accumulator seen as [warp 4, r 8, t 4, j n, upper or lower row 2, e 2]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]] + _doubling(n, 6, 3),
        lane_bases=[
            [0, 0, 1, 0, 0, 0],
            [0, 0, 2, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 2, 0, 0, 0, 0],
            [0, 4, 0, 0, 0, 0],
        ],
        warp_bases=[[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]],
        block_bases=[],
        shape=[4, 8, 4, n, 2, 2],
    )


@gluon.jit
def fragments(x, n: gl.constexpr):
    """A (64, 8 n) accumulator as `_fragment_view`; moves no data."""
    y = gl.permute(gl.reshape(x, [4, 2, 8, n, 4, 2]), (0, 2, 4, 3, 1, 5))
    return gl.convert_layout(y, _fragment_view(n), assert_trivial=True)


@gluon.jit
def fragment_rows(x, n: gl.constexpr):
    """A (64, 8 n) accumulator as (2 n, 256) in fragment order, to be written to an unswizzled buffer of that shape.

    Every thread then stores whole 16-byte pieces without bank conflicts.
    """
    return gl.reshape(gl.permute(fragments(x, n), (3, 0, 1, 2, 4, 5)), [2 * n, 256])


@gluon.jit
def per_column(x_s, COLS: gl.constexpr, SL: gl.constexpr):
    """The COLS fp32 values in x_s as initial accumulator: every row of a (64, COLS) tile holds them.

    The opaque move gives each register its own definition here. Otherwise ptxas copies registers between the two
    products in flight and injects a wait (C7517). The zeros only broadcast: x + 0.0 would cost an addition each.
    """
    zeros = gl.zeros([64, COLS], gl.float32, SL)
    x = gl.expand_dims(x_s.load(gl.SliceLayout(0, SL)), 0)
    return gl.inline_asm_elementwise(
        "mov.f32 $0, $1;", "=f,f,f", [x, zeros], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def first_columns(n: gl.constexpr, L: gl.constexpr):
    """Left operand (64, 16) in bf16, in layout L, that adds up the first n entries along K of the right one."""
    column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, L)), 0)
    return gl.where(column + gl.zeros([64, 16], gl.int32, L) < n, 1.0, 0.0).to(gl.bfloat16)
