"""The public functions on a GPU: right results from whatever backend is chosen, no waiting, graphs, compilation."""

import cases
import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.errors import ArgumentValueError
from flash_attn.layers.rotary import apply_rotary_emb
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


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(window_size=(30, 2)), dict(softcap=9.0)], ids=str
)
def test_a_nan_stays_one(options, where, backend):
    """A maximum that skips NaN must not make a row of it look like one without keys."""
    case = cases.Case(
        "nan", max_q=200, max_k=300, head_dim=64, dtype=torch.bfloat16, causal=options.get("causal", False),
        window=options.get("window_size", (-1, -1)), softcap=options.get("softcap", 0.0),
    )  # fmt: skip
    built = cases.build(case, device="cuda")
    if flash_attn.dispatch.load(backend).supports(built.problem, "forward"):
        pytest.skip(f"{backend} does not run here")
    ops = built.operands
    getattr(ops, where)[0, 150, 0] = torch.nan
    with flash_attn.use_backend(backend):
        out, lse, _ = flash_attn_func(*ops[:3], return_attn_probs=True, **options)
    want, want_lse = oracle.forward(built.problem, ops)
    assert want.isnan().any() and torch.equal(out.isnan(), want.isnan())
    assert torch.equal(lse.isnan(), want_lse.isnan())


def test_a_tensor_that_wraps_others_is_not_taken_for_memory():
    """Its address is 0: a kernel that is sent there ends the process' use of the GPU. DTensor is such a class."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    parts = [[x.detach() for x in qkv()] for _ in range(2)]
    for _ in range(4):  # the first calls are launched, later ones repeated
        want = [flash_attn_func(*part, causal=True) for part in parts]
        out = flash_attn_func(*(two_tensor(a, b) for a, b in zip(*parts, strict=True)), causal=True)
        assert torch.equal(out.a, want[0]) and torch.equal(out.b, want[1])


def test_negations_that_were_put_off_are_done():
    """The imaginary part of a conjugate is its memory with a sign that only torch knows of; a kernel took it plain."""
    q, k, v = (x.detach().requires_grad_() for x in qkv())
    dout = torch.randn(q.shape, device="cuda", dtype=q.dtype)
    want = flash_attn_func(-q, k, v, causal=True)
    wanted = torch.autograd.grad(want, (q, k, v), -dout)
    got = flash_attn_func(torch._neg_view(q), k, v, causal=True)
    assert torch.equal(got, want)
    for g, w in zip(torch.autograd.grad(got, (q, k, v), torch._neg_view(dout)), wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_more_sequences_than_a_dimension_of_a_grid_holds():
    """Windows of a vision transformer make such batches; rotary and the Hopper backward stopped at 65535."""
    q, k, v = (x.requires_grad_() for x in qkv(16, 16, 1, 1, 64, 70_000))
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    last = [x.detach()[-7:].clone().requires_grad_() for x in (q, k, v)]
    want = flash_attn_func(*last, causal=True)
    assert torch.equal(out[-7:], want)
    for g, w in zip(grads, torch.autograd.grad(want, last, dout[-7:]), strict=True):
        torch.testing.assert_close(g[-7:], w, rtol=2e-2, atol=1e-2)  # two backends: rounded to bf16 apart
    angles = torch.outer(torch.arange(16.0, device="cuda"), 0.1 ** torch.arange(32.0, device="cuda"))
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    turned = apply_rotary_emb(q.detach(), *tables)
    assert torch.equal(turned[-7:], apply_rotary_emb(q.detach()[-7:], *tables))
