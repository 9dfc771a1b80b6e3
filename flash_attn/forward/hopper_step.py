"""The arithmetic of the Hopper forward on one warpgroup's 64 rows: products, mask, softmax, rescale.

A head dim may have two power-of-two parts (D0, D1 and V0, V1); O is a tuple with one entry per part. `C` is the
forward's Config. Masks, soft cap and key ranges come from `tile/`; the softmax is `tile/softmax.py: update` with two
differences that its callers there do not need: the scale rides on the subtraction (one FMA per element), and sums stay
in the threads until the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_attn.tile.hopper import (
    column_layout,
    column_registers,
    from_columns,
    keep_pivot,
    row_limit,
    scale_unless_one,
    to_columns,
)
from flash_attn.tile.score import LOG2E

LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def accumulator(N):
    """Layout of a (64, N) wgmma accumulator."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def rows_layout(N):
    """One value per row of it."""
    return gl.SliceLayout(1, accumulator(N))


@gluon.jit
def query(ring, buffer, C: gl.constexpr):
    """Q as operands of `issue_scores`: the first QREG columns in registers, the rest in shared memory."""
    D0: gl.constexpr = C.D0
    D1: gl.constexpr = C.D1
    QREG: gl.constexpr = C.QREG
    q = ring[0].index(buffer).reshape([64, D0])
    if QREG:
        registers: gl.constexpr = gl.DotOperandLayout(0, accumulator(C.BN), 2)
        if QREG == D0:
            return (q.load(registers),)
        else:
            return q.slice(0, QREG, 1).load(registers), q.slice(QREG, D0 - QREG, 1)
    elif D1:
        return q, ring[1].index(buffer).reshape([64, D1])
    else:
        return (q,)


@gluon.jit
def issue_scores(q, ring, st, C: gl.constexpr):
    """S = Q K^T of stage `st`, in flight."""
    BN: gl.constexpr = C.BN
    D0: gl.constexpr = C.D0
    D1: gl.constexpr = C.D1
    QREG: gl.constexpr = C.QREG
    z = gl.zeros([64, BN], gl.float32, accumulator(BN))
    k = ring[0].index(st).reshape([BN, D0])
    if QREG and QREG < D0:
        s = warpgroup_mma(q[0], k.slice(0, QREG, 1).permute((1, 0)), z, use_acc=False, is_async=True)
        s = warpgroup_mma(q[1], k.slice(QREG, D0 - QREG, 1).permute((1, 0)), s, is_async=True)
    else:
        s = warpgroup_mma(q[0], k.permute((1, 0)), z, use_acc=False, is_async=True)
    if D1:
        s = warpgroup_mma(q[1], ring[1].index(st).reshape([BN, D1]).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def issue_output(p, ring, st, acc, C: gl.constexpr):
    """O += P V of stage `st`, in flight; one token per part of the head dim."""
    BN: gl.constexpr = C.BN
    V0: gl.constexpr = C.V0
    V1: gl.constexpr = C.V1
    a = warpgroup_mma(p, ring[0].index(st).reshape([BN, V0]), acc[0], is_async=True)
    if V1:
        return a, warpgroup_mma(p, ring[1].index(st).reshape([BN, V1]), acc[1], is_async=True)
    else:
        return (a,)


@gluon.jit
def wait_output(pending: gl.constexpr, tokens):
    """O once at most `pending` products are in flight."""
    if len(tokens) == 1:
        return (warpgroup_mma_wait(pending, deps=(tokens[0],)),)
    else:
        return warpgroup_mma_wait(pending, deps=(tokens[0], tokens[1]))


@gluon.jit
def mask(s, n, lo, hi, C: gl.constexpr):
    """-inf outside the keys [lo, hi) of each row, in key tile n."""
    N: gl.constexpr = C.BN
    cols = column_registers(N)
    s = to_columns(s, N)
    s = gl.where(cols < row_limit(hi - n * N, N), s, float("-inf"))
    if C.left:
        s = gl.where(cols >= row_limit(lo - n * N, N), s, float("-inf"))
    return from_columns(s, N, accumulator(N))


@gluon.jit
def softmax(s, m, outer, MASKED: gl.constexpr, C: gl.constexpr):
    """(p in fp32, new pivot, factor for sum and output) of (soft capped) products; base-2 logits are s * outer.

    The pivot `m` is the maximum so far or, if LAZY, up to 8 / outer less: then the factor is 1.
    """
    top = gl.max(gl.max(gl.max(to_columns(s, C.BN), 3), 1), 1)  # in the thread first, then over the quad
    m_new = gl.maximum(m, gl.convert_layout(top, rows_layout(C.BN), assert_trivial=True))
    if C.LAZY:
        m_new = keep_pivot(m, m_new, m * outer, m_new * outer)
    pivot = m_new * outer
    if MASKED:  # a row that has seen no key: -inf - -inf would be NaN
        pivot = gl.where(m_new == float("-inf"), 0.0, pivot)
    alpha = gl.exp2(m * outer - pivot)
    if C.LAZY:
        alpha = gl.where(m_new == m, 1.0, alpha)
    return gl.exp2(s * outer - gl.expand_dims(pivot, 1)), m_new, alpha


@gluon.jit
def thread_sums(p, C: gl.constexpr):
    """Row sums of what each thread holds, (64, 4): no shuffles."""
    return gl.sum(gl.sum(to_columns(p, C.BN), 3), 1)


@gluon.jit
def per_thread(x, C: gl.constexpr):
    """A value per row, shaped to multiply `thread_sums`."""
    A: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, column_layout(C.BN))))
    return gl.expand_dims(gl.convert_layout(x, A, assert_trivial=True), 1)


