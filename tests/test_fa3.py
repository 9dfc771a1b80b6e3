"""FlashAttention-3's interface: names, signatures, results, operators by position, and what is refused by name."""

import inspect

import pytest
import torch

import flash_attn
import flash_attn_3.flash_attn_interface as under_the_package
import flash_attn_interface as fa3
from flash_attn import UnsupportedError, _legacy, use_backend
from flash_attn.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # Dynamo, itself

EMPTY = inspect.Parameter.empty
SCALES = dict(q_descale=None, k_descale=None, v_descale=None)
WINDOW = dict(window_size=(-1, -1), attention_chunk=0, softcap=0.0)
TAIL = dict(num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False)
LENGTHS = dict(cu_seqlens_q=EMPTY, cu_seqlens_k=EMPTY, max_seqlen_q=EMPTY, max_seqlen_k=EMPTY)

# Recorded from hopper/flash_attn_interface.py of flash-attention 2.8.4.
SIGNATURES = {
    "flash_attn_func": dict(
        q=EMPTY, k=EMPTY, v=EMPTY, softmax_scale=None, causal=False, qv=None, **SCALES, **WINDOW, **TAIL
    ),
    "flash_attn_varlen_func": dict(
        q=EMPTY, k=EMPTY, v=EMPTY, **LENGTHS, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
        qv=None, **SCALES, **WINDOW, **TAIL,
    ),
    "flash_attn_qkvpacked_func": dict(
        qkv=EMPTY, softmax_scale=None, causal=False, **SCALES, **WINDOW, deterministic=False, num_heads_q=None,
        sm_margin=0, return_attn_probs=False,
    ),
    "flash_attn_with_kvcache": dict(
        q=EMPTY, k_cache=EMPTY, v_cache=EMPTY, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, **SCALES, softmax_scale=None, causal=False,
        **WINDOW, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ),
    "flash_attn_combine": dict(out_partial=EMPTY, lse_partial=EMPTY, out=None, out_dtype=None),
    "get_scheduler_metadata": dict(
        batch_size=EMPTY, max_seqlen_q=EMPTY, max_seqlen_k=EMPTY, num_heads_q=EMPTY, num_heads_kv=EMPTY,
        headdim=EMPTY, cache_seqlens=EMPTY, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False,
        window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _oracle():
    torch._dynamo.reset()
    with use_backend("reference"):
        yield


def qkv(M=9, N=11, H=4, Hk=2, D=16, B=2):
    return [torch.randn(B, n, h, D, requires_grad=True) for n, h in ((M, H), (N, Hk), (N, Hk))]


def packed(lengths=(5, 9, 3), H=4, Hk=2, D=16):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    x = [torch.randn(sum(lengths), h, D, requires_grad=True) for h in (H, Hk, Hk)]
    return x, (cu, cu, max(lengths), max(lengths))


def same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def gradients(out, inputs, *more):
    torch.manual_seed(3)
    loss = sum((x * torch.randn_like(x)).sum() for x in (out, *more))
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name):
    parameters = inspect.signature(getattr(fa3, name)).parameters
    assert list(parameters) == list(SIGNATURES[name])
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]
    assert getattr(under_the_package, name) is getattr(fa3, name)


def test_private_functions_can_be_inspected():
    """Megatron-LM asks for the parameters of `_flash_attn_forward`, and of `_init_fn` where it is an operator."""
    function = under_the_package._flash_attn_forward
    parameters = list(inspect.signature(function._init_fn).parameters)
    assert len(parameters) == 34 and parameters[6] == "out_" and parameters[20:23] == list(SCALES)
    assert len(inspect.signature(fa3._flash_attn_backward._init_fn).parameters) == 22


@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(window_size=(4, 2), softcap=2.0), dict(softmax_scale=0.3)]
)
def test_dense_equals_flash_attention_2(options):
    inputs = qkv()
    want = flash_attn.flash_attn_func(*inputs, **options)
    got = fa3.flash_attn_func(*inputs, **options, deterministic=True)
    same([got], [want])
    same(gradients(got, inputs), gradients(want, inputs))


