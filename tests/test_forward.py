"""What the public functions give forward, on the oracle, so that only the way to a backend is tested here."""

import cases
import pytest
import torch
from error_cases import valid

import flash_attn
from flash_attn.reference import attention as oracle

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("case", [c for c in cases.CASES if cases.build(c).function], ids=cases.ids)
def test_public_call_equals_the_oracle(case):
    built = cases.build(case)
    torch.manual_seed(7)
    out = getattr(flash_attn, built.function)(**built.kwargs)
    ops = built.operands
    if case.dropout_p:
        torch.manual_seed(7)
        ops = ops._replace(rng_state=torch.randint(0, 2**62, (2,)))
    want, _ = oracle.forward(built.problem, ops)
    assert out.dtype == case.dtype and torch.equal(out, want.to(case.dtype))
    assert not out.isnan().any()


def test_return_attn_probs_gives_three():
    q = torch.randn(2, 6, 4, 16)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 6) and lse.dtype == torch.float32
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype


def test_s_dmask_shows_what_dropout_kept():
    """Rebuild out from S_dmask: it has the mask, the sign and the scores of the call that returned it."""
    q, k, v = torch.randn(3, 2, 33, 4, 16, dtype=torch.float64).unbind(0)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 33, 33)
    weights = s_dmask.abs() / s_dmask.abs().sum(-1, keepdim=True)
    kept = (s_dmask >= 0) * weights / 0.7
    torch.testing.assert_close(torch.einsum("bhmn,bnhd->bmhd", kept, v), out)
    visible = torch.ones(33, 33).tril().bool()
    assert 0.2 < (s_dmask < 0)[:, :, visible].double().mean() < 0.4
    assert s_dmask.abs().amax(-1).eq(1).all()


def test_s_dmask_of_packed_sequences_has_the_longest_lengths():
    kwargs = valid("flash_attn_varlen_func")
    s_dmask = flash_attn.flash_attn_varlen_func(**kwargs, dropout_p=0.5, return_attn_probs=True)[2]
    assert s_dmask.shape == (2, 4, 5, 8)
    assert s_dmask[1, :, 4:].eq(0).all() and s_dmask[1, :, :, 6:].eq(0).all()
    assert s_dmask[1, :, :4, :6].ne(0).all()


def test_dropout_follows_manual_seed():
    q = torch.randn(1, 8, 2, 16)

    def draw(seed):
        torch.manual_seed(seed)
        return flash_attn.flash_attn_func(q, q, q, 0.5)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_a_row_that_sees_no_key_has_lse_plus_infinity():
    """Inside the package it is -inf; FlashAttention-2 returns +inf."""
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 3, 2, 16)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert lse[:, :, :2].eq(torch.inf).all() and lse[:, :, 2:].isfinite().all()
    assert out[:, :2].eq(0).all()
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, k, cache_seqlens=0, return_softmax_lse=True)
    assert lse.eq(torch.inf).all() and out.eq(0).all()


def test_a_window_never_empties_a_row_that_has_a_key_on_its_diagonal():
    """`surface_lse` returns lse as it is for such problems; then it must hold no -inf."""
    for M, N, window in [(4, 4, (0, 0)), (3, 9, (1, 0)), (1, 1, (0, 0)), (3, 9, (0, 2))]:
        q, k = torch.randn(1, M, 2, 16), torch.randn(1, N, 2, 16)
        lse = flash_attn.flash_attn_func(q, k, k, window_size=window, return_attn_probs=True)[1]
        assert lse.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8)], ids=["no batch", "no queries"])
def test_nothing_to_compute(shape):
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 5, 2, 8, requires_grad=True)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert out.shape == shape and lse.shape == (shape[0], 2, shape[1])
    out.sum().backward()
    assert q.grad.shape == shape and k.grad.eq(0).all()


def test_no_keys():
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 0, 2, 8, requires_grad=True)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.eq(0).all() and lse.eq(torch.inf).all()
    out.sum().backward()
    assert q.grad.eq(0).all() and k.grad.shape == k.shape


def test_packed_forms_equal_the_separate_ones():
    qkv = torch.randn(2, 7, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), want)
    flat, cu = qkv.flatten(0, 1), torch.tensor([0, 7, 14], dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(flat, cu, 7, causal=True)
    assert torch.equal(out, want.flatten(0, 1))
    out = flash_attn.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 7, 7, causal=True)
    assert torch.equal(out, want.flatten(0, 1))


def test_a_strided_last_dimension_gives_the_same():
    q = torch.randn(2, 7, 4, 32)[..., ::2]
    want = flash_attn.flash_attn_func(q.contiguous(), q.contiguous(), q.contiguous())
    assert torch.equal(flash_attn.flash_attn_func(q, q, q), want)
    qkv = torch.randn(2, 7, 3, 4, 32)[..., ::2].requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv)
    assert torch.equal(out, flash_attn.flash_attn_qkvpacked_func(qkv.contiguous()))
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_the_cache_call_keeps_no_graph():
    q = torch.randn(2, 1, 4, 16, requires_grad=True)
    cache = torch.randn(2, 8, 2, 16)
    assert not flash_attn.flash_attn_with_kvcache(q, cache, cache).requires_grad
