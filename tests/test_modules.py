"""Modules that clients import beside attention: norms, losses and MHA, against plain torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention, get_alibi_slopes
from flash_attn.ops.rms_norm import rms_norm
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)


@pytest.mark.parametrize("rms", [False, True])
def test_norm_with_everything_matches_the_reference_and_its_gradients(rms):
    torch.manual_seed(0)
    fn, reference = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)
    x, residual, x1 = (torch.randn(4, 7, 32, requires_grad=True) for _ in range(3))
    weight, bias, weight1, bias1 = (torch.randn(32, requires_grad=True) for _ in range(4))
    got = fn(
        x, weight, bias, residual, x1, weight1, bias1, dropout_p=0.3, prenorm=True, zero_centered_weight=True,
        return_dropout_mask=True,
    )  # fmt: skip
    out, out1, total, mask, mask1 = got
    want = reference(
        x, weight, bias, residual, x1, weight1, bias1, dropout_p=0.3, prenorm=True, zero_centered_weight=True,
        dropout_mask=mask, dropout_mask1=mask1, upcast=True,
    )  # fmt: skip
    leaves = (x, residual, x1, weight, bias, weight1, bias1)
    douts = [torch.randn_like(t) for t in want]
    for a, b in zip((out, out1, total), want, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad((out, out1, total), leaves, douts)
    for a, b in zip(grads, torch.autograd.grad(want, leaves, douts), strict=True):
        torch.testing.assert_close(a, b)
    assert 0.5 < mask.float().mean() < 0.9


def test_norm_writes_into_given_outputs_and_keeps_the_residual_in_fp32():
    x, residual = (torch.randn(3, 16, dtype=torch.bfloat16) for _ in range(2))
    out, total = torch.empty_like(x), torch.empty(3, 16)
    got = rms_norm_fn(
        x, torch.ones(16), None, residual, prenorm=True, residual_in_fp32=True, out=out, residual_out=total
    )
    assert got[0] is out and got[1] is total
    torch.testing.assert_close(total, x.float() + residual.float())
    rowscale = torch.rand(3)
    scaled = layer_norm_fn(x.float(), torch.ones(16), None, rowscale=rowscale)
    torch.testing.assert_close(scaled, F.layer_norm(x.float() * rowscale[:, None], (16,), eps=1e-6))
    with pytest.raises(ArgumentValueError, match="rowscale must be None when x1 is given"):
        layer_norm_fn(x, torch.ones(16), None, x1=x, rowscale=rowscale)


def test_norm_then_linear_and_the_module():
    x = torch.randn(5, 16)
    weight, bias = torch.randn(8, 16), torch.randn(8)
    got = layer_norm_linear_fn(x, torch.ones(16), torch.zeros(16), weight, bias)
    torch.testing.assert_close(got, F.linear(F.layer_norm(x, (16,), eps=1e-6), weight, bias))
    module = RMSNorm(16, eps=1e-5)
    torch.testing.assert_close(module(x), rms_norm(x, module.weight, 1e-5))
    torch.testing.assert_close(module(x), F.rms_norm(x, (16,), module.weight, 1e-5))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy_matches_torch(smoothing, inplace):
    torch.manual_seed(0)
    logits = torch.randn(10, 33, requires_grad=True)
    labels = torch.randint(33, (10,))
    labels[3] = -100
    labels = labels.to(torch.int32 if inplace else torch.int64)
    want = F.cross_entropy(0.7 * logits, labels.long(), label_smoothing=smoothing)
    (want_grad,) = torch.autograd.grad(want, logits)
    loss = CrossEntropyLoss(label_smoothing=smoothing, logit_scale=0.7, inplace_backward=inplace)(
        logits * 1.0, labels
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], want_grad)


def test_z_loss_and_precomputed_lse():
    logits = torch.randn(6, 9, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(9, (6,))
    lse = logits.logsumexp(-1)
    losses, z = cross_entropy_loss(logits, labels, lse.detach(), lse_square_scale=1e-2)
    want = F.cross_entropy(logits, labels, reduction="none") + 1e-2 * lse.square()
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(z, 1e-2 * lse.square().detach())
    got, expected = (torch.autograd.grad(t.sum(), logits, retain_graph=True)[0] for t in (losses, want))
    torch.testing.assert_close(got, expected)


def test_alibi_slopes():
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert len(get_alibi_slopes(12)) == 12 and len(set(get_alibi_slopes(12))) == 12


@pytest.mark.parametrize("causal", [False, True])
def test_packed_modules_match_plain_attention(causal):
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 4, 16)
    plain = MHA(64, 4, causal=causal).inner_attn(qkv)
    torch.testing.assert_close(FlashSelfAttention(causal=causal)(qkv), plain)
    torch.testing.assert_close(FlashCrossAttention(causal=causal)(qkv[:, :, 0], qkv[:, :, 1:]), plain)
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    packed = FlashSelfAttention(causal=causal)(qkv.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=9)
    torch.testing.assert_close(packed.view_as(plain), plain)


@pytest.mark.parametrize("heads_kv", [4, 2])
def test_mha_flash_equals_plain_with_rotary_and_gradients(heads_kv):
    torch.manual_seed(0)
    flash = MHA(64, 4, heads_kv, causal=True, rotary_emb_dim=8, use_flash_attn=True)
    plain = MHA(64, 4, heads_kv, causal=True, rotary_emb_dim=8)
    plain.load_state_dict(flash.state_dict())
    x = torch.randn(2, 11, 64)
    got, want = flash(x), plain(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for a, b in zip(flash.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mha_generates_from_its_cache():
    torch.manual_seed(0)
    module = MHA(64, 4, 2, causal=True, rotary_emb_dim=16, use_flash_attn=True, layer_idx=0)
    x = torch.randn(2, 8, 64)
    want = module(x)
    state = SimpleNamespace(
        max_seqlen=12, max_batch_size=2, seqlen_offset=0, batch_size_offset=0, key_value_memory_dict={},
        lengths_per_sample=None,
    )  # fmt: skip
    parts = [module(x[:, :5], inference_params=state)]
    for i in range(5, 8):
        state.seqlen_offset = i
        parts.append(module(x[:, i : i + 1], inference_params=state))
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_cross_attention_and_what_is_refused():
    module = MHA(32, 2, cross_attn=True, use_flash_attn=True)
    assert module(torch.randn(1, 3, 32), torch.randn(1, 7, 32)).shape == (1, 3, 32)
    assert module(torch.randn(1, 9, 32), mixer_subset=slice(0, 1)).shape == (1, 1, 32)
    with pytest.raises(UnsupportedError, match="dwconv"):
        MHA(32, 2, dwconv=True)
    with pytest.raises(ArgumentValueError, match="unpad"):
        module(torch.randn(1, 3, 32), key_padding_mask=torch.ones(1, 3, dtype=torch.bool))