def test_lse_is_returned_and_has_a_gradient():
    inputs = qkv(M=9, N=5)
    out, lse = fa3.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    _, other, _ = flash_attn.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    assert (lse[:, :, :4] == -torch.inf).all() and (other[:, :, :4] == torch.inf).all()
    same([lse[:, :, 4:]], [other[:, :, 4:]])
    run = torch.compile(
        lambda *x: fa3.flash_attn_func(*x, causal=True, return_attn_probs=True),
        backend="aot_eager",
        fullgraph=True,
    )
    traced_out, traced_lse = run(*inputs)
    eager = gradients(out, inputs, lse[:, :, 4:])
    for g, w in zip(gradients(traced_out, inputs, traced_lse[:, :, 4:]), eager, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def test_packed_projections():
    x = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    got, want = (
        fa3.flash_attn_qkvpacked_func(x, causal=True),
        flash_attn.flash_attn_qkvpacked_func(x, causal=True),
    )
    same([got, *gradients(got, x)], [want, *gradients(want, x)])
    x = torch.randn(2, 9, 4 + 2 + 2, 16, requires_grad=True)
    q, k, v = x.split([4, 2, 2], dim=2)
    got = fa3.flash_attn_qkvpacked_func(x, num_heads_q=4, window_size=(3, 0))
    want = flash_attn.flash_attn_func(q, k, v, window_size=(3, 0))
    same([got, *gradients(got, x)], [want, *gradients(want, x)])
    with pytest.raises(ArgumentValueError, match="num_heads_q must leave an even number .* 8, got 3"):
        fa3.flash_attn_qkvpacked_func(x, num_heads_q=3)
    with pytest.raises(ArgumentValueError, match="qkv must have shape"):
        fa3.flash_attn_qkvpacked_func(x)
    with pytest.raises(ArgumentTypeError, match="qkv must be a torch.Tensor"):
        fa3.flash_attn_qkvpacked_func([1])


def test_varlen_equals_flash_attention_2():
    x, lengths = packed()
    got = fa3.flash_attn_varlen_func(*x, *lengths, causal=True, return_attn_probs=True)
    want = flash_attn.flash_attn_varlen_func(*x, *lengths, causal=True, return_attn_probs=True)
    same([*got, *gradients(got[0], x)], [*want[:2], *gradients(want[0], x)])


@pytest.mark.parametrize("compiled", [False, True])
def test_used_lengths_equal_shorter_sequences(compiled):
    x, lengths = packed((5, 9, 3))
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ((2, 9, 0), (5, 4, 3)))

    def call(q, k, v):
        return fa3.flash_attn_varlen_func(q, k, v, *lengths, seqused_q=used_q, seqused_k=used_k, causal=True)

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    out = run(*x)
    grads = gradients(out, x)
    torch.manual_seed(3)
    dout = torch.randn_like(out)
    for b, start in enumerate((0, 5, 14)):
        q, k, v = (t[None, start : start + n[b]] for t, n in zip(x, (used_q, used_k, used_k), strict=True))
        end = start + int(used_q[b])
        if end > start:
            want = flash_attn.flash_attn_func(q, k, v, causal=True)
            torch.testing.assert_close(out[start:end], want[0])
            want_grads = torch.autograd.grad((want * dout[None, start:end]).sum(), x)
            for g, w, n in zip(grads, want_grads, (used_q, used_k, used_k), strict=True):
                torch.testing.assert_close(g[start : start + n[b]], w[start : start + n[b]])
        assert not out[end : (5, 14, 17)[b]].any()


def cache(B=2, N=24, Hk=2, D=16):
    return [torch.randn(B, N, Hk, D) for _ in range(2)]


