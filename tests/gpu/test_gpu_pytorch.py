"""PyTorch's own attention on our kernels, FlashAttention-3's interface, graphs and compilation, on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_interface as fa3
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.problem import Gradients
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch, assert_gradients_as_close_as_torch, nan_empty
from flash_attn.validate import describe, describe_varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo, itself
    # Inductor's advice about precision, and what torch says of itself while Inductor is imported
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def rows_first(M=300, N=300, H=8, Hk=2, D=64, B=2):
    sizes = ((M, H), (N, Hk), (N, Hk))
    return [torch.randn(B, n, h, D, device="cuda", dtype=torch.bfloat16) for n, h in sizes]


def packed(lengths=(100, 257, 1, 90), H=8, Hk=2, D=64):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    x = [torch.randn(sum(lengths), h, D, device="cuda", dtype=torch.bfloat16) for h in (H, Hk, Hk)]
    return x, (cu, cu, max(lengths), max(lengths))


def check(described, out, leaves):
    """out of `leaves`, and its gradients, against the fp64 oracle."""
    problem, ops = described[:2]
    assert_as_close_as_torch(out, oracle.forward(problem, ops)[0], eager.forward(problem, ops)[0])
    dout = torch.randn_like(out)
    with nan_empty():
        grads = torch.autograd.grad(out, leaves, dout)
    assert_gradients_as_close_as_torch(Gradients(*grads), problem, ops, dout)


@pytest.fixture(params=["FAPLUS", "FA3"])
def activated(request):
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    if request.param == "FA3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch's FA3 asks for compute capability 9.0")
    attention.activate_flash_attention_impl(request.param)
    yield request.param
    attention.restore_flash_attention_impl()


@pytest.fixture
def kernel_calls(monkeypatch):
    """What reached our backends: a pass of torch's own kernels would prove nothing."""
    from flash_attn import _legacy
    from flash_attn.fa3 import operators
    from flash_attn.integrations import pytorch

    seen = []
    for module in (pytorch, operators):
        run = module.run_forward
        monkeypatch.setattr(module, "run_forward", lambda *a, run=run: seen.append("forward") or run(*a))
    run_backward = _legacy.run_backward
    monkeypatch.setattr(_legacy, "run_backward", lambda *a: seen.append("backward") or run_backward(*a))
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["rows first", "heads first"])
def test_scaled_dot_product_attention(activated, kernel_calls, layout, causal):
    x = rows_first()
    if layout == "heads first":
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    leaves = [t.requires_grad_() for t in x]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads = [t.transpose(1, 2) for t in leaves]
        out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)
    check(describe(*(t.detach() for t in x), causal=causal), out, leaves)
    assert kernel_calls == ["forward", "backward"]


def test_variable_lengths(activated, kernel_calls):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    x, lengths = packed(Hk=8)
    leaves = [t.requires_grad_() for t in x]
    out = varlen.varlen_attn(*leaves, *lengths, window_size=(-1, 0))
    check(describe_varlen(*(t.detach() for t in x), *lengths, causal=True), out, leaves)
    assert kernel_calls == ["forward", "backward"]


def test_restore_brings_torchs_kernels_back(kernel_calls):
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    q, k, v = (t.transpose(1, 2) for t in rows_first(Hk=8))
    for step in ("before", "active", "after"):
        if step == "active":
            attention.activate_flash_attention_impl("FAPLUS")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)
        assert bool(kernel_calls) is (step == "active")
        if step == "active":
            attention.restore_flash_attention_impl()
            kernel_calls.clear()


def test_compiled_scaled_dot_product_attention(activated, kernel_calls):
    def call(q, k, v):
        return F.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True) + 1

    run = torch.compile(call, fullgraph=True, dynamic=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for length in (128, 200):
            heads = [t.transpose(1, 2).requires_grad_() for t in rows_first(length, length, Hk=8)]
            out, want = run(*heads), call(*heads)
            torch.testing.assert_close(out, want)
            dout = torch.randn_like(out)
            got = torch.autograd.grad(out, heads, dout)
            for g, w in zip(got, torch.autograd.grad(want, heads, dout), strict=True):
                torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)
    assert kernel_calls.count("forward") == kernel_calls.count("backward") == 4


@pytest.mark.parametrize("options", [dict(causal=True), dict(window_size=(100, 7), softcap=15.0)])
def test_flash_attention_3_functions(options):
    leaves = [t.requires_grad_() for t in rows_first(M=280)]
    detached = [t.detach() for t in leaves]
    with nan_empty():
        out = fa3.flash_attn_func(*leaves, **options)
    check(describe(*detached, **options), out, leaves)
    x, lengths = packed()
    leaves = [t.requires_grad_() for t in x]
    used = torch.tensor([100, 200, 0, 1], dtype=torch.int32, device="cuda")
    detached = [t.detach() for t in leaves]
    with nan_empty():
        out = fa3.flash_attn_varlen_func(*leaves, *lengths, seqused_k=used, **options)
    check(describe_varlen(*detached, *lengths, seqused_k=used, **options), out, leaves)


