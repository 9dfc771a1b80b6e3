"""The KV cache path on a GPU at real sizes: decode, append, rotary, CUDA graphs whose lengths change, repeatability."""

import math

import pytest
import torch

pytest.importorskip("triton")
import test_decode as small  # noqa: E402
import test_kvcache as calls  # noqa: E402
from cases import CASES, PAIRWISE, Case, build, ids  # noqa: E402

from flash_attn import flash_attn_func, flash_attn_with_kvcache  # noqa: E402
from flash_attn.forward import decode  # noqa: E402
from flash_attn.kvcache import splits  # noqa: E402
from flash_attn.layers.rotary import apply_rotary_emb, rotate_at  # noqa: E402
from flash_attn.problem import Append, Operands, Problem  # noqa: E402
from flash_attn.reference import attention  # noqa: E402
from flash_attn.tuning.config import FwdConfig  # noqa: E402
from flash_attn.utils import launcher  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF = dict(dtype=torch.bfloat16, head_dim=128, max_k=2000, max_q=1)
REAL = [
    Case("mha", **HALF, heads=4, kv_heads=4, seqused_k=(2000, 3)),
    Case("gqa", **HALF, heads=32, kv_heads=8, seqused_k=(1999, 700)),
    Case("mqa_five_queries", **HALF | dict(max_q=5), heads=16, kv_heads=1, causal=True, seqused_k=(2000, 4)),
    Case("many_rows", **HALF | dict(max_q=70), heads=8, kv_heads=2, causal=True),
    Case("window_softcap", **HALF | dict(max_q=3), window=(300, 0), softcap=20.0, seqused_k=(1500, 200)),
    Case("alibi_sink", **HALF | dict(max_q=2), alibi="bh", sink=True, causal=True, seqused_k=(0, 1000)),
    Case("fp16_64", **HALF | dict(head_dim=64, dtype=torch.float16), seqused_k=(77, 2000)),
    Case("fp32", **HALF | dict(dtype=torch.float32), seqused_k=(77, 2000)),
    Case("head_dim_40", **HALF | dict(head_dim=40), seqused_k=(77, 2000)),
    Case("head_dim_33", **HALF | dict(head_dim=33), seqused_k=(77, 2000)),
    Case("mla_192_128", **HALF | dict(head_dim=192), head_dim_v=128, seqused_k=(77, 2000)),
    Case("head_dim_256", **HALF | dict(head_dim=256), seqused_k=(77, 2000)),
    Case("head_dim_512", **HALF | dict(head_dim=512), seqused_k=(77, 2000)),
    Case("leftpad_batch_idx", **HALF, leftpad=(5, 130), batch_idx=(3, 0), seqused_k=(2000, 900)),
    Case(
        "packed",
        batch=4,
        **HALF | dict(max_q=3),
        packed_q=(3, 0, 1, 2),
        packed_k=(2000, 5, 0, 900),
        causal=True,
    ),
    *(
        Case(f"page_{p}", **HALF | dict(max_k=1536), page_size=p, seqused_k=(1536, 700), heads=8, kv_heads=2)
        for p in (1, 16, 48, 64, 256)
    ),
    Case("page_16_leftpad", **HALF | dict(max_k=1536), page_size=16, seqused_k=(1500, 700), leftpad=(7, 33)),
]


@pytest.mark.parametrize("spans", [1, 3, 40])
@pytest.mark.parametrize("case", REAL, ids=ids)
def test_decode(case, spans):
    """Against the oracle, and the same bits in every run."""
    p, ops, *_ = build(case, "cuda")
    config = splits.configs(p, 227 * 1024, 132)[0]
    out, lse = decode.run(p, ops, config, spans)
    small.check(p, ops, out, lse)
    for _ in range(3):
        again, again_lse = decode.run(p, ops, config, spans)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.parametrize("case", [c for c in CASES + PAIRWISE if not c.dropout_p], ids=ids)
def test_every_pair_of_features(case):
    p, ops, *_ = build(case, "cuda", dtype=torch.bfloat16)
    small.check(p, ops, *decode.run(p, ops, FwdConfig(16, 16, 4, 3), 3))


@pytest.mark.parametrize("c", calls.APPEND + calls.ROTARY + calls.OTHER, ids=lambda c: c.id)
def test_with_kvcache(c):
    calls.call_and_check(c, device="cuda")


def test_one_split_is_bitwise_the_unsplit_result_whatever_the_batch():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(6, n, h, 128, device="cuda", dtype=torch.bfloat16)
        for n, h in ((1, 32), (3000, 8), (3000, 8))
    )
    lens = torch.tensor([3000, 1, 64, 65, 2999, 1500], device="cuda", dtype=torch.int32)
    whole = flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, num_splits=1)
    for b in range(6):
        one = flash_attn_with_kvcache(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lens[b : b + 1], num_splits=1
        )
        assert torch.equal(one[0], whole[b])


