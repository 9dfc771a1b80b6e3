"""The arithmetic of the Hopper forward on one warpgroup's 64 rows: products, mask, softmax, rescale.

A key tile may have two power-of-two parts (BN, BN2) and a head dim as well (D0, D1); functions take and give tuples
with one entry per part. `C` is `flash_attn.forward.hopper.Config`. Masks, logits and key ranges come from `tile/`; the
softmax is `tile/softmax.py: update` with three changes that its callers there do not need: the scale rides on the
subtraction (one FMA per element), sums stay in the threads until the end, and the maximum may lag (LAZY).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_attn.tile.hopper import (
    column_layout,
    column_registers,
    exp2_fma,
    from_columns,
    rescale_rows,
    row_limit,
    to_columns,
)
from flash_attn.tile.score import LOG2E, capped

LN2 = gl.constexpr(0.6931471805599453)
LAZY_LOG2 = gl.constexpr(
    8.0
)  # how far the maximum may lag: p <= 2^8 fits fp16, and floating point loses nothing


@gluon.constexpr_function
def accumulator(N):
    """Layout of a (64, N) wgmma accumulator."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def rows_layout(N):
    """One value per row of it."""
    return gl.SliceLayout(1, accumulator(N))


@gluon.jit
def issue_scores(q, ring, st, C: gl.constexpr):
    """S = Q K^T of stage `st`, in flight; one token per part of the key tile."""
    BN: gl.constexpr = C.BN
    BN2: gl.constexpr = C.BN2
    D0: gl.constexpr = C.D0
    D1: gl.constexpr = C.D1
    z = gl.zeros([64, BN], gl.float32, accumulator(BN))
    s = warpgroup_mma(
        q[0], ring[0].index(st).reshape([BN, D0]).permute((1, 0)), z, use_acc=False, is_async=True
    )
    if D1:
        s = warpgroup_mma(q[1], ring[1].index(st).reshape([BN, D1]).permute((1, 0)), s, is_async=True)
    if BN2:
        z2 = gl.zeros([64, BN2], gl.float32, accumulator(BN2))
        k2 = ring[1].index(st).reshape([BN2, D0]).permute((1, 0))
        return s, warpgroup_mma(q[0], k2, z2, use_acc=False, is_async=True)
    else:
        return (s,)


@gluon.jit
def issue_output(p, ring, st, acc, C: gl.constexpr):
    """O += P V of stage `st`, in flight; one token per part of the head dim."""
    BN: gl.constexpr = C.BN
    BN2: gl.constexpr = C.BN2
    V0: gl.constexpr = C.V0
    V1: gl.constexpr = C.V1
    a = warpgroup_mma(p[0], ring[0].index(st).reshape([BN, V0]), acc[0], is_async=True)
    if BN2:
        a = warpgroup_mma(p[1], ring[1].index(st).reshape([BN2, V0]), a, is_async=True)
    if V1:
        return a, warpgroup_mma(p[0], ring[1].index(st).reshape([BN, V1]), acc[1], is_async=True)
    else:
        return (a,)


@gluon.jit
def wait(pending: gl.constexpr, tokens):
    """The values of `tokens` once at most `pending` products are in flight."""
    if len(tokens) == 1:
        return (warpgroup_mma_wait(pending, deps=(tokens[0],)),)
    else:
        return warpgroup_mma_wait(pending, deps=(tokens[0], tokens[1]))


@gluon.jit
def _keep(s, n0, lo, hi, N: gl.constexpr, C: gl.constexpr):
    cols = column_registers(N)
    s = to_columns(s, N)
    s = gl.where(cols < row_limit(hi - n0, N), s, float("-inf"))
    if C.left:
        s = gl.where(cols >= row_limit(lo - n0, N), s, float("-inf"))
    return from_columns(s, N, accumulator(N))


@gluon.jit
def mask(s, n, lo, hi, C: gl.constexpr):
    """-inf outside the keys [lo, hi) of each row, in key tile n."""
    n0 = n * (C.BN + C.BN2)
    a = _keep(s[0], n0, lo, hi, C.BN, C)
    if C.BN2:
        R: gl.constexpr = rows_layout(C.BN2)
        lo2 = gl.convert_layout(lo, R, assert_trivial=True)
        hi2 = gl.convert_layout(hi, R, assert_trivial=True)
        return a, _keep(s[1], n0 + C.BN, lo2, hi2, C.BN2, C)
    else:
        return (a,)


