"""The autograd function: what it returns to autograd, saves, and hands to a backend."""

import gc
import weakref

import cases
import pytest
import torch
from torch.autograd import forward_ad

import flash_attn
from flash_attn import attention as attention_module
from flash_attn.attention import attention
from flash_attn.backends import reference
from flash_attn.errors import ArgumentTypeError, UnsupportedError
from flash_attn.problem import Gradients
from flash_attn.reference import attention as oracle

pytestmark = pytest.mark.usefixtures("reference_backend")

FP64 = [c for c in cases.BACKWARD_CASES if c.head_dim <= 64 and c.max_q * c.max_k < 1000]


def leaves(built) -> list[torch.Tensor]:
    ops = built.operands
    return [x.clone().requires_grad_() for x in (ops.q, ops.k, ops.v, ops.sink) if x is not None]


def run(built, inputs):
    names = ("q", "k", "v", "sink")
    return attention(built.problem, built.operands._replace(**dict(zip(names, inputs, strict=False))))


@pytest.mark.parametrize("case", FP64, ids=cases.ids)
def test_gradients_equal_the_oracles(case):
    """Through out and through lse at once, sink too."""
    built = cases.build(case, dtype=torch.float64)
    inputs = leaves(built)
    out, lse = run(built, inputs)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    used = lse.isfinite()
    got = torch.autograd.grad((out * dout).sum() + (lse * dlse)[used].sum(), inputs)
    want = oracle.backward(
        built.problem, built.operands, out.detach(), lse.detach(), dout, dlse.masked_fill(~used, 0.0)
    )
    for g, w in zip(got, [x for x in want if x is not None], strict=True):
        exact = 1e-12 if g.dtype == torch.float64 else 1e-6  # that of the sink, which is fp32
        torch.testing.assert_close(g, w.to(g.dtype), rtol=exact, atol=exact)


@pytest.mark.parametrize("name", ["plain", "causal", "softcap", "alibi", "dropout", "sink", "window_left"])
def test_gradcheck(name):
    case = next(c for c in cases.SINGLE if c.id == name)
    case = case._replace(batch=1, max_q=4, max_k=5, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    built = cases.build(case)
    if built.operands.sink is not None:
        built = built._replace(operands=built.operands._replace(sink=built.operands.sink.double()))
    assert torch.autograd.gradcheck(lambda *inputs: run(built, inputs), leaves(built))


@pytest.mark.parametrize("packing", ["qkv", "kv", "varlen qkv"])
def test_packed_gradient_is_written_into_one_tensor(packing, monkeypatch):
    """dq, dk and dv are views of the gradient of the packed tensor, so nothing is copied together."""
    qkv = torch.randn(2, 7, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    call = {
        "qkv": lambda: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True),
        "kv": lambda: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True),
        "varlen qkv": lambda: flash_attn.flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), cu, 7, causal=True
        ),
    }[packing]
    seen = {}
    backward = attention_module.run_backward

    def watch(problem, ops, out, lse, dout, dlse, into, forced=None):
        seen["into"] = into
        return backward(problem, ops, out, lse, dout, dlse, into, forced)

    monkeypatch.setattr(attention_module, "run_backward", watch)
    out = call()
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, qkv, dout)
    dk, dv = seen["into"][1:]
    q, k, v = qkv.detach().unbind(2)
    separate = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(
        flash_attn.flash_attn_func(*separate, causal=True), separate, dout.view(q.shape)
    )
    torch.testing.assert_close(got, torch.stack(want, 2), rtol=0, atol=0)
    assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()


def test_gradients_of_an_expanded_input_do_not_overlap():
    k = torch.randn(1, 6, 1, 16, dtype=torch.float64, requires_grad=True)
    q = torch.randn(3, 5, 4, 16, dtype=torch.float64)
    wide = k.expand(3, 6, 1, 16)
    (got,) = torch.autograd.grad(flash_attn.flash_attn_func(q, wide, wide).sum(), k)
    copy = wide.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(flash_attn.flash_attn_func(q, copy, copy).sum(), copy)
    torch.testing.assert_close(got, want.sum(0, keepdim=True))


