"""The oracle against PyTorch's autograd, and against closed forms that need neither."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import BACKWARD_CASES, CASES, Case, build, ids

from flash_attn import dispatch
from flash_attn.reference import attention, eager

CLOSE = dict(rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_oracle_equals_autograd_in_fp64(case):
    problem, ops, *_ = build(case)
    out, lse = attention.forward(problem, ops)
    eager_out, eager_lse = eager.forward(problem, ops, torch.float64)
    torch.testing.assert_close(out, eager_out, **CLOSE)
    torch.testing.assert_close(lse, eager_lse, **CLOSE)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse).masked_fill(lse.isinf(), 0.0)
    got = attention.backward(problem, ops, out, lse, dout, dlse)
    want = eager.backward(problem, ops, dout, dlse, torch.float64)
    for name, g, w in zip(got._fields, got, want, strict=True):
        if w is not None:
            torch.testing.assert_close(g, w, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("causal", [False, True])
def test_oracle_equals_torch_sdpa(causal):
    p, ops, *_ = build(Case("sdpa", max_q=19, max_k=19, causal=causal), dtype=torch.float64)
    q, k, v = (x.transpose(1, 2).clone().requires_grad_() for x in ops[:3])
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out, lse = attention.forward(p, ops)
    torch.testing.assert_close(out, want.transpose(1, 2), **CLOSE)
    dout = torch.randn_like(out)
    grads = attention.backward(p, ops, out, lse, dout)
    for g, w in zip(grads[:3], torch.autograd.grad(want, (q, k, v), dout.transpose(1, 2)), strict=True):
        torch.testing.assert_close(g, w.transpose(1, 2), **CLOSE)


def test_one_key_returns_its_value():
    p, ops, *_ = build(Case("one", max_k=1, scale=3.0), dtype=torch.float64)
    out, lse = attention.forward(p, ops)
    torch.testing.assert_close(out, ops.v.repeat_interleave(2, 2).expand_as(out), **CLOSE)
    s = torch.einsum("bmhd,bnhd->bhm", ops.q, ops.k.repeat_interleave(2, 2)) * 3.0
    torch.testing.assert_close(lse, s, **CLOSE)


def test_zero_scale_averages_the_keys_that_a_row_sees():
    p, ops, *_ = build(Case("mean", scale=0.0, causal=True, max_q=5, max_k=9), dtype=torch.float64)
    out, lse = attention.forward(p, ops)
    for i in range(5):
        mean = ops.v[:, : i + 5].mean(1).repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, i], mean, **CLOSE)
        assert torch.allclose(lse[:, :, i], torch.tensor(math.log(i + 5), dtype=torch.float64))


def test_sink_takes_its_share_and_rows_without_keys_give_zero():
    case = Case("sink", scale=0.0, causal=True, max_q=5, max_k=3, sink=True)
    p, ops, *_ = build(case, dtype=torch.float64)
    out, lse = attention.forward(p, ops)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    sink = ops.sink.double()
    assert torch.allclose(lse[:, :, 0], sink.expand(2, -1))
    for i in range(2, 5):
        total = ops.v[:, : i - 1].sum(1).repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, i], total / (i - 1 + sink.exp())[:, None], **CLOSE)


@pytest.mark.parametrize("forward", [attention.forward, eager.forward])
def test_sink_of_minus_infinity_is_no_sink(forward):
    """Also for the rows that see no key."""
    p, ops, *_ = build(Case("sink", causal=True, max_q=5, max_k=3, sink=True), dtype=torch.float64)
    got = forward(p, ops._replace(sink=torch.full_like(ops.sink, -math.inf)))
    want = forward(p._replace(sink=False), ops._replace(sink=None))
    for x, w in zip(got, want, strict=True):
        torch.testing.assert_close(x, w, **CLOSE)
    assert got[1][:, :, :2].eq(-math.inf).all() and got[0].isfinite().all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_either_infinity_as_lse_means_that_a_row_saw_nothing(sign):
    p, ops, *_ = build(Case("empty", causal=True, max_q=7, max_k=3))
    out, lse = attention.forward(p, ops)
    assert lse[..., :4].isneginf().all()
    dout = torch.randn_like(out)
    grads = attention.backward(p, ops, out, lse.masked_fill(lse.isinf(), sign * math.inf), dout)
    assert all(torch.isfinite(g).all() for g in grads[:3])
    assert not grads.dq[:, :4].any()
    torch.testing.assert_close(grads, attention.backward(p, ops, out, lse, dout))


@pytest.mark.parametrize("case", BACKWARD_CASES[:8], ids=ids)
def test_backward_uses_the_passed_out_and_lse(case):
    """Two halves of the keys with the lse and out of the whole give the gradients of the whole."""
    if case.causal or case.window != (-1, -1) or case.dropout_p or case.alibi:
        case = case._replace(causal=False, window=(-1, -1), dropout_p=0.0, alibi="")
    p, ops, *_ = build(case)
    out, lse = attention.forward(p, ops)
    dout = torch.randn_like(out)
    whole = attention.backward(p, ops, out, lse, dout)
    half = p.max_k // 2
    parts = [
        attention.backward(
            p._replace(max_k=k.shape[1]), ops._replace(k=k, v=v), out, lse, dout
        )
        for k, v in ((ops.k[:, :half], ops.v[:, :half]), (ops.k[:, half:], ops.v[:, half:]))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0].dq + parts[1].dq, whole.dq, **CLOSE)
    torch.testing.assert_close(torch.cat([g.dk for g in parts], 1), whole.dk, **CLOSE)
    torch.testing.assert_close(torch.cat([g.dv for g in parts], 1), whole.dv, **CLOSE)


def test_backend_rounds_the_oracle_once_and_writes_where_it_is_told():
    p, ops, *_ = build(Case("backend", sink=True), dtype=torch.bfloat16)
    with dispatch.use_backend("reference"):
        backend = dispatch.select(p)
    out, lse = backend.forward(p, ops)
    exact, exact_lse = attention.forward(p, ops)
    assert torch.equal(out, exact.bfloat16()) and torch.equal(lse, exact_lse.float())
    dout = torch.randn_like(out)
    packed = torch.full((2, p.max_k, 2, p.kv_heads, p.head_dim), math.nan, dtype=p.dtype)
    dk, dv = packed.unbind(2)
    grads = backend.backward(p, ops, out, lse, dout, into=(None, dk, dv))
    want = attention.backward(p, ops, out, lse, dout)
    assert torch.equal(packed, torch.stack([want.dk, want.dv], 2).bfloat16())
    assert torch.equal(grads.dq, want.dq.bfloat16()) and torch.equal(grads.dsink, want.dsink.float())
