"""Calls beside the public functions: xFormers, Megatron-LM, SGLang's mixture of blocks, Unsloth, verl and axolotl.

Written down from xformers 0.0.32 and 0.0.35, megatron-core 0.16, sglang 0.5.23, unsloth 2026.10, verl 0.9 and axolotl
0.19; they need CUDA to be installed or to run.
"""

import importlib
import importlib.util
import inspect

import cases
import pytest
import torch
from torch._C import parse_schema

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch

CU = torch.tensor([0, 5, 14, 17], dtype=torch.int32)


def leaves(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# --- xFormers, ops/fmha/flash.py and flash3.py ---


def test_xformers_accepts_the_operators_of_flash_attention_3():
    """It takes `flash_attn_3` when `flash_attn_3._C` is there and the schemas are these (all of FlashAttention-3's
    own tests ask for the same)."""
    assert importlib.util.find_spec("flash_attn_3._C")
    importlib.import_module("flash_attn_3._C")
    forward = parse_schema(
        "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None,"
        " Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
        " Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None,"
        " int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None,"
        " Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None,"
        " Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False,"
        " int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.,"
        " bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None,"
        " int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    backward = parse_schema(
        "flash_attn_3::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,"
        " Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None,"
        " Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None,"
        " int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
        " int window_size_right=-1, float softcap=0., bool deterministic=False, int sm_margin=0)"
        " -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    for operator, asked in ((torch.ops.flash_attn_3.fwd, forward), (torch.ops.flash_attn_3.bwd, backward)):
        assert operator.default._schema.is_backward_compatible_with(asked)


@pytest.mark.parametrize("generation", [2, 3])
def test_xformers_gradients_of_one_packed_projection(generation):
    """q, k and v of one tensor: its backward passes views of one chunk, (tokens, 3, heads, dim), to be written."""
    (qkv,) = leaves((17, 3, 4, 16))
    want = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU, 9, causal=True)
    dout = torch.randn_like(want)
    (grad,) = torch.autograd.grad(want, qkv, dout)
    q, k, v = qkv.detach().unbind(1)
    chunk = torch.full_like(qkv, torch.nan)
    grads = chunk.select(-3, 0), chunk.select(-3, 1), chunk.select(-3, 2)
    if generation == 2:
        compiled = flash_attn.flash_attn_interface.flash_attn_gpu
        out, lse, _, rng = compiled.varlen_fwd(
            q,
            k,
            v,
            None,
            CU,
            CU,
            None,
            None,
            None,
            None,
            9,
            9,
            0.0,
            0.25,
            False,
            True,
            -1,
            -1,
            0.0,
            False,
            None,
        )
        compiled.varlen_bwd(
            dout, q, k, v, out, lse, *grads, CU, CU, None, 9, 9, 0.0, 0.25, False, True, -1, -1, 0.0, False, None, rng
        )  # fmt: skip
    else:
        ops = torch.ops.flash_attn_3
        out, lse, *_ = ops.fwd(
            q, k, v, None, None, None, None, CU, CU, None, None, None, 9, 9, None, None, None, None, None, None, None,
            None, None, 0.25, True, -1, -1, 0, 0.0, True, None, 1, None, 0,
        )  # fmt: skip
        dq, dk, dv, *_ = ops.bwd(
            dout, q, k, v, out, lse, *grads, CU, CU, None, None, 9, 9, 0.25, True, -1, -1, 0.0, False, 0
        )
        assert dq is grads[0] and dk is grads[1] and dv is grads[2]
    torch.testing.assert_close(out, want.detach(), rtol=0, atol=0)
    torch.testing.assert_close(chunk, grad, rtol=1e-12, atol=1e-12)


def test_xformers_keys_with_gaps():
    """A cache laid out in slots: cu_seqlens_k says where each sequence starts, seqused_k how long it is."""
    q, k, v = (x.detach() for x in leaves((3, 4, 16), (3 * 8, 2, 16), (3 * 8, 2, 16)))
    used, slots = torch.tensor([8, 1, 5], dtype=torch.int32), torch.arange(0, 25, 8, dtype=torch.int32)
    for b, n in enumerate(used):
        k[8 * b + n : 8 * b + 8] = v[8 * b + n : 8 * b + 8] = torch.nan
    out, lse, _, _ = flash_attn.flash_attn_interface.flash_attn_gpu.varlen_fwd(
        q, k, v, None, torch.arange(4, dtype=torch.int32), slots, used, None, None, None, 1, 8, 0.0, 0.25, False, True,
        -1, -1, 0.0, False, None,
    )  # fmt: skip
    for b, n in enumerate(used):
        want, want_lse, _ = flash_attn.flash_attn_func(
            q[None, b : b + 1], k[None, 8 * b : 8 * b + n], v[None, 8 * b : 8 * b + n], return_attn_probs=True
        )
        torch.testing.assert_close(out[b], want[0, 0])
        torch.testing.assert_close(lse[:, b], want_lse[0, :, 0])


# --- Megatron-LM, core/transformer/attention.py, when it finds FlashAttention-3 ---


def test_megatron_passes_what_the_signature_names():
    """Prefill and decode over pages in one call; it picks its arguments by inspecting the operator."""
    from flash_attn_3.flash_attn_interface import _flash_attn_forward, flash_attn_with_kvcache

    built = cases.build(
        cases.Case("pages", batch=3, max_q=1, max_k=24, seqused_k=(5, 24, 9), page_size=4, causal=True)
    )
    ops = built.operands
    candidates = dict(
        q=ops.q.flatten(0, 1), k=ops.k, v=ops.v, k_new=None, v_new=None, qv=None, out=None, out_=None,
        cu_seqlens_q=torch.arange(4, dtype=torch.int32), cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None,
        seqused_k=ops.seqused_k, max_seqlen_q=1, max_seqlen_k=24, page_table=ops.block_table, kv_batch_idx=None,
        leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=True, attention_chunk=0, softcap=0.0, window_size=(-1, -1),
        window_size_left=-1, window_size_right=-1, rotary_interleaved=True, scheduler_metadata=None, num_splits=0,
        pack_gqa=None, sm_margin=0,
    )  # fmt: skip
    assert isinstance(_flash_attn_forward, torch._library.custom_ops.CustomOpDef)
    valid = inspect.signature(_flash_attn_forward._init_fn).parameters
    out, *_ = _flash_attn_forward(**{name: x for name, x in candidates.items() if name in valid})
    want = oracle.forward(built.problem, ops)[0], eager.forward(built.problem, ops)[0]
    assert_as_close_as_torch(out, want[0].flatten(0, 1), want[1].flatten(0, 1))
    decoded = flash_attn_with_kvcache(
        q=ops.q, k_cache=ops.k, v_cache=ops.v, cache_seqlens=ops.seqused_k, causal=True, page_table=ops.block_table,
        num_splits=0,
    )  # fmt: skip
    assert_as_close_as_torch(decoded, *want)


# --- SGLang, a mixture of block attentions (vmoba.py; flash-linear-attention has the same) ---


def test_two_branches_are_joined_by_their_lse():
    """Causal attention inside chunks plus full attention to chosen earlier chunks, forward and backward.

    Forward without the optional arguments, keys as views of one kv; the joined lse and out go to both backwards, whose
    gradients of keys are views of one buffer.
    """
    H, D, chunk = 2, 16, 4
    q, kv = (x.detach() for x in leaves((12, H, D), (12, 2, H, D)))
    k, v = kv.unbind(1)
    own = torch.arange(0, 13, chunk, dtype=torch.int32)
    rows = torch.arange(
        chunk, 12
    )  # every query behind the first chunk also sees the whole chunk before its own
    cu_q, cu_kv = torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 4, 8], dtype=torch.int32)
    lengths = dict(max_seqlen_q=chunk, max_seqlen_k=chunk, softmax_scale=0.25, causal=False, dropout_p=0.0)
    first, lse_1, _, _ = _flash_attn_varlen_forward(
        q=q, k=k, v=v, cu_seqlens_q=own, cu_seqlens_k=own, **lengths
    )
    second, lse_2, _, _ = _flash_attn_varlen_forward(
        q=q[rows], k=kv[:8, 0], v=kv[:8, 1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_kv, **lengths
    )
    lse = lse_1.clone()
    lse[:, rows] = torch.logaddexp(lse_1[:, rows], lse_2)
    out = first * (lse_1 - lse).exp().T[..., None]
    out[rows] += second * (lse_2 - lse[:, rows]).exp().T[..., None]

    cells = torch.arange(12)
    seen = (cells[:, None] // chunk - cells // chunk).clamp(max=2)  # 0: own chunk, 1: the one before
    mask = (seen == 0) | (seen == 1)
    leaf = [x.clone().requires_grad_() for x in (q, k, v)]
    s = torch.einsum("mhd,nhd->hmn", leaf[0], leaf[1]).mul(0.25).masked_fill(~mask, -torch.inf)
    want = torch.einsum("hmn,nhd->mhd", s.softmax(-1), leaf[2])
    torch.testing.assert_close(out, want.detach())

    dout = torch.randn_like(out)
    rest = dict(
        **lengths,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
        window_size_left=-1,
        window_size_right=-1,
    )
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse.contiguous(), dq=dq, dk=dk, dv=dv, cu_seqlens_q=own,
        cu_seqlens_k=own, **rest,
    )  # fmt: skip
    dq_2, dkv = torch.full_like(q[rows], torch.nan), torch.full_like(kv[:8], torch.nan)
    _flash_attn_varlen_backward(
        dout=dout[rows], q=q[rows], k=kv[:8, 0], v=kv[:8, 1], out=out[rows], softmax_lse=lse[:, rows].contiguous(),
        dq=dq_2, dk=dkv[:, 0], dv=dkv[:, 1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_kv, **rest,
    )  # fmt: skip
    dq[rows] += dq_2
    dk[:8] += dkv[:, 0]
    dv[:8] += dkv[:, 1]
    for got, expected in zip((dq, dk, dv), torch.autograd.grad(want, leaf, dout), strict=True):
        torch.testing.assert_close(got, expected)


# --- Unsloth, models/gemma2.py ---


@pytest.mark.parametrize("window", [None, 6])
def test_unsloths_decode_from_a_sequence_major_cache(window):
    """The cache is (positions, batch, heads, dim), seen as batch first; left padding, one length for all, soft cap."""
    M, B, H, Hk, D, n = 16, 2, 4, 2, 16, 11
    query, *stored = (x.detach() for x in leaves((B, H, 1, D), (M, B, Hk, D), (M, B, Hk, D)))
    leftpad = torch.tensor([0, 3], dtype=torch.int32)
    for x in stored:
        x[n:] = torch.nan
        x[:3, 1] = torch.nan
    out = flash_attn.flash_attn_with_kvcache(
        query.transpose(1, 2), *(x.permute(1, 0, 2, 3) for x in stored), cache_seqlens=n, cache_leftpad=leftpad,
        softmax_scale=0.3, softcap=5.0, window_size=(window - 1, 0) if window else (-1, -1),
    )  # fmt: skip
    for b, pad in enumerate(leftpad.tolist()):
        first = max(pad, n - window) if window else pad
        k, v = (x[first:n, b].repeat_interleave(H // Hk, 1) for x in stored)
        s = 5.0 * torch.tanh(torch.einsum("hd,nhd->hn", query[b, :, 0], k) * 0.3 / 5.0)
        torch.testing.assert_close(out[b, 0], torch.einsum("hn,nhd->hd", s.softmax(-1), v))


def test_unsloths_probe_of_the_compiled_module():
    from flash_attn.flash_attn_interface import flash_attn_gpu

    assert callable(flash_attn_gpu.fwd)
    assert not hasattr(
        flash_attn.flash_attn_interface, "flash_attn_cuda"
    )  # xFormers would take it for an old one


# --- verl and axolotl: the loss on packed logits ---


def test_log_probabilities_of_verl_and_the_loss_of_axolotl():
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    assert callable(rearrange)
    (logits,) = leaves((3, 7, 20), dtype=torch.float32)
    labels, mask = torch.randint(20, (3, 7)), torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    rows, indices, *_ = unpad_input(logits * 1.0, mask)
    wanted = index_first_axis(labels.flatten()[:, None], indices)[:, 0]
    result = cross_entropy_loss(rows, wanted, inplace_backward=True)
    assert isinstance(result, tuple) and len(result) == 2  # verl insists on it
    got = pad_input(-result[0][:, None], indices, 3, 7)[..., 0]
    want = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * mask
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    target = torch.where(mask, labels, -100).flatten()
    loss, _ = cross_entropy_loss(logits.flatten(0, 1), target, ignore_index=-100)
    torch.testing.assert_close(
        loss.sum() / (target != -100).sum(), torch.nn.functional.cross_entropy(logits.flatten(0, 1), target)
    )