def test_a_strided_dout_reaches_the_backend_contiguous(monkeypatch):
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    from flash_attn.backends import reference

    seen = {}
    backward = reference.backward

    def watch(problem, ops, out, lse, dout, *rest):
        seen["stride"] = dout.stride(-1)
        return backward(problem, ops, out, lse, dout, *rest)

    monkeypatch.setattr(reference, "backward", watch)
    out = flash_attn.flash_attn_func(q, q, q)
    (got,) = torch.autograd.grad(out, q, torch.ones(()).double().expand(out.shape), retain_graph=True)
    assert seen["stride"] == 1
    assert torch.equal(got, torch.autograd.grad(out, q, torch.ones_like(out))[0])


def test_without_gradients_autograd_is_not_entered(monkeypatch):
    def fail(*args):
        raise AssertionError("autograd was entered")

    monkeypatch.setattr(attention_module._Attention, "apply", fail)
    q = torch.randn(1, 5, 2, 8)
    flash_attn.flash_attn_func(q, q, q)
    with torch.no_grad():
        flash_attn.flash_attn_func(q.requires_grad_(), q, q)


def test_only_the_lse_may_be_used():
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    lse = flash_attn.flash_attn_func(q, q, q, return_attn_probs=True)[1]
    (got,) = torch.autograd.grad(lse.sum(), q)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, q) * 8**-0.5
    torch.testing.assert_close(got, torch.autograd.grad(scores.logsumexp(-1).sum(), q)[0])


def test_torch_func_grad_and_vjp():
    q, k, v = torch.randn(3, 1, 5, 2, 8, dtype=torch.float64).unbind(0)

    def loss(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    for g, w in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)
    qkv = torch.stack([q, k, v], 2)
    packed = torch.func.grad(lambda x: flash_attn.flash_attn_qkvpacked_func(x, causal=True).square().sum())(
        qkv
    )
    torch.testing.assert_close(packed, torch.stack(got, 2), rtol=0, atol=0)


def test_saved_tensors_can_be_packed_away():
    """Checkpointing and offloading replace saved tensors; nothing else may keep q, k and v alive."""
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    hidden = q * 2
    alive = weakref.ref(hidden)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy):
        out = flash_attn.flash_attn_func(hidden, hidden, hidden)
    del hidden
    gc.collect()
    assert alive() is None
    (got,) = torch.autograd.grad(out.sum(), q)
    (want,) = torch.autograd.grad(flash_attn.flash_attn_func(q * 2, q * 2, q * 2).sum(), q)
    torch.testing.assert_close(got, want)


def test_changing_an_input_before_backward_is_noticed():
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    hidden = q * 2
    out = flash_attn.flash_attn_func(hidden, hidden, hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("changed", ["cu_seqlens", "alibi_slopes"])
def test_changing_lengths_or_slopes_before_backward_is_noticed(changed):
    """A loader that refills its buffer of cu_seqlens between forward and backward got wrong gradients in silence."""
    q, k, v = (torch.randn(6, 2, 8, requires_grad=True) for _ in range(3))
    tensors = dict(
        cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32), alibi_slopes=torch.tensor([0.5, 0.25])
    )
    cu, slopes = tensors.values()
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, alibi_slopes=slopes)
    tensors[changed][1] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_are_refused():
    """A kernel drops a tangent in silence, and a derivative of 0 would come out."""
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 6, 2, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.randn_like(q))
        for args in ((dual, k, k), (q, k, forward_ad.make_dual(k, k))):
            with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
                flash_attn.flash_attn_func(*args)
        assert flash_attn.flash_attn_func(q, k, k).shape == q.shape