def test_kvcache_equals_flash_attention_2():
    q, new_k, new_v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    cos, sin = torch.randn(24, 8), torch.randn(24, 8)
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    mine, theirs = cache(), None
    theirs = [x.clone() for x in mine]
    metadata = fa3.get_scheduler_metadata(2, 3, 24, 4, 2, 16, lengths)
    by_operator = torch.ops.flash_attn_3.get_scheduler_metadata(
        2, 3, 24, 4, 2, 16, 16, torch.bfloat16, lengths
    )
    assert metadata.dtype == by_operator.dtype == torch.int32
    out, lse, *accum = fa3.flash_attn_with_kvcache(
        q, *mine, new_k, new_v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True,
        scheduler_metadata=metadata, return_softmax_lse=True,
    )  # fmt: skip
    want, want_lse = flash_attn.flash_attn_with_kvcache(
        q, *theirs, new_k, new_v, cos, sin, lengths, causal=True, return_softmax_lse=True
    )
    same([out, lse, *mine], [want, want_lse, *theirs])
    assert len(accum) == 2 and not any(x.numel() for x in accum)
    got = fa3.flash_attn_with_kvcache(q, *mine, cache_seqlens=8)
    same([got], [flash_attn.flash_attn_with_kvcache(q, *mine, cache_seqlens=8)])


def test_kvcache_pages_through_a_batch_index_and_packed_queries():
    pages = [torch.randn(7, 4, 2, 16) for _ in range(2)]
    table = torch.tensor([[3, 1, 6], [0, 2, 5], [4, 4, 4]], dtype=torch.int32)
    index, lengths = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([9, 12], dtype=torch.int32)
    q = torch.randn(2, 2, 4, 16)
    dense = [x[table.long()].flatten(1, 2)[index.long()] for x in pages]
    want = flash_attn.flash_attn_with_kvcache(q, *dense, cache_seqlens=lengths, causal=True)
    got = fa3.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=lengths, page_table=table, cache_batch_idx=index, causal=True
    )
    torch.testing.assert_close(got, want)
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    got = fa3.flash_attn_with_kvcache(
        q.flatten(0, 1), *pages, cache_seqlens=lengths, page_table=table[index.long()], cu_seqlens_q=cu, max_seqlen_q=2,
        causal=True,
    )  # fmt: skip
    torch.testing.assert_close(got, want.flatten(0, 1))
    with pytest.raises(UnsupportedError, match="cu_seqlens_q together with k, v is not supported"):
        new = torch.randn(2, 1, 2, 16)
        fa3.flash_attn_with_kvcache(
            q.flatten(0, 1), *dense, new, new, cache_seqlens=lengths - 1, cu_seqlens_q=cu, max_seqlen_q=2
        )


def test_combine_equals_the_whole():
    q, k, v = (x.detach() for x in qkv(M=7, N=12))
    parts = [
        fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in ((0, 5), (5, 12))
    ]
    outs = torch.stack([o for o, _ in parts] + [torch.full_like(parts[0][0], torch.nan)])
    lses = torch.stack([x.transpose(1, 2) for _, x in parts] + [torch.full((2, 7, 4), -torch.inf)])
    out, lse = fa3.flash_attn_combine(outs, lses, out_dtype=torch.float32)
    want, want_lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse.transpose(1, 2))
    into = torch.empty_like(want)
    assert torch.ops.flash_attn_3.fwd_combine(outs, lses, into)[0] is into and torch.equal(into, out)
    nothing, lse = fa3.flash_attn_combine(outs[2:], lses[2:])
    assert not nothing.any() and (lse == -torch.inf).all()
    with pytest.raises(ArgumentValueError, match="lse_partial must have shape"):
        fa3.flash_attn_combine(outs, lses[:2])


