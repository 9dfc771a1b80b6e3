"""The private names of FlashAttention-2 that other projects call, with the calls they make."""

import inspect
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

import flash_attn_2_cuda
from flash_attn import _legacy, flash_attn_func, flash_attn_interface, flash_attn_varlen_func, use_backend
from flash_attn.flash_attn_interface import (
    USE_TRITON_ROCM,
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
    _wrapped_flash_attn_forward,
    flash_attn_gpu,
    maybe_contiguous,
    round_multiple,
)

ROOT = Path(__file__).parent.parent
WINDOW = dict(window_size_left=-1, window_size_right=-1)

# Recorded from flash-attn 2.8.4: names and order are API for ring-flash-attention, Megatron and diffusers.
PARAMETERS = {
    "_flash_attn_forward": (
        "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax"
    ),
    "_flash_attn_varlen_forward": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left "
        "window_size_right softcap alibi_slopes return_softmax block_table leftpad_k seqused_k zero_tensors num_splits"
    ),
    "_flash_attn_backward": (
        "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right softcap "
        "alibi_slopes deterministic rng_state"
    ),
    "_flash_attn_varlen_backward": (
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
        "softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state "
        "zero_tensors"
    ),
}
REQUIRED = {
    "_flash_attn_forward": 11,
    "_flash_attn_varlen_forward": 10,
    "_flash_attn_backward": 17,
    "_flash_attn_varlen_backward": 21,
}


def dense(dtype=torch.float32, **changes):
    return cases.build(cases.Case("dense", dtype=dtype, **changes))


def packed(**changes):
    return cases.build(
        cases.Case("packed", batch=4, packed_q=(17, 0, 5, 12), packed_k=(23, 7, 0, 9), **changes)
    )


def lengths(built) -> dict:
    ops, problem = built.operands, built.problem
    return dict(
        cu_seqlens_q=ops.cu_seqlens_q,
        cu_seqlens_k=ops.cu_seqlens_k,
        max_seqlen_q=problem.max_q,
        max_seqlen_k=problem.max_k,
    )


def used(built, x, cu):
    """The rows of a packed tensor that a sequence owns (the factory adds NaN rows behind them)."""
    return x[: int(getattr(built.operands, cu)[-1])]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_upstreams(name):
    """As ring-flash-attention reads them: from the function, or `_init_fn` of a custom op."""
    spec = inspect.getfullargspec(getattr(flash_attn_interface, name)._init_fn)
    assert spec.args == PARAMETERS[name].split()
    assert len(spec.args) - len(spec.defaults or ()) == REQUIRED[name]
    wrapped = getattr(flash_attn_interface, name.replace("_flash", "_wrapped_flash"))
    assert wrapped is getattr(torch.ops.flash_attn, name)


def test_forward_gives_four():
    """Positional, as diffusers' context parallelism calls it, with its dropout that only asks for the lse."""
    q, k, v = dense().operands[:3]
    out, lse, s_dmask, rng_state = _wrapped_flash_attn_forward(
        q, k, v, 1e-30, 0.25, True, -1, -1, 0.0, None, True
    )
    want, want_lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert s_dmask.shape == (0,), "no quadratic tensor for a dropout of nothing"
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64


