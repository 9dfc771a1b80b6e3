"""torch.compile, export, checkpointing and fake tensors: one graph, no break, no recompile, the same numbers."""

import cases
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_attn
from flash_attn import _traced, use_backend
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

# Dynamo itself instantiates torch.autograd.Function when it traces one (torch 2.13).
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with use_backend("reference"):
        yield


class Compiled:
    """`function` as one graph; `check` says whether a later call compiled anew.

    The first call may count twice: dynamic=True makes symbols of Python floats, and Dynamo starts over
    when it finds that an operator needs their value.
    """

    def __init__(self, function, backend="aot_eager"):
        self.counter = CompileCounterWithBackend(backend)
        self.run = torch.compile(function, backend=self.counter, fullgraph=True, dynamic=True)
        self.calls, self.after_first = 0, 0

    def __call__(self, *args):
        result = self.run(*args)
        self.calls += 1
        if self.calls == 1:
            self.after_first = self.counter.frame_count
        return result

    def check(self):
        assert self.calls > 1 and self.after_first > 0
        assert self.counter.frame_count == self.after_first, "recompiled between lengths"


def qkv(B=2, M=9, N=11, H=4, Hk=2, D=16):
    return [torch.randn(B, n, h, D, requires_grad=True) for n, h in ((M, H), (N, Hk), (N, Hk))]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(causal=True),
        dict(window_size=(4, 2), softcap=2.0),
        dict(softmax_scale=0.3, deterministic=True),
    ],
    ids=["plain", "causal", "window_softcap", "scale"],
)
def test_dense_forward_and_backward(backend, options):
    run = Compiled(lambda q, k, v: flash_attn_func(q, k, v, **options), backend)
    for M, N in ((9, 11), (13, 17), (21, 30)):
        inputs = qkv(M=M, N=N)
        out, want = run(*inputs), flash_attn_func(*inputs, **options)
        torch.testing.assert_close(out, want, rtol=0, atol=0)
        dout = torch.randn_like(out)
        for g, w in zip(
            torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
    run.check()


def test_lse_is_differentiable():
    def loss(function, inputs):
        out, lse, _ = function(*inputs)
        return out.sum() + (lse.masked_fill(lse == torch.inf, 0.0)).square().sum()

    run = Compiled(lambda q, k, v: flash_attn_func(q, k, v, causal=True, return_attn_probs=True))
    inputs = qkv(M=9, N=5)  # rows without keys
    got = torch.autograd.grad(loss(run, inputs), inputs)
    eager = torch.autograd.grad(
        loss(lambda q, k, v: flash_attn_func(q, k, v, causal=True, return_attn_probs=True), inputs), inputs
    )
    for g, w in zip(got, eager, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", ["qkv", "kv"])
def test_packed_tensors(function):
    def call(qkv):
        if function == "qkv":
            return flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
        return flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True)

    run = Compiled(call)
    for M in (7, 12):
        x = torch.randn(2, M, 3, 4, 16, requires_grad=True)
        torch.testing.assert_close(run(x), call(x), rtol=0, atol=0)
        got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (run, call))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    run.check()


