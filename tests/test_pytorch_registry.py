"""PyTorch's registry of flash attention: "FAPLUS" is offered, changes nothing until asked, and computes what it should.

The operators are replaced for GPU tensors; here they are replaced for CPU tensors instead, through torch's dispatcher
and with its derivatives. tests/gpu has the activation itself.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention

import flash_attn
from flash_attn import UnsupportedError, use_backend
from flash_attn.errors import ArgumentValueError
from flash_attn.integrations import pytorch

pytestmark = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="this torch has no registry"
)
aten = torch.ops.aten


@pytest.fixture
def replaced():
    handle = pytorch.Handle("CPU")
    with use_backend("reference"):
        yield
    handle.remove()


def heads_first(M=9, N=9, H=4, Hk=4, D=16, dtype=torch.float32):
    return [torch.randn(2, h, n, D, dtype=dtype, requires_grad=True) for n, h in ((M, H), (N, Hk), (N, Hk))]


def test_importing_offers_it_and_activates_nothing():
    code = (
        "import flash_attn, torch; from torch.nn import attention as a;"
        "print('FAPLUS' in a.list_flash_attention_impls(), a.current_flash_attention_impl())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "None"]


def test_activate_and_restore():
    key = "CUDA"
    name = "aten::_scaled_dot_product_flash_attention"
    before = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    attention.activate_flash_attention_impl(pytorch.NAME)
    try:
        assert attention.current_flash_attention_impl() == pytorch.NAME
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key) is before


def test_every_operator_that_torchs_own_implementations_replace_is_replaced():
    import inspect

    from torch.nn.attention import _fa3

    names = {
        line.split('"')[1]
        for line in inspect.getsource(_fa3._fa3_register_kernels).splitlines()
        if line.strip().startswith('"_') or 'impl("_' in line
    }
    here = {n for n in pytorch.OPERATORS if hasattr(torch.ops.aten, n)}  # torch 2.11 lacks one
    assert {n for n in names if ".quantized" not in n} == here


@pytest.mark.parametrize("Hk", [4, 2])
@pytest.mark.parametrize("layout", ["heads first", "rows first"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("replaced")
def test_scaled_dot_product_forward_and_backward(Hk, layout, causal):
    inputs = heads_first(Hk=Hk)
    if layout == "rows first":  # as a model has them: (B, S, H, D) seen as (B, H, S, D)
        inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    out, lse, _, _, M, N, state, unused, mask = aten._scaled_dot_product_flash_attention(*inputs, 0.0, causal)
    want = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=Hk < 4)
    torch.testing.assert_close(out, want)
    assert out.stride() == torch.empty_like(inputs[0]).stride(), "torch.compile relies on it"
    assert (M, N) == (9, 9) and lse.shape == (2, 4, 9) and state.dtype == torch.uint64 and not mask.numel()
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dout)
    for g, w, x in zip(got, torch.autograd.grad(want, inputs, dout), inputs, strict=True):
        torch.testing.assert_close(g, w)
        assert g.stride() == x.stride()


@pytest.mark.usefixtures("replaced")
def test_dropout_has_one_mask_forward_and_backward():
    inputs = heads_first()
    torch.manual_seed(4)
    out = aten._scaled_dot_product_flash_attention(*inputs, 0.4)[0]
    torch.manual_seed(4)
    want = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in inputs), 0.4).transpose(1, 2)
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    for g, w in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.usefixtures("replaced")
def test_variable_lengths_forward_and_backward():
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    x = [torch.randn(9, 4, 16, requires_grad=True) for _ in range(3)]
    for window in ((-1, -1), (-1, 0), (2, 0)):
        got = varlen_attn(*x, cu, cu, 5, 5, window_size=window)
        want = flash_attn.flash_attn_varlen_func(*x, cu, cu, 5, 5, window_size=window)
        dout = torch.randn_like(got)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        for g, w in zip(torch.autograd.grad(got, x, dout), torch.autograd.grad(want, x, dout), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.usefixtures("replaced")
def test_pages_used_lengths_and_writing_into_a_tensor():
    pages = [torch.randn(7, 4, 2, 16) for _ in range(2)]
    table = torch.tensor([[3, 1, 6], [0, 2, 5]], dtype=torch.int32)
    used, cu = torch.tensor([9, 12], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    q = torch.randn(2, 4, 16)
    want = flash_attn.flash_attn_with_kvcache(q[:, None], *pages, cache_seqlens=used, block_table=table)[:, 0]
    arguments = (q, *pages, cu, None, 1, 12, 0.0, False, False)
    options = dict(seqused_k=used, block_table=table)
    if "block_table" in str(aten._flash_attention_forward.default._schema):
        torch.testing.assert_close(aten._flash_attention_forward(*arguments, **options)[0], want)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        out = torch.full_like(q, torch.nan)
        lse = aten._flash_attention_forward_no_dropout_inplace(out, *arguments, **options)
        torch.testing.assert_close(out, want)
        assert lse.shape == (4, 2)


@pytest.mark.usefixtures("replaced")
def test_compiled_graph_sees_torchs_operator():
    inputs = heads_first()

    def call(q, k, v):
        return aten._scaled_dot_product_flash_attention(q * 1.5, k, v, 0.0, True)[0] + 1

    run = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    dout = torch.randn_like(inputs[0])
    got, want = run(*inputs), call(*inputs)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_refusals():
    q, k, v = (x.detach().transpose(1, 2) for x in heads_first())
    with pytest.raises(UnsupportedError, match="return_debug_mask"):
        pytorch.forward(q, k, v, None, None, 9, 9, 0.0, False, True)
    with pytest.raises(ArgumentValueError, match="dropout_p must be 0 for this operator, got 0.5"):
        pytorch.forward_into(q, q, k, v, None, None, 9, 9, 0.5, False, False)