REFUSED = {
    "qv": torch.zeros(1), "q_descale": torch.ones(1), "k_descale": torch.ones(1), "v_descale": torch.ones(1),
    "attention_chunk": 4, "cu_seqlens_k_new": torch.zeros(1), "rotary_seqlens": torch.zeros(1),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_refused_by_name(name):
    q, k, v = (x.detach() for x in qkv())
    calls = [lambda **kw: fa3.flash_attn_with_kvcache(q, k, v, **kw)]
    if name in SIGNATURES["flash_attn_func"]:
        calls += [
            lambda **kw: fa3.flash_attn_func(q, k, v, **kw),
            lambda **kw: fa3.flash_attn_varlen_func(q, k, v, None, None, None, None, **kw),
        ]
    if name in SIGNATURES["flash_attn_qkvpacked_func"]:
        calls.append(lambda **kw: fa3.flash_attn_qkvpacked_func(torch.zeros(1, 2, 3, 4, 16), **kw))
    for call in calls:
        with pytest.raises(UnsupportedError, match=f"^{name} of FlashAttention-3 is not supported here: ."):
            call(**{name: REFUSED[name]})


def test_rotary_positions_may_be_said_to_be_those_of_the_cache():
    """FlashAttention-3's own tests say so in every call."""
    q, new, used = (
        torch.randn(2, 1, 4, 16),
        torch.randn(2, 1, 2, 16),
        torch.tensor([5, 20], dtype=torch.int32),
    )
    tables = dict(rotary_cos=torch.rand(30, 8), rotary_sin=torch.rand(30, 8))
    mine = cache()
    theirs = [t.clone() for t in mine]
    got, want = (
        fa3.flash_attn_with_kvcache(q, *kv, new, new, cache_seqlens=used, rotary_seqlens=positions, **tables)
        for kv, positions in ((mine, used), (theirs, None))
    )
    same([got, *mine], [want, *theirs])


def test_errors_of_a_cache_call_name_its_arguments():
    """A call that appends nothing was told about k and seqused_k, which it had not passed."""
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 6, 2, 8)
    with pytest.raises(ArgumentValueError, match="k_cache must have at least a row"):
        fa3.flash_attn_with_kvcache(q, cache[:1], cache[:1])
    with pytest.raises(ArgumentTypeError, match="cache_seqlens must have dtype int32"):
        fa3.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=torch.tensor([1, 2]))
    pages = torch.tensor([[0, 1], [0, 9]], dtype=torch.int32)
    with pytest.raises(ArgumentValueError, match=r"page_table\[1\] must name pages in \[0, 2\)"):
        fa3.flash_attn_with_kvcache(q, cache, cache, page_table=pages)


def test_float8_is_refused_by_name():
    q = torch.randn(1, 4, 2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentTypeError, match="q must have dtype .* got torch.float8_e4m3fn"):
        fa3.flash_attn_func(q, q, q)


def test_operators_by_position():
    """As PyTorch's "FA3" calls them: 34 arguments forward, 22 backward, gradients in place."""
    x, lengths = packed()
    x = [t.detach() for t in x]
    given = torch.full_like(x[0], torch.nan)
    out, lse, *accum = torch.ops.flash_attn_3.fwd(
        *x, None, None, None, given, *lengths[:2], None, None, None, *lengths[2:], None, None, None, None, None,
        None, None, None, None, None, True, -1, -1, 0, 0.0, True, None, 1, None, 0,
    )  # fmt: skip
    want, want_lse = fa3.flash_attn_varlen_func(*x, *lengths, causal=True, return_attn_probs=True)
    assert out is given and len(accum) == 2
    same([out, lse], [want, want_lse])
    grads = [torch.full_like(t, torch.nan) for t in x]
    dout = torch.randn_like(out)
    results = torch.ops.flash_attn_3.bwd(
        dout, *x, out, lse, *grads, *lengths[:2], None, None, *lengths[2:], None, True, -1, -1, 0.0, False, 0
    )
    assert len(results) == 8 and all(r is g for r, g in zip(results, grads, strict=False))
    leaves = [t.clone().requires_grad_() for t in x]
    same(grads, torch.autograd.grad(fa3.flash_attn_varlen_func(*leaves, *lengths, causal=True), leaves, dout))
    again = [torch.full_like(t, torch.nan) for t in x]
    softmax_d = fa3._flash_attn_backward(
        dout, *x, out, lse, *lengths[:2], None, None, *lengths[2:], *again, None, True
    )
    same(again, grads)
    torch.testing.assert_close(softmax_d[:, :17], (dout * out).sum(-1).T)
    with pytest.raises(ArgumentValueError, match="dq, dk and dv must be given"):
        fa3._flash_attn_backward(dout, *x, out, lse)
    made = torch.ops.flash_attn_3.bwd(
        dout, *x, out, lse, *[None] * 3, *lengths[:2], None, None, *lengths[2:], None, True
    )
    same(made[:3], grads)
    with pytest.raises(ArgumentValueError, match="out must have shape"):
        torch.ops.flash_attn_3.fwd(q=x[0][None], k=x[1][None], v=x[2][None], out=given[:3])