def test_forward_and_backward_share_the_dropout_mask():
    q, k, v = (x.requires_grad_() for x in dense(torch.float64).operands[:3])
    torch.manual_seed(3)
    want = flash_attn_func(q, k, v, 0.3)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), dout)
    torch.manual_seed(3)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, s_dmask, rng_state = _flash_attn_forward(q, k, v, 0.3, 0.25, False, -1, -1, 0.0, None, True)
    assert torch.equal(out, want) and s_dmask.shape == (2, 4, 17, 23)
    into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _flash_attn_backward(
        dout, q, k, v, out, lse, *into, 0.3, 0.25, False, -1, -1, 0.0, None, False, rng_state
    )
    for g, w in zip(into, grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_backward_writes_in_place_also_into_views():
    """ring-flash-attention passes buffers; packed callers pass views of one tensor."""
    built = dense()
    q, k, v = (x.requires_grad_() for x in built.operands[:3])
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    dkv = torch.full((*k.shape[:2], 2, *k.shape[2:]), torch.nan)
    dq = torch.full((*q.shape, 2), torch.nan)[..., 0]  # even a strided last dimension
    softmax_d = _flash_attn_backward(
        dout, q, k, v, out, lse, dq, dkv[:, :, 0], dkv[:, :, 1], dropout_p=0.0, softmax_scale=0.25, causal=True,
        softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None, **WINDOW,
    )  # fmt: skip
    for g, w in zip((dq, *dkv.unbind(2)), want, strict=True):
        torch.testing.assert_close(g, w)
    delta = (dout * out).sum(-1).transpose(1, 2)
    assert softmax_d.shape == (2, 4, 128)
    torch.testing.assert_close(softmax_d[:, :, :17], delta)


def test_backward_uses_the_passed_out_and_lse():
    """A ring merges the results of two halves of the keys; each half's backward gets the merged ones."""
    q, k, v = dense(torch.float64, heads=2, kv_heads=2).operands[:3]
    scale = 0.25
    halves = [
        (k[:, :10].contiguous(), v[:, :10].contiguous()),
        (k[:, 10:].contiguous(), v[:, 10:].contiguous()),
    ]
    parts = [_flash_attn_forward(q, kh, vh, 0.0, scale, False, -1, -1, 0.0, None, False) for kh, vh in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * torch.exp(part_lse - lse).transpose(1, 2)[..., None] for o, part_lse, *_ in parts)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = flash_attn_func(*whole)
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(want, whole, dout)
    dq = torch.zeros_like(q)
    for (kh, vh), lo in zip(halves, (0, 10), strict=True):
        part = [torch.empty_like(x) for x in (q, kh, vh)]
        _flash_attn_backward(dout, q, kh, vh, out, lse, *part, 0.0, scale, False, -1, -1, 0.0, None, True)
        dq += part[0]
        torch.testing.assert_close(part[1], grads[1][:, lo : lo + kh.shape[1]])
        torch.testing.assert_close(part[2], grads[2][:, lo : lo + kh.shape[1]])
    torch.testing.assert_close(dq, grads[0])


def test_varlen_forward_and_backward():
    """By keyword, as ring-flash-attention and fla call them; with sequences that are empty on either side."""
    built = packed()
    q, k, v = built.operands[:3]
    out, lse, s_dmask, rng_state = _flash_attn_varlen_forward(
        q=q, k=k, v=v, **lengths(built), dropout_p=0.0, softmax_scale=0.25, causal=True, alibi_slopes=None,
        return_softmax=False, **WINDOW,
    )  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse, _ = flash_attn_varlen_func(*leaves, **lengths(built), causal=True, return_attn_probs=True)
    assert torch.equal(used(built, out, "cu_seqlens_q"), used(built, want, "cu_seqlens_q"))
    assert torch.equal(lse, want_lse) and lse.shape == (4, q.shape[0])
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(want, leaves, dout)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    softmax_d = _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, **lengths(built), dropout_p=0.0, softmax_scale=0.25, causal=True,
        softcap=0.0, alibi_slopes=None, deterministic=True, rng_state=rng_state, **WINDOW,
    )  # fmt: skip
    for g, w in zip((dq, dk, dv), grads, strict=True):
        torch.testing.assert_close(g, w)
    assert softmax_d.shape == (4, q.shape[0] + 128 * 4)


def test_varlen_forward_with_pages_and_used_lengths():
    paged = cases.build(cases.Case("paged", batch=3, max_k=24, seqused_k=(7, 24, 18), page_size=4, max_q=5))
    ops = paged.operands
    q = ops.q.flatten(0, 1)
    cu_q = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    cu_k = torch.tensor([0, 24, 48, 72], dtype=torch.int32)
    out = _flash_attn_varlen_forward(
        q,
        ops.k,
        ops.v,
        cu_q,
        cu_k,
        5,
        24,
        0.0,
        0.25,
        True,
        -1,
        0,
        block_table=ops.block_table,
        seqused_k=ops.seqused_k,
    )[0]
    from flash_attn.reference import attention as oracle

    want, _ = oracle.forward(paged.problem._replace(right=0), ops)
    torch.testing.assert_close(out, want.flatten(0, 1).float())


