"""The public functions on a GPU: right results from whatever backend is chosen, no waiting, graphs, compilation."""

import cases
import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.errors import ArgumentValueError
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch, assert_gradients_as_close_as_torch, nan_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo, itself
    # Inductor's advice about precision, and what torch says of itself while Inductor is imported
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

PUBLIC = [c for c in cases.CASES if cases.build(c).function]
NAMES = {"flash_attn_with_kvcache": ("q", "k_cache", "v_cache")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", PUBLIC, ids=cases.ids)
def test_named_cases(case, dtype):
    built = cases.build(case, device="cuda", dtype=dtype)
    ops, kwargs = built.operands, dict(built.kwargs)
    torch.manual_seed(11)
    if case.dropout_p:
        ops = ops._replace(rng_state=torch.randint(0, 2**62, (2,), device="cuda"))
        torch.manual_seed(11)
    names = NAMES.get(built.function, ("q", "k", "v"))
    leaves = [kwargs[n].detach().requires_grad_(not case.forward_only) for n in names]
    kwargs |= dict(zip(names, leaves, strict=True))
    with nan_empty():
        out = getattr(flash_attn, built.function)(**kwargs)
    assert_as_close_as_torch(out, oracle.forward(built.problem, ops)[0], eager.forward(built.problem, ops)[0])
    # With one key P is 1 and dP - delta cancels: exactly in autograd of a softmax, to fp32 rounding from out and lse.
    if out.requires_grad and (case.max_k > 1 or dtype == torch.float32):
        dout = torch.randn_like(out)
        with nan_empty():
            grads = torch.autograd.grad(out, leaves, dout)
        assert_gradients_as_close_as_torch(oracle.Gradients(*grads), built.problem, ops, dout)


def qkv(M=256, N=256, H=4, Hk=2, D=64, B=2):
    return [
        torch.randn(B, n, h, D, device="cuda", dtype=torch.bfloat16) for n, h in ((M, H), (N, Hk), (N, Hk))
    ]


def test_a_call_does_not_wait_for_the_device():
    q, k, v = (x.requires_grad_() for x in qkv())
    cu = torch.tensor([0, 256, 512], dtype=torch.int32, device="cuda")
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    lengths = torch.tensor([9, 200], dtype=torch.int32, device="cuda")

    def step():
        flash_attn_func(q, k, v, 0.1, causal=True).sum().backward()
        flash_attn_varlen_func(*packed, cu, cu, 256, 256, causal=True).sum().backward()
        one, new = q[:, :1].detach(), k[:, :1].detach()
        flash_attn_with_kvcache(one, k.detach(), v.detach(), new, new, cache_seqlens=lengths, causal=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_checked_on_request(environment):
    q, k, v = qkv()
    cu = torch.tensor([0, 300, 512], dtype=torch.int32, device="cuda")
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    environment("FLASH_ATTN_CHECK", "1")
    with pytest.raises(
        ArgumentValueError, match="max_seqlen_q must be at least the longest sequence .* 300, got 256"
    ):
        flash_attn_varlen_func(*flat, cu, cu, 256, 256)


def test_graph_of_forward_and_backward_draws_new_dropout_at_each_replay():
    static = [x.requires_grad_() for x in qkv()]

    def step():
        out = flash_attn_func(*static, 0.3, causal=True)
        return out, torch.autograd.grad(out, static, torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in static:
                x.copy_(torch.randn_like(x))
        torch.manual_seed(seed)
        graph.replay()
        results.append([x.clone() for x in (out, *grads)])
    for x in results[0]:
        assert x.isfinite().all()
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_graph_of_decode_follows_lengths_that_change_between_replays():
    B, N = 2, 512
    q = torch.randn(B, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(2, B, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
    caches = torch.randn(2, B, N, 2, 64, device="cuda", dtype=torch.bfloat16)
    eager_caches = caches.clone()
    lengths = torch.tensor([7, 100], dtype=torch.int32, device="cuda")

    def step(caches):
        return flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=lengths, causal=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(caches)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(caches)
    caches.copy_(eager_caches)
    for values in ([7, 100], [300, 0], [511, 42]):
        lengths.copy_(torch.tensor(values))
        new.copy_(torch.randn_like(new))
        graph.replay()
        want = step(eager_caches)
        assert torch.equal(caches, eager_caches)
        torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_compiled_by_inductor():
    def call(q, k, v):
        return flash_attn_func(q * 1.5, k, v, causal=True, softcap=20.0) + 1

    run = torch.compile(call, fullgraph=True, dynamic=True)
    for length in (128, 200, 333):
        inputs = [x.requires_grad_() for x in qkv(length, length)]
        out, want = run(*inputs), call(*inputs)
        torch.testing.assert_close(out, want)
        dout = torch.randn_like(out)
        got = torch.autograd.grad(out, inputs, dout)
        for g, w in zip(got, torch.autograd.grad(want, inputs, dout), strict=True):
            torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)