def test_transformer_engines_call():
    """Its context parallelism passes 20 arguments by position after q, k and v, then names."""
    x, lengths = packed()
    x = [t.detach() for t in x]
    results = fa3._flash_attn_forward(
        *x, None, None, None, None, *lengths[:2], None, None, None, *lengths[2:], None, None, None, None, None, None,
        None, None, None, softmax_scale=0.25, causal=True, window_size_left=4, window_size_right=0,
    )  # fmt: skip
    assert len(results) == 4
    want = flash_attn.flash_attn_varlen_func(*x, *lengths, softmax_scale=0.25, window_size=(4, 0))
    same([results[0]], [want])


@pytest.mark.parametrize("options", [dict(causal=True), dict(window_size=(4, 2), softcap=2.0)])
def test_compiled_without_a_break_or_a_recompilation(options):
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(q, k, v):
        return fa3.flash_attn_func(q, k, v, **options)

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for M, N in ((9, 11), (13, 17), (21, 30)):
        inputs = qkv(M, N)
        got, want = run(*inputs), call(*inputs)
        same([got, *gradients(got, inputs)], [want, *gradients(want, inputs)])
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[0] == counts[-1]


def test_compiled_varlen_and_kvcache():
    x, lengths = packed()
    run = torch.compile(
        lambda q, k, v: fa3.flash_attn_varlen_func(q, k, v, *lengths, causal=True),
        backend="aot_eager",
        fullgraph=True,
    )
    got, want = run(*x), fa3.flash_attn_varlen_func(*x, *lengths, causal=True)
    same([got, *gradients(got, x)], [want, *gradients(want, x)])
    q, new = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16)
    mine = cache()
    theirs, used = [t.clone() for t in mine], torch.tensor([5, 20], dtype=torch.int32)

    def decode(kc, vc):
        return fa3.flash_attn_with_kvcache(
            q, kc, vc, new, new, cache_seqlens=used, causal=True, return_softmax_lse=True
        )

    got, want = torch.compile(decode, backend="aot_eager", fullgraph=True)(*mine), decode(*theirs)
    same([*got, *mine], [*want, *theirs])


def test_opcheck():
    q, k, v = (x.detach() for x in qkv(5, 7))
    arguments = (q, k, v, *[None] * 20, 0.25, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.flash_attn_3._flash_attn_forward, arguments, test_utils=checks)
    out, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(*arguments)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    backward = (torch.randn_like(out), q, k, v, out, lse, *[None] * 6, *grads, 0.25, True)
    torch.library.opcheck(torch.ops.flash_attn_3._flash_attn_backward, backward, test_utils=checks)
    functional = (torch.randn_like(out), None, q, k, v, out, lse, *[None] * 6, 0.25, True, -1, -1, 0.0, False)
    torch.library.opcheck(torch.ops.flash_attn_3._attention_backward, functional, test_utils=checks)
    raw = torch.ops.flash_attn_3
    for op, args in ((raw.fwd, (q, k, v)), (raw.bwd, (out, q, k, v, out, lse, *grads))):
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))


def test_another_flash_attention_3_in_the_process_is_one_clear_error():
    with pytest.raises(ImportError, match="two copies of flash_attn_3 in one process: .*flash_attn_3::"):
        _legacy.claim_operators("/elsewhere/operators.py", "flash_attn_3", "fwd")


def test_pytorchs_own_activation_accepts_it(monkeypatch):
    """torch's "FA3" is only offered GPU tensors; below that check it runs on any, through our operators."""
    fa3_of_torch = pytest.importorskip("torch.nn.attention._fa3")
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    try:
        assert attention.current_flash_attention_impl() == "FA3"
        x, lengths = packed()
        out, lse = fa3_of_torch._fa3_run_forward(
            *(t.detach() for t in x), *lengths, None, True, None, None, None
        )
        want, want_lse = fa3.flash_attn_varlen_func(*x, *lengths, causal=True, return_attn_probs=True)
        same([out, lse], [want.detach(), want_lse.detach()])
        dout = torch.randn_like(out)
        grads = fa3_of_torch._fa3_run_backward(
            dout, *(t.detach() for t in x), out, lse, *lengths, None, True, -1, -1
        )
        same(grads, torch.autograd.grad(want, x, dout))
    finally:
        attention.restore_flash_attention_impl()