def test_varlen_forward_and_backward():
    def call(q, k, v, cu, longest):
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

    run = Compiled(call)
    for lengths in ((5, 9, 3), (8, 2, 12), (1, 1, 20)):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        total = sum(lengths)
        inputs = [torch.randn(total, h, 16, requires_grad=True) for h in (4, 2, 2)]
        out, want = run(*inputs, cu, max(lengths)), call(*inputs, cu, max(lengths))
        torch.testing.assert_close(out, want, rtol=0, atol=0)
        got = torch.autograd.grad(out.square().sum(), inputs)
        for g, w in zip(got, torch.autograd.grad(want.square().sum(), inputs), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
    run.check()


def test_kvcache_reads():
    def call(q, k_cache, v_cache, lengths):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lengths, causal=True, return_softmax_lse=True
        )

    run = Compiled(call)
    for N in (24, 40):
        ops = cases.build(cases.Case("cache", max_q=1, max_k=N, seqused_k=(5, 23))).operands
        for g, w in zip(run(*ops[:3], ops.seqused_k), call(*ops[:3], ops.seqused_k), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
    run.check()


@pytest.mark.parametrize("lengths", ["tensor", "int"])
def test_kvcache_appends(lengths):
    """The compiled graph writes into the caller's cache."""

    def call(q, k_cache, v_cache, k, v, cos, sin, where):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=where, causal=True)

    run = Compiled(call)
    where = torch.tensor([3, 7], dtype=torch.int32) if lengths == "tensor" else 5
    q, k, v = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16)
    cos, sin = torch.randn(12, 8), torch.randn(12, 8)
    caches = [torch.randn(2, 12, 2, 16) for _ in range(2)]
    mine, theirs = ([x.clone() for x in caches] for _ in range(2))
    out, want = run(q, *mine, k, v, cos, sin, where), call(q, *theirs, k, v, cos, sin, where)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    for a, b, before in zip(mine, theirs, caches, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, before)


@pytest.mark.parametrize("paged", [False, True])
def test_kvcache_appends_without_recompiling(paged):
    """Other lengths, other capacities, other numbers of new rows (equal sizes would become one symbol)."""

    def call(q, k_cache, v_cache, k, v, where, table):
        return flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=where,
            block_table=table,
            causal=True,
            return_softmax_lse=True,
        )

    run = Compiled(call)
    for new, blocks, lengths in ((3, 5, (3, 7)), (5, 7, (16, 0)), (7, 6, (9, 10))):
        q, k, v = (torch.randn(2, new, h, 16) for h in (4, 2, 2))
        table = torch.randperm(2 * blocks, dtype=torch.int32).view(2, blocks) if paged else None
        mine = [
            torch.randn(2 * blocks, 4, 2, 16) if paged else torch.randn(2, 4 * blocks, 2, 16) for _ in "kv"
        ]
        theirs, where = [x.clone() for x in mine], torch.tensor(lengths, dtype=torch.int32)
        got, want = run(q, *mine, k, v, where, table), call(q, *theirs, k, v, where, table)
        for g, w in zip((*got, *mine), (*want, *theirs), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
    run.check()


def test_dropout_is_random_and_follows_the_seed():
    run = Compiled(lambda q, k, v: (flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)))
    inputs = qkv()
    torch.manual_seed(5)
    first, second = run(*inputs)
    assert not torch.equal(first, second), "two draws must not be merged into one"
    torch.manual_seed(5)
    again = run(*inputs)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    torch.manual_seed(5)
    assert torch.equal(first, flash_attn_func(*inputs, 0.5))


def test_packed_dropout_and_one_tensor_for_everything():
    """cu_seqlens and even q, k and v are often one tensor; autograd functions may not be given one twice."""

    def call(x, cu):
        return flash_attn_varlen_func(x, x, x, cu, cu, 9, 9, 0.3, deterministic=True)

    run = Compiled(call)
    x = torch.randn(14, 2, 16, requires_grad=True)
    cu = torch.tensor([0, 5, 14], dtype=torch.int32)
    results = []
    for function in (run, call):
        torch.manual_seed(2)
        out = function(x, cu)
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for g, w in zip(*results, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.back = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return x + self.back(flash_attn_func(q, k, v, causal=True).flatten(-2))


def test_export():
    block, x = Block().eval(), torch.randn(2, 9, 32)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({1: length},))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("flash_attn._flash_attn_forward" in name for name in names)
    for M in (9, 15):
        x = torch.randn(2, M, 32)
        torch.testing.assert_close(program.module()(x), block(x))


