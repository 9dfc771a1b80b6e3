"""Gradients of the public functions on the CPU: finite differences in fp64, and the yardstick in 16 and 32 bits.

The Triton kernels are tested in test_triton_backward.py.
"""

import cases
import pytest
import torch

import flash_attn
from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from flash_attn.problem import Gradients
from flash_attn.utils.testing import assert_gradients_as_close_as_torch, nan_empty

FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
PUBLIC = [
    c for c in cases.BACKWARD_CASES if cases.build(c).function in FUNCTIONS and c.max_q * c.max_k < 5000
]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


DENSE = {
    "plain": {},
    "scale": dict(softmax_scale=0.7),
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "left": dict(window_size=(2, -1)),
    "right": dict(window_size=(-1, 0)),
    "softcap": dict(softcap=0.8),
    "alibi": dict(alibi_slopes=torch.tensor([0.3, 0.1]), causal=True),
    "alibi_batch": dict(alibi_slopes=torch.tensor([[0.3, 0.1], [0.2, 0.5]]), softcap=1.1),
    "dropout": dict(dropout_p=0.3),
    "everything": dict(
        dropout_p=0.2,
        softcap=1.3,
        causal=True,
        window_size=(3, 0),
        alibi_slopes=torch.tensor([0.3, 0.1]),
        deterministic=True,
    ),
}


@pytest.mark.parametrize("M, N", [(3, 5), (5, 3)])
@pytest.mark.parametrize("name", DENSE)
def test_finite_differences_dense(name, M, N):
    def run(q, k, v):
        torch.manual_seed(3)  # the same dropout mask every time
        return flash_attn_func(q, k, v, **DENSE[name])

    assert torch.autograd.gradcheck(
        run, (random(2, M, 2, 3), random(2, N, 1, 3), random(2, N, 1, 3)), fast_mode=False
    )


@pytest.mark.parametrize("M, N", [(4, 6), (6, 4)])
def test_finite_differences_through_lse(M, N):
    """lse is an output like any other; with it the gradient takes the path that has a dlse."""

    def run(q, k, v):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, softcap=0.9, return_attn_probs=True)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, (random(1, M, 2, 3), random(1, N, 2, 3), random(1, N, 2, 3)))


def test_finite_differences_of_a_wider_v():
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        (random(1, 4, 2, 3), random(1, 5, 2, 3), random(1, 5, 2, 5)),
    )


def test_finite_differences_packed_forms():
    assert torch.autograd.gradcheck(
        lambda x: flash_attn_qkvpacked_func(x, causal=True), random(1, 4, 3, 2, 3)
    )
    assert torch.autograd.gradcheck(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, window_size=(1, 1)),
        (random(1, 4, 2, 3), random(1, 5, 2, 1, 3)),
    )


def test_finite_differences_varlen():
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 5], [0, 2, 4, 4]))

    def run(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 2, causal=True, softcap=1.2)

    assert torch.autograd.gradcheck(run, (random(5, 2, 3), random(4, 1, 3), random(4, 1, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", PUBLIC, ids=cases.ids)
def test_public_gradients_as_close_as_torch(case, dtype):
    built = cases.build(case, dtype=dtype)
    kwargs = dict(built.kwargs)
    inputs = [kwargs[n].clone().requires_grad_() for n in ("q", "k", "v")]
    kwargs |= zip(("q", "k", "v"), inputs, strict=True)
    torch.manual_seed(7)
    with nan_empty():
        out = getattr(flash_attn, built.function)(**kwargs)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, dout)
    ops = built.operands
    if case.dropout_p:
        torch.manual_seed(7)
        ops = ops._replace(rng_state=torch.randint(0, 2**62, (2,)))
    assert_gradients_as_close_as_torch(Gradients(*grads), built.problem, ops, dout)


def test_second_run_is_equal_to_the_bit():
    q, k, v = (torch.randn(2, 70, 4, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def gradients():
        torch.manual_seed(1)
        out = flash_attn_func(q, k, v, dropout_p=0.1, causal=True)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_strided_inputs_and_gradients():
    """Transposed and sliced inputs, and a dout whose last dimension is strided."""
    base = torch.randn(2, 4, 30, 3, 8, dtype=torch.float64)
    views = [base[..., i, :].transpose(1, 2) for i in range(3)]
    strided = [x.detach().requires_grad_() for x in views]
    plain = [x.detach().contiguous().requires_grad_() for x in views]
    dout = torch.randn(2, 30, 8, 4, dtype=torch.float64).transpose(2, 3)
    got, want = (
        torch.autograd.grad(flash_attn_func(*x, window_size=(5, 5)), x, dout) for x in (strided, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