def test_upstreams_messages():
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(RuntimeError, match="return_softmax is only supported when p_dropout > 0.0"):
        _flash_attn_forward(q, q, q, 0.0, 0.25, False, -1, -1, 0.0, None, True)
    built = cases.build(cases.Case("paged", batch=2, max_k=24, seqused_k=(7, 24), page_size=4, max_q=1))
    cu = torch.arange(3, dtype=torch.int32)
    arguments = (
        built.operands.q.flatten(0, 1),
        built.operands.k,
        built.operands.v,
        cu,
        cu * 7,
        1,
        24,
        0.0,
        0.25,
        False,
    )
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported"):
        _flash_attn_varlen_forward(*arguments, -1, 0, block_table=built.operands.block_table, num_splits=4)
    with pytest.raises(RuntimeError, match="num_splits > 128 not supported"):
        _flash_attn_varlen_forward(*arguments, -1, -1, block_table=built.operands.block_table, num_splits=129)
    lse, out = torch.zeros(1, 2, 8), torch.zeros_like(q)
    with pytest.raises(RuntimeError, match=r"dq must have shape \(1, 8, 2, 16\).*got \(1, 8, 2, 8\)"):
        _flash_attn_backward(
            out, q, q, q, out, lse, q[..., :8].clone(), None, None, 0.0, 0.25, False, -1, -1, 0.0, None, False
        )
    with pytest.raises(RuntimeError, match="softmax_lse must have shape"):
        _flash_attn_backward(
            out, q, q, q, out, lse[:, :, :3], None, None, None, 0.0, 0.25, False, -1, -1, 0.0, None, False
        )
    with pytest.raises(RuntimeError, match="rng_state must be that of the forward"):
        _flash_attn_backward(
            out, q, q, q, out, lse, None, None, None, 0.5, 0.25, False, -1, -1, 0.0, None, False
        )


@pytest.mark.parametrize(
    ("entry", "slot"), [("fwd", 12), ("varlen_fwd", 20), ("bwd", 17), ("varlen_bwd", 22)]
)
def test_a_generator_is_refused(entry, slot):
    """Slots counted from 0 as upstream's test does; every other argument is valid or not reached."""
    function = getattr(flash_attn_gpu, entry)
    count = len(inspect.signature(function).parameters)
    arguments = [None] * count
    arguments[slot] = torch.Generator()
    with pytest.raises(RuntimeError, match=r"generator` argument is no longer supported"):
        function(*arguments)


def test_raw_entry_points_equal_the_public_functions():
    built = dense()
    q, k, v = (x.requires_grad_() for x in built.operands[:3])
    want = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    given = torch.full_like(q, torch.nan)
    out, lse, p, rng = flash_attn_2_cuda.fwd(q, k, v, given, None, 0.0, 0.25, True, -1, -1, 0.0, False, None)
    assert out is given and torch.equal(out, want)
    dk = torch.full_like(k, torch.nan)
    result = flash_attn_2_cuda.bwd(
        dout, q, k, v, out, lse, None, dk, None, None, 0.0, 0.25, True, -1, -1, 0.0, False, None, rng
    )
    assert result[1] is dk
    for g, w in zip(result[:3], grads, strict=True):
        torch.testing.assert_close(g, w)

    built = packed()
    q, k, v = built.operands[:3]
    cu_q, cu_k, max_q, max_k = lengths(built).values()
    out, lse, _, rng = flash_attn_2_cuda.varlen_fwd(
        q,
        k,
        v,
        None,
        cu_q,
        cu_k,
        None,
        None,
        None,
        None,
        max_q,
        max_k,
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
    want = flash_attn_varlen_func(q, k, v, **lengths(built), causal=True)
    assert torch.equal(used(built, out, "cu_seqlens_q"), used(built, want, "cu_seqlens_q"))
    dq, dk, dv, _ = flash_attn_2_cuda.varlen_bwd(
        torch.ones_like(out), q, k, v, out, lse, None, None, None, cu_q, cu_k, None, max_q, max_k, 0.0, 0.25, False,
        True, -1, -1, 0.0, False, None, rng,
    )  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(
        flash_attn_varlen_func(*leaves, **lengths(built), causal=True), leaves, torch.ones_like(out)
    )
    for g, w in zip((dq, dk, dv), want, strict=True):
        torch.testing.assert_close(g, w)

    cache = cases.build(cases.Case("cache", max_q=1, seqused_k=(5, 23))).operands
    out, lse = flash_attn_2_cuda.fwd_kvcache(
        cache.q, cache.k, cache.v, None, None, cache.seqused_k, None, None, None, None, None, None, None, 0.25, False,
        -1, -1, 0.0, True, 0,
    )  # fmt: skip
    want = flash_attn_interface.flash_attn_with_kvcache(
        cache.q, cache.k, cache.v, cache_seqlens=cache.seqused_k
    )
    assert torch.equal(out, want) and lse.shape == (2, 4, 1)


@pytest.mark.parametrize(
    "changes", [dict(dtype=torch.float16), dict(size=(4, 5, 2, 8))], ids=["dtype", "shape"]
)
def test_raw_forward_refuses_an_out_that_is_not_its_result(changes):
    """It was rounded, or repeated along a dimension, in silence."""
    q = torch.randn(1, 5, 2, 8)
    out = torch.empty(**dict(size=q.shape, dtype=q.dtype) | changes)
    with pytest.raises(RuntimeError, match=r"out must have shape \(1, 5, 2, 8\) and dtype torch.float32"):
        flash_attn_2_cuda.fwd(q, q, q, out, None, 0.0, 0.3, False, -1, -1, 0.0, False, None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dout", dict(dtype=torch.float32), "query and dout must have the same dtype"),
        ("out", dict(dtype=torch.float32), "query and out must have the same dtype"),
        ("softmax_lse", dict(dtype=torch.float64), "softmax_lse must have dtype torch.float32"),
        ("dout", dict(device="meta"), "dout must be on the device of q"),
    ],
    ids=["dout", "out", "lse", "device"],
)
def test_backward_refuses_other_dtypes_and_devices(name, changes, message):
    """Kernels compiled for the dtype of q would read other bits of these as numbers."""
    q = torch.randn(1, 5, 2, 8, dtype=torch.float16)
    out, lse, *_ = flash_attn_2_cuda.fwd(q, q, q, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None)
    given = dict(dout=out, out=out, softmax_lse=lse)
    given[name] = given[name].to(**changes)
    dout, out, lse = given.values()
    with pytest.raises(RuntimeError, match=message):
        flash_attn_2_cuda.bwd(
            dout, q, q, q, out, lse, None, None, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None, None
        )