def test_flash_attention_3_kvcache():
    B, N = 3, 600
    q, new = (
        torch.randn(B, 1, 8, 64, device="cuda").bfloat16(),
        torch.randn(B, 1, 2, 64, device="cuda").bfloat16(),
    )
    caches = [torch.randn(B, N, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    others = [t.clone() for t in caches]
    lengths = torch.tensor([0, 100, 599], dtype=torch.int32, device="cuda")
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        q, *caches, new, new, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    want, want_lse = flash_attn_with_kvcache(
        q, *others, new, new, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    for g, w in zip((out, lse, *caches), (want, want_lse, *others), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_graph_of_packed_training_follows_lengths_that_change_between_replays():
    x, (cu, _, _, _) = packed((200, 56, 256))
    leaves = [t.requires_grad_() for t in x]
    dout = torch.randn_like(x[0])

    def step(leaves):
        out = flash_attn_varlen_func(*leaves, cu, cu, 400, 400, causal=True)
        return out, *torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(leaves)
    for lengths in ((200, 56, 256), (1, 400, 111), (0, 112, 400), (100, 100, 100)):
        cu.copy_(torch.tensor([0, *torch.tensor(lengths).cumsum(0)]))
        for t in x:
            t.data.copy_(torch.randn_like(t))
        graph.replay()
        for g, w in zip(results[:1] + results[2:], (lambda r: r[:1] + r[2:])(step(leaves)), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
        torch.testing.assert_close(results[1], step(leaves)[1], rtol=2e-2, atol=2e-2)  # sums in any order


def test_inductor_compiles_packed_and_cached_calls():
    def training(q, k, v, cu, longest):
        return flash_attn_varlen_func(q * 1.5, k, v, cu, cu, longest, longest, causal=True) + 1

    run = torch.compile(training, fullgraph=True, dynamic=True)
    for lengths in ((100, 257, 1), (30, 30, 300)):
        x, (cu, _, longest, _) = packed(lengths)
        leaves = [t.requires_grad_() for t in x]
        out, want = run(*leaves, cu, longest), training(*leaves, cu, longest)
        torch.testing.assert_close(out, want)
        dout = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, dout)
        for g, w in zip(got, torch.autograd.grad(want, leaves, dout), strict=True):
            torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)

    def decode(q, k_cache, v_cache, k, v, used):
        return flash_attn_with_kvcache(q * 1.5, k_cache, v_cache, k, v, cache_seqlens=used, causal=True) + 1

    run = torch.compile(decode, fullgraph=True, dynamic=True)
    for N in (256, 400):
        q, new = (
            torch.randn(2, 1, 8, 64, device="cuda").bfloat16(),
            torch.randn(2, 2, 1, 2, 64, device="cuda").bfloat16(),
        )
        caches = torch.randn(2, 2, N, 2, 64, device="cuda").bfloat16()
        other, used = caches.clone(), torch.tensor([7, N - 1], dtype=torch.int32, device="cuda")
        torch.testing.assert_close(run(q, *caches, *new, used), decode(q, *other, *new, used))
        assert torch.equal(caches, other)


def graphs_of(run, lengths):
    """Graphs that torch.compile makes while `run` is called with each of `lengths`."""
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for length in lengths:
        run(length)
    return stats["unique_graphs"] - before


@pytest.mark.parametrize("kind", ["dense", "packed", "cache"])
def test_inductor_makes_one_graph_for_all_lengths(kind):
    def call(q, k, v, where, longest):
        if kind == "dense":
            return flash_attn_func(q, k, v, causal=True)
        if kind == "packed":
            return flash_attn_varlen_func(q, k, v, where, where, longest, longest, causal=True)
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=where, causal=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)

    def run(length):
        longest = length - length // 3
        where = torch.tensor([0, length // 3, length], dtype=torch.int32, device="cuda")
        if kind == "cache":
            where = where[1:]
        lead = (length,) if kind == "packed" else (2, length)
        q, k, v = (torch.randn(*lead, h, 64, device="cuda").bfloat16().requires_grad_() for h in (16, 4, 4))
        q = q[:, :1].detach() if kind == "cache" else q
        out = compiled(q, k, v, where, longest)
        if kind != "cache":
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    assert graphs_of(run, (512, 2048, 777, 1024, 33, 4096)) == 1


def test_a_compiled_block_is_one_graph_for_all_lengths():
    """Inductor chooses by sizes whether to fuse the reductions of a norm's backward, and guards on its choice; without
    this optimisation of its own nothing is left that asks for a length."""
    from bench import block

    dim = 2048  # from 4096 rows and 5 * 2^20 numbers on, it fuses
    module = block.Block(block.ours, dim, 16, 4).cuda().bfloat16()
    known = hasattr(torch._inductor.config.triton, "mix_order_reduction")
    options = {"triton.mix_order_reduction": False} if known else {}
    compiled = torch.compile(module, fullgraph=True, dynamic=True, options=options)

    def run(length):
        x, dout = (torch.randn(4, length, dim, device="cuda").bfloat16() for _ in range(2))
        block.gradients(compiled, x, block.angles(length, dim // 16, x), dout)

    assert graphs_of(run, (512, 2048, 777, 1024)) == 1


def test_gradients_of_a_compiled_block_are_as_exact_as_eager_ones():
    """Inductor fuses and so rounds less; a gradient of large values may still differ from eager's by whole numbers."""
    from bench import block

    errors = block.gradient_errors()
    for name in ("eager", "aot_eager", "inductor"):
        for got, torchs in zip(errors[name], errors["formula"], strict=True):
            assert got <= 1.25 * torchs, (name, errors)