@gluon.jit
def pack(p, dtype: gl.constexpr, C: gl.constexpr):
    """P as register operand of wgmma."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accumulator(C.V0), 2), assert_trivial=True)


@gluon.jit
def scale_part(acc, factor, N: gl.constexpr):
    """acc * factor per row."""
    return acc * gl.expand_dims(gl.convert_layout(factor, rows_layout(N), assert_trivial=True), 1)


@gluon.jit
def scale_output(acc, factor, C: gl.constexpr):
    if C.V1:
        return scale_part(acc[0], factor, C.V0), scale_part(acc[1], factor, C.V1)
    else:
        return (scale_part(acc[0], factor, C.V0),)


@gluon.jit
def _rescale_part(acc, factor, N: gl.constexpr):
    factor = gl.expand_dims(gl.convert_layout(factor, rows_layout(N), assert_trivial=True), 1)
    return scale_unless_one(acc, factor.broadcast_to([64, N]), N)


@gluon.jit
def rescale_output(acc, factor, C: gl.constexpr):
    """O * factor per row, under the products in flight."""
    if C.V1:
        return _rescale_part(acc[0], factor, C.V0), _rescale_part(acc[1], factor, C.V1)
    else:
        return (_rescale_part(acc[0], factor, C.V0),)


@gluon.jit
def zero_output(C: gl.constexpr):
    V0: gl.constexpr = C.V0
    V1: gl.constexpr = C.V1
    a = gl.zeros([64, V0], gl.float32, accumulator(V0))
    if V1:
        return a, gl.zeros([64, V1], gl.float32, accumulator(V1))
    else:
        return (a,)


@gluon.jit
def finish(m, l, rows, work, sink, scale_log2, C: gl.constexpr):
    """(factor of O, natural-log LSE): 0 and -inf for rows without keys. A sink joins the denominator."""
    l = gl.convert_layout(gl.sum(l, 1), rows_layout(C.BN), assert_trivial=True)
    top = m * scale_log2  # base 2
    shrink = 1.0
    if C.sink:
        s = gl.load(sink + work.h).to(gl.float32) * LOG2E
        pivot = gl.maximum(top, s)
        shrink = gl.exp2(top - pivot)
        l = l * shrink + gl.exp2(s - pivot)
        top = pivot
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    inv = gl.where(empty, 0.0, shrink / safe)
    lse = gl.where(empty, float("-inf"), (top + gl.log2(safe)) * LN2)
    if C.used_q:
        lse = gl.where(rows < work.M, lse, float("-inf"))
    return inv, lse