@gluon.jit
def score(s, inner, C: gl.constexpr):
    """Products, soft capped; the other factor of the logits is applied inside `softmax`."""
    if C.BN2:
        return capped(s[0], inner, C), capped(s[1], inner, C)
    else:
        return (capped(s[0], inner, C),)


@gluon.jit
def _thread_max(s, N: gl.constexpr):
    return gl.max(gl.max(to_columns(s, N), 3), 1)


@gluon.jit
def _thread_sum(p, N: gl.constexpr):
    return gl.sum(gl.sum(to_columns(p, N), 3), 1)


@gluon.jit
def _exp2(x, N: gl.constexpr, C: gl.constexpr):
    if C.POLY:
        x4 = to_columns(x, N)
        # the condition is constant in every register, so only one side of it is ever computed
        p = gl.where((column_registers(N) // 8) % 4 < C.POLY, exp2_fma(x4), gl.exp2(x4))
        return from_columns(p, N, accumulator(N))
    else:
        return gl.exp2(x)


@gluon.jit
def softmax(s, m, scale_log2, MASKED: gl.constexpr, C: gl.constexpr):
    """(p in fp32, new maximum, factor for sum and output)."""
    R: gl.constexpr = rows_layout(C.BN)
    P: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, column_layout(C.BN)))
    top = _thread_max(s[0], C.BN)
    if C.BN2:
        top = gl.maximum(top, gl.convert_layout(_thread_max(s[1], C.BN2), P, assert_trivial=True))
    m_new = gl.maximum(m, gl.convert_layout(gl.max(top, 1), R, assert_trivial=True))
    if C.LAZY:
        m_new = gl.where((m_new - m) * scale_log2 > LAZY_LOG2, m_new, m)
    pivot = m_new * scale_log2
    if MASKED:  # a row that has seen no key: -inf - -inf would be NaN
        pivot = gl.where(m_new == float("-inf"), 0.0, pivot)
    alpha = gl.exp2(m * scale_log2 - pivot)
    p = _exp2(s[0] * scale_log2 - gl.expand_dims(pivot, 1), C.BN, C)
    if C.BN2:
        pivot = gl.convert_layout(pivot, rows_layout(C.BN2), assert_trivial=True)
        return (p, _exp2(s[1] * scale_log2 - gl.expand_dims(pivot, 1), C.BN2, C)), m_new, alpha
    else:
        return (p,), m_new, alpha


@gluon.jit
def thread_sums(p, C: gl.constexpr):
    """Row sums of what each thread holds, (64, 4): no shuffles."""
    l = _thread_sum(p[0], C.BN)
    if C.BN2:
        P: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, column_layout(C.BN)))
        l += gl.convert_layout(_thread_sum(p[1], C.BN2), P, assert_trivial=True)
    return l


@gluon.jit
def per_thread(x, C: gl.constexpr):
    """A value per row, shaped to multiply `thread_sums`."""
    A: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, column_layout(C.BN))))
    return gl.expand_dims(gl.convert_layout(x, A, assert_trivial=True), 1)


@gluon.jit
def pack(p, dtype: gl.constexpr, C: gl.constexpr):
    """P as register operand of wgmma."""
    OP: gl.constexpr = gl.DotOperandLayout(0, accumulator(C.V0), 2)
    a = gl.convert_layout(p[0].to(dtype), OP, assert_trivial=True)
    if C.BN2:
        return a, gl.convert_layout(p[1].to(dtype), OP, assert_trivial=True)
    else:
        return (a,)


@gluon.jit
def scale_part(acc, factor, N: gl.constexpr, LAZY: gl.constexpr):
    """acc * factor per row; LAZY: factors are nearly always 1."""
    factor = gl.expand_dims(gl.convert_layout(factor, rows_layout(N), assert_trivial=True), 1)
    if LAZY:
        return rescale_rows(acc, factor, N)
    else:
        return acc * factor


@gluon.jit
def scale_output(acc, factor, C: gl.constexpr):
    if C.V1:
        return scale_part(acc[0], factor, C.V0, C.LAZY), scale_part(acc[1], factor, C.V1, C.LAZY)
    else:
        return (scale_part(acc[0], factor, C.V0, C.LAZY),)


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