def test_small_names():
    assert USE_TRITON_ROCM is False and flash_attn_gpu.varlen_bwd is flash_attn_2_cuda.varlen_bwd
    assert _get_block_size_n(torch.device("cpu"), 64, True, False) >= 1 << 20
    assert [round_multiple(x, 128) for x in (1, 128, 129)] == [128, 128, 256]
    strided = torch.zeros(4, 8)[:, ::2]
    assert maybe_contiguous(strided).is_contiguous() and maybe_contiguous(None) is None


def test_two_copies_in_one_process_are_one_clear_error(tmp_path):
    """torch would let the second replace the operators of the first in silence."""
    code = """
import torch
lib = torch.library.Library("flash_attn", "DEF")
lib.define("_flash_attn_forward(Tensor q) -> Tensor")
try:
    import flash_attn
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "two copies of flash_attn in one process" in done.stdout, done.stderr
    _legacy.claim_operators(_legacy.__file__)  # the same copy may be imported anew
    with pytest.raises(ImportError, match="two copies"):
        _legacy.claim_operators("/elsewhere/flash_attn/_legacy.py")


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck_dense(dropout_p):
    q, k, v = dense(max_q=5, max_k=7).operands[:3]
    arguments = (q, k, v, dropout_p, 0.25, True, -1, -1, 0.0, torch.rand(4), dropout_p > 0)
    checks = OPCHECKS if dropout_p == 0 else ("test_schema", "test_faketensor")  # a random result differs
    torch.library.opcheck(torch.ops.flash_attn._flash_attn_forward, arguments, test_utils=checks)
    out, lse, _, rng = torch.ops.flash_attn._flash_attn_forward(*arguments)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    backward = (
        torch.randn_like(out),
        q,
        k,
        v,
        out,
        lse,
        *grads,
        dropout_p,
        0.25,
        True,
        -1,
        -1,
        0.0,
        torch.rand(4),
        False,
        rng,
    )
    torch.library.opcheck(torch.ops.flash_attn._flash_attn_backward, backward, test_utils=OPCHECKS)


def test_opcheck_varlen():
    built = packed()
    q, k, v = (
        used(built, x, cu).clone()
        for x, cu in zip(built.operands[:3], ("cu_seqlens_q", *["cu_seqlens_k"] * 2), strict=True)
    )
    arguments = (q, k, v, *lengths(built).values(), 0.0, 0.25, True)
    torch.library.opcheck(torch.ops.flash_attn._flash_attn_varlen_forward, arguments, test_utils=OPCHECKS)
    out, lse, _, rng = torch.ops.flash_attn._flash_attn_varlen_forward(*arguments)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    backward = (
        torch.randn_like(out),
        q,
        k,
        v,
        out,
        lse,
        *grads,
        *lengths(built).values(),
        0.0,
        0.25,
        True,
        -1,
        -1,
        0.0,
        None,
        False,
    )
    torch.library.opcheck(torch.ops.flash_attn._flash_attn_varlen_backward, backward, test_utils=OPCHECKS)


@pytest.fixture(autouse=True)
def _oracle():
    with use_backend("reference"):
        yield