def test_export_of_packed_and_cached_calls():
    class Packed(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return flash_attn_varlen_func(q, k, v, cu, cu, 64, 64, causal=True)

    class Cached(torch.nn.Module):
        def forward(self, q, k_cache, v_cache, used):
            return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=used, causal=True)

    rows, capacity = torch.export.Dim("rows", min=4, max=256), torch.export.Dim("capacity", min=4, max=256)
    cu = torch.tensor([0, 5, 14], dtype=torch.int32)
    x = [torch.randn(14, h, 16) for h in (4, 2, 2)]
    program = torch.export.export(Packed(), (*x, cu), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}, None))
    for lengths in ((5, 9), (20, 1)):
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        x = [torch.randn(sum(lengths), h, 16) for h in (4, 2, 2)]
        torch.testing.assert_close(program.module()(*x, cu), Packed()(*x, cu), rtol=0, atol=0)
    q, used = torch.randn(2, 1, 4, 16), torch.tensor([3, 12], dtype=torch.int32)
    caches = torch.randn(2, 2, 24, 2, 16)
    program = torch.export.export(
        Cached(), (q, *caches, used), dynamic_shapes=(None, {1: capacity}, {1: capacity}, None)
    )
    for N in (24, 40):
        caches = torch.randn(2, 2, N, 2, 16)
        got = program.module()(q, *caches, used)
        torch.testing.assert_close(got, Cached()(q, *caches, used), rtol=0, atol=0)


def test_selective_checkpointing_sees_the_operator():
    """A policy that names torch.ops.flash_attn._flash_attn_forward keeps its result: one run, not two."""
    block, x = Block(), torch.randn(2, 9, 32, requires_grad=True)
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        attention = op == torch.ops.flash_attn._flash_attn_forward.default
        return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE

    runs = []
    from flash_attn.backends import reference

    forward = reference.forward
    reference.forward = lambda problem, ops: runs.append(1) or forward(problem, ops)
    try:
        out = checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
        (got,) = torch.autograd.grad(out.sum(), x)
    finally:
        reference.forward = forward
    assert torch.ops.flash_attn._flash_attn_forward.default in seen and len(runs) == 1
    torch.testing.assert_close(got, torch.autograd.grad(block(x).sum(), x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout_mask(reentrant):
    x = [t.detach().requires_grad_() for t in qkv()]

    def call(q, k, v):
        return flash_attn_func(q, k, v, 0.4)

    torch.manual_seed(1)
    want = torch.autograd.grad(call(*x).square().sum(), x)
    torch.manual_seed(1)
    checkpoint(call, *x, use_reentrant=reentrant).square().sum().backward()
    for leaf, w in zip(x, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 11, 2, 16)
        out, lse, _ = flash_attn_func(q, k, k[..., :8], return_attn_probs=True)
        assert out.shape == (2, 9, 4, 8) and lse.shape == (2, 4, 9)


def test_autocast_leaves_the_dtype_of_the_inputs():
    q = torch.randn(2, 5, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_func(q, q, q).dtype == torch.bfloat16


def test_opcheck_of_our_own_operators():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    q, k, v = (x.detach() for x in qkv())
    out, lse, _, _ = torch.ops.flash_attn._flash_attn_forward(
        q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False
    )
    arguments = (
        torch.randn_like(out),
        None,
        out,
        lse,
        q,
        k,
        v,
        None,
        None,
        None,
        0,
        0,
        0.0,
        0.25,
        True,
        -1,
        -1,
        0.0,
        None,
        False,
    )
    torch.library.opcheck(_traced._attention_backward, arguments, test_utils=checks)
    ops = cases.build(cases.Case("cache", max_q=1, max_k=24, seqused_k=(24, 24))).operands
    tail = (None, None, None, 0.25, True, -1, -1, 0.0)
    torch.library.opcheck(
        _traced._flash_attn_read_kvcache, (*ops[:3], ops.seqused_k, *tail, None, 0), test_utils=checks
    )
    new = torch.randn(2, 1, 2, 16)
    torch.library.opcheck(
        _traced._flash_attn_append_kvcache,
        (*ops[:3], new, new, None, None, ops.seqused_k - 1, *tail, True, None, 0),
        test_utils=checks,
    )
