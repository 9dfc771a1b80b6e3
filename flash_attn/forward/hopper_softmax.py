"""The softmax of the Hopper forward on one warpgroup's 64 rows, which looks at the maximum last.

Exponentials are relative to a pivot, a base-2 logit of each row that need not be the maximum: any that keeps them in
range gives the same result (FlashAttention-4 lets its pivot lag behind the maximum, too). The pivot of the tiles before
will nearly always do, so the exponentials are taken at once. It lies a few octaves above the maximum it was made from:
as long as none of them reaches 2, it still does. Else, in that warp, they are taken anew from the scores, which stay in
registers for it. So no step waits for a maximum, and instead of a comparison for each score there is one OR for four of
them, in 16 bits.

It is `tile/softmax.py: update` otherwise, but for two things that its callers there do not need: the scale rides on the
subtraction (one FMA per element), and sums stay in the threads until the end. Pivots, sums and factors are (64, 4), one
value per row and thread of its quad. `C` is the forward's Config.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn.tile.hopper import (
    any_large,
    column_layout,
    from_columns,
    scale_unless_one,
    to_columns,
)


@gluon.constexpr_function
def accumulator(N):
    """Layout of a (64, N) wgmma accumulator."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def rows_layout(N):
    """One value per row of it."""
    return gl.SliceLayout(1, accumulator(N))


@gluon.constexpr_function
def quad_layout(N):
    """Layout of (64, 4)."""
    return gl.SliceLayout(1, gl.SliceLayout(3, column_layout(N)))


@gluon.jit
def over_columns(x, N: gl.constexpr):
    """(64, 4) values as (64, 1, 4, 1), to combine with `to_columns(..., N)`."""
    x = gl.convert_layout(x, quad_layout(N), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(x, 1), 3)


@gluon.jit
def _thread_maxima(c, C: gl.constexpr):
    """Row maxima of what each thread holds, (64, 4). Four chains of maxima a thread: two would wait for each other."""
    return gl.convert_layout(gl.max(gl.max(c, 1), 2), quad_layout(C.BN), assert_trivial=True)


@gluon.jit
def _thread_sums(p, C: gl.constexpr):
    """Row sums of what each thread holds, (64, 4): no shuffles."""
    return gl.sum(gl.sum(to_columns(p, C.BN), 3), 1)


@gluon.jit
def _operand(p, C: gl.constexpr):
    """P in 16 bits as register operand of wgmma."""
    return gl.convert_layout(p, gl.DotOperandLayout(0, accumulator(C.V0), 2), assert_trivial=True)


@gluon.jit
def _scale_part(acc, factor, N: gl.constexpr, RARELY: gl.constexpr):
    acc, factor = to_columns(acc, N), over_columns(factor, N)
    acc = scale_unless_one(acc, factor.broadcast_to([64, N // 8, 4, 2]), N) if RARELY else acc * factor
    return from_columns(acc, N, accumulator(N))


@gluon.jit
def scale_output(acc, factor, RARELY: gl.constexpr, C: gl.constexpr):
    """O * factor. RARELY: only where it is not 1, and not before the products issued last."""
    if C.V1:
        return _scale_part(acc[0], factor, C.V0, RARELY), _scale_part(acc[1], factor, C.V1, RARELY)
    else:
        return (_scale_part(acc[0], factor, C.V0, RARELY),)


@gluon.constexpr_function
def _headroom(dtype):
    """Octaves between a pivot and the maximum it was made from. fp16 has few below 1."""
    return 7.0 if dtype == gl.bfloat16 else 2.0


@gluon.jit
def _raise_pivot(s, pivot, outer, dtype: gl.constexpr, C: gl.constexpr):
    """(new pivot, what to subtract from logits, factor for sum and output)."""
    top = gl.expand_dims(gl.max(_thread_maxima(to_columns(s, C.BN), C), 1), 1) * outer + _headroom(dtype)
    new = gl.maximum(pivot, top)
    base = gl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key: -inf - -inf would be NaN
    return new, base, gl.exp2(pivot - base)


@gluon.jit
def _exponentials(s, base, outer, C: gl.constexpr):
    p = gl.exp2(to_columns(s, C.BN) * outer - over_columns(base, C.BN))
    return from_columns(p, C.BN, accumulator(C.BN))


@gluon.jit
def softmax(s, pivot, l, acc, outer, dtype: gl.constexpr, C: gl.constexpr):
    """(P as operand, pivot, l with P's row sums, O, factor still due on O) from scores and what came before.

    O is scaled at once, or later if C.OVERLAP: then products are adding to it meanwhile. A row that has seen no key has
    pivot -inf: its exponentials are infinite or NaN and so are taken anew.
    """
    p = _exponentials(s, pivot, outer, C)
    sums = _thread_sums(p, C)
    p16, large = any_large(p.to(dtype), C.BN)
    p16 = _operand(p16, C)
    factor = gl.full([64, 4], 1.0, gl.float32, quad_layout(C.BN))
    if large != 0:
        pivot, base, factor = _raise_pivot(s, pivot, outer, dtype, C)
        p = _exponentials(s, base, outer, C)
        sums = _thread_sums(p, C)
        p16 = _operand(p.to(dtype), C)
        l = l * factor
        if not C.OVERLAP:
            acc = scale_output(acc, factor, False, C)
    return p16, pivot, l + sums, acc, factor


@gluon.jit
def first_softmax(s, outer, dtype: gl.constexpr, C: gl.constexpr):
    """(P as operand, pivot, row sums) of the first scores."""
    pivot, base, _ = _raise_pivot(s, _unknown(C), outer, dtype, C)
    p = _exponentials(s, base, outer, C)
    return _operand(p.to(dtype), C), pivot, _thread_sums(p, C)


@gluon.jit
def first_pivot(s, outer, dtype: gl.constexpr, C: gl.constexpr):
    """A pivot for the first scores."""
    pivot, _, _ = _raise_pivot(s, _unknown(C), outer, dtype, C)
    return pivot


@gluon.jit
def _unknown(C: gl.constexpr):
    return gl.full([64, 4], float("-inf"), gl.float32, quad_layout(C.BN))