@pytest.mark.parametrize("page", [0, 16])
def test_a_graph_follows_the_lengths(page):
    """Captured once with append, rotary and splits; replayed with other lengths; nothing synchronises or compiles."""
    torch.manual_seed(0)
    B, capacity, make = 4, 4096, dict(device="cuda", dtype=torch.bfloat16)
    q, k, v = (
        torch.randn(B, 1, 32, 128, **make),
        torch.randn(B, 1, 8, 128, **make),
        torch.randn(B, 1, 8, 128, **make),
    )
    shape = (B * capacity // page, page) if page else (B, capacity)
    k_cache, v_cache = torch.randn(*shape, 8, 128, **make), torch.randn(*shape, 8, 128, **make)
    table = torch.randperm(shape[0], device="cuda", dtype=torch.int32).view(B, -1) if page else None
    angle = torch.rand(capacity, 64, device="cuda") * 6.28
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    lens = torch.tensor([5, 4000, 77, 2048], device="cuda", dtype=torch.int32)

    def call():
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lens, block_table=table,
            causal=True,
        )  # fmt: skip

    call()
    compiled = launcher.compilations()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([9, 4001, 78, 3000], [0, 1, 2, 3], [4095, 100, 1000, 4095]):
        lens.copy_(torch.tensor(lengths))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        keys, values = ((x[table.long()].flatten(1, 2) if page else x) for x in (k_cache, v_cache))
        at = lens[:, None].long()
        assert torch.equal(values[torch.arange(B), lens.long()], v[:, 0])
        p = Problem(B, 32, 8, 1, capacity, 128, 128, torch.bfloat16, "cuda", scale=128**-0.5, seqused_k=True)
        ops = Operands(rotate_at(q, cos, sin, at, True), keys, values, seqused_k=lens + 1)
        want, _ = attention.forward(p, ops)
        assert (out.double() - want).norm() <= 2**-7 * want.norm()
    assert launcher.compilations() == compiled


def test_new_lengths_compile_nothing():
    make = dict(device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, 1, 8, 64, **make)
    flash_attn_with_kvcache(q, *torch.randn(2, 2, 1024, 2, 64, **make), cache_seqlens=7)
    for repeats in (99, 200):  # no split: programs that fit on an H200 together, and more
        kv = torch.randn(2, 2 * repeats, 1024, 2, 64, **make)
        flash_attn_with_kvcache(q.repeat(repeats, 1, 1, 1), *kv, cache_seqlens=7)
    before = launcher.compilations()
    for batch, capacity in ((1, 1024), (3, 2000), (2, 8192), (150, 300), (300, 300)):
        q = torch.randn(batch, 1, 8, 64, **make)
        k, v = torch.randn(2, batch, capacity, 2, 64, **make)
        flash_attn_with_kvcache(
            q, k, v, cache_seqlens=torch.randint(0, capacity, (batch,), device="cuda").int()
        )
    assert launcher.compilations() == before


def test_append_equals_torch():
    """v bitwise; k and q to a rounding; a length outside the cache writes nothing."""
    from flash_attn.kvcache.append import append_torch, append_triton

    torch.manual_seed(0)
    make = dict(device="cuda", dtype=torch.bfloat16)
    B, new, capacity = 5, 70, 512
    q, k, v = (
        torch.randn(B, 3, 32, 128, **make),
        torch.randn(B, new, 8, 128, **make),
        torch.randn(B, new, 8, 128, **make),
    )
    k_cache, v_cache = torch.randn(2, B, capacity, 8, 128, **make)
    angle = torch.rand(capacity, 32, device="cuda") * 6.28
    lens = torch.tensor([0, 100, 480, -5, 10**6], device="cuda", dtype=torch.int32)
    fresh = Append(k, v, angle.cos().bfloat16(), angle.sin().bfloat16(), False, lens)
    p = Problem(B, 32, 8, 3, capacity, 128, 128, torch.bfloat16, "cuda", right=0, seqused_k=True)
    a, b = (Operands(q, k_cache.clone(), v_cache.clone()) for _ in range(2))
    (qa, la), (qb, lb) = append_torch(p, a, fresh), append_triton(p, b, fresh)
    assert torch.equal(a.v, b.v) and torch.equal(la, lb)
    for x, y in ((a.k, b.k), (qa, qb)):
        assert (x.float() - y.float()).abs().max() <= 2**-7 * x.float().abs().max()
    assert torch.equal(b.k[4], k_cache[4])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved, inplace):
    torch.manual_seed(0)
    x = torch.randn(3, 700, 9, 128, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(1000, 48, device="cuda") * 6.28
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    offsets = torch.tensor([0, 5, 300], device="cuda")
    want = rotate_at(x.double(), cos, sin, offsets[:, None] + torch.arange(700, device="cuda"), interleaved)
    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, seqlen_offsets=offsets)
    assert (out.double() - want).abs().max() <= 2**-8 * want.abs().max()
    out.backward(want.bfloat16())
    assert (
        leaf.grad.double() - x.double()
    ).abs().max() <= 2**-6 * x.abs().max()  # the inverse, after two roundings


def test_rotary_compiles_once_per_direction():
    """As upstream's test of compilation counts: lengths, batches and offsets share a kernel."""
    from flash_attn.ops.triton.rotary import rotary_kernel

    def compiled():
        return sum(len(caches[0]) for caches in rotary_kernel.device_caches.values())

    before = compiled()
    for seqlen in (128, 256, 131, 1):
        for batch in (4, 32):
            x = torch.randn(batch, seqlen, 4, 144, device="cuda", dtype=torch.float16, requires_grad=True)
            cos, sin = torch.randn(2, 300, 72, device="cuda", dtype=torch.float16)
            apply_rotary_emb(x, cos, sin, seqlen_offsets=seqlen % 7).sum().backward()
    assert compiled() - before == 2


def test_offsets_beyond_two_to_the_31():
    """A cache whose last sequence starts behind element 2^31."""
    B, capacity = 9, 2**20
    cache = torch.empty(B, capacity, 2, 128, device="cuda", dtype=torch.bfloat16)
    cache[-1].normal_()
    q = torch.randn(1, 1, 4, 128, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([B - 1], device="cuda", dtype=torch.int32)
    out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=capacity, cache_batch_idx=index)
    want = flash_attn_func(q, cache[-1:].clone(), cache[-1:].clone())
    assert (out.float() - want.float()).norm() <= 2**-7 * want.float().norm()