def test_double_backward_is_refused():
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(flash_attn.flash_attn_func(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (first.sum() + q.sum()).backward()


def test_dropout_backward_has_the_mask_of_its_forward():
    q, k, v = (torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.4, return_attn_probs=True)
    torch.manual_seed(99)  # what comes after the forward must not matter
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    p = s_dmask.abs() / s_dmask.abs().sum(-1, keepdim=True) * (s_dmask >= 0) / 0.6
    torch.testing.assert_close(dv, torch.einsum("bhmn,bmhd->bnhd", p, dout))


def test_a_backend_gets_tensors_to_write_into(monkeypatch):
    """What a backend leaves in `into` is the gradient; its return value is not copied again.

    It gets them where the gradients of plain contiguous tensors, which it makes itself, would not do.
    """
    made = []

    def backward(problem, ops, out, lse, dout, dlse, into):
        targets = [torch.empty_like(x) if y is None else y for x, y in zip(ops[:3], into, strict=True)]
        made.append(all(x is None for x in into))
        for value, x in enumerate(targets):
            x.fill_(value + 1.0)
        return Gradients(*targets)

    monkeypatch.setattr(reference, "backward", backward)
    inputs = [torch.randn(1, 5, 2, 8).requires_grad_() for _ in range(3)]
    grads = torch.autograd.grad(flash_attn.flash_attn_func(*inputs).sum(), inputs)
    assert [g.unique().tolist() for g in grads] == [[1.0], [2.0], [3.0]] and made.pop()
    (grad,) = torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(x := torch.stack(inputs, 2)).sum(), x)
    assert [g.unique().tolist() for g in grad.unbind(2)] == [[1.0], [2.0], [3.0]] and not made.pop()
    inputs[1] = torch.randn(1, 2, 5, 8).transpose(1, 2).requires_grad_()
    grads = torch.autograd.grad(flash_attn.flash_attn_func(*inputs).sum(), inputs)
    assert [g.unique().tolist() for g in grads] == [[1.0], [2.0], [3.0]] and not made.pop()
    assert grads[1].stride() == inputs[1].stride()


MAPPED = "cannot be mapped .*make the mapped dimension a part of the batch"


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_is_refused(grad):
    """On a CPU it ran through torch's decompositions; a kernel would have asked a pretended tensor for its address."""
    q, k, v = torch.randn(3, 2, 5, 4, 16).unbind(0)

    def one(q, k, v):
        return flash_attn.flash_attn_func(q[None], k[None], v[None]).sum()

    with pytest.raises(UnsupportedError, match=MAPPED):
        torch.vmap(torch.func.grad(one) if grad else one)(q, k, v)


def test_gradients_of_several_losses_at_once_are_refused():
    q = torch.randn(2, 5, 4, 16, requires_grad=True)
    out = flash_attn.flash_attn_func(q, q, q)
    with pytest.raises(UnsupportedError, match=MAPPED):
        torch.autograd.grad(out, q, torch.randn(3, *out.shape), is_grads_batched=True)


def test_torchs_deterministic_algorithms_make_the_backward_deterministic(monkeypatch):
    """The switch for a whole program was not asked, only the argument of the call."""
    seen = []

    def backward(problem, *args):
        seen.append(problem.deterministic)
        return real(problem, *args)

    real = reference.backward
    monkeypatch.setattr(reference, "backward", backward)
    q = torch.randn(2, 5, 4, 16, requires_grad=True)
    for switch in (False, True):
        torch.use_deterministic_algorithms(switch)
        try:
            flash_attn.flash_attn_func(q, q, q).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


def test_a_tensor_that_wraps_others_goes_through_the_dispatcher():
    """TwoTensor stands for DTensor and its like: their address is 0, and on a GPU a kernel was sent there."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    parts = [torch.randn(3, 2, 5, 4, 16) for _ in range(2)]
    leaves = [two_tensor(a, b).requires_grad_() for a, b in zip(*parts, strict=True)]
    out = flash_attn.flash_attn_func(*leaves, causal=True)
    assert type(out) is two_tensor and type(out.grad_fn).__name__ != "_AttentionBackward"
    out.sum().backward()
    for i, part in enumerate(parts):
        q, k, v = (x.clone().requires_grad_() for x in part)
        want = flash_attn.flash_attn_func(q, k, v, causal=True)
        want.sum().backward()
        torch.testing.assert_close((out.a, out.b)[i], want, rtol=0, atol=0)
        for got, x in zip(leaves, (q, k, v), strict=True):
            torch.testing.assert_close((got.grad.a, got.grad.b)[i], x.grad, rtol=0, atol=0)


def test_a_nested_tensor_is_refused_as_not_dense():
    rows = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (3, 5)], layout=torch.jagged)
    with pytest.raises(ArgumentTypeError, match="q must be a dense tensor, got .* nested True"):
        flash_attn.flash_attn_func(rows, rows, rows)
