"""The arithmetic of the Hopper forward on one warpgroup's 64 rows: products, mask, the end.

A head dim may have two power-of-two parts (D0, D1 and V0, V1); O is a tuple with one entry per part. `C` is the
forward's Config. Masks, soft cap and key ranges come from `tile/`, the softmax from `hopper_softmax.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_attn.forward.hopper_softmax import accumulator, rows_layout
from flash_attn.tile.hopper import column_registers, from_columns, row_limit, to_columns
from flash_attn.tile.score import LOG2E

LN2 = gl.constexpr(0.6931471805599453)


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
def wait_output_and_scores(tokens, s):
    """(O, S) once both are there."""
    if len(tokens) == 1:
        a, s = warpgroup_mma_wait(0, deps=(tokens[0], s))
        return (a,), s
    else:
        a, b, s = warpgroup_mma_wait(0, deps=(tokens[0], tokens[1], s))
        return (a, b), s


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
def scale_part(acc, factor, N: gl.constexpr):
    """acc * factor per row."""
    return acc * gl.expand_dims(gl.convert_layout(factor, rows_layout(N), assert_trivial=True), 1)


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
def finish(pivot, l, rows, work, sink, C: gl.constexpr):
    """(factor of O, natural-log LSE): 0 and -inf for rows without keys. A sink joins the denominator."""
    l = gl.convert_layout(gl.sum(l, 1), rows_layout(C.BN), assert_trivial=True)
    top = gl.convert_layout(gl.max(pivot, 1), rows_layout(C.BN), assert_trivial=True)
    shrink = 1.0
    if C.sink:
        s = gl.load(sink + work.h).to(gl.float32) * LOG2E
        pivot = gl.maximum(top, s)
        base = gl.where(pivot == float("-inf"), 0.0, pivot)  # neither key nor sink: -inf - -inf would be NaN
        shrink = gl.exp2(top - base)
        l = l * shrink + gl.exp2(s - base)
        top = pivot
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    inv = gl.where(empty, 0.0, shrink / safe)
    lse = gl.where(empty, float("-inf"), (top + gl.log2(safe)) * LN2)
    if C.used_q:
        lse = gl.where(rows < work.M, lse, float("-inf"))
    return inv, lse
