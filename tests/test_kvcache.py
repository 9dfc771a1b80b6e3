"""flash_attn_with_kvcache against the fp64 oracle after an append written out by hand.

Everything runs on the CPU backend; the cases of `KERNELS` also on the Triton kernels in the interpreter.
"""

import itertools
import math
import os
from typing import NamedTuple

import pytest
import torch
from accuracy import assert_as_close_as_torch

from flash_attn import flash_attn_with_kvcache, use_backend
from flash_attn.layers.rotary import apply_rotary_emb_torch
from flash_attn.problem import Operands, Problem, window_bounds
from flash_attn.reference import attention, eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Call(NamedTuple):
    """One call in words."""

    page: int = 0
    new: int = 0  # new keys per sequence; 0: no append
    queries: int = 1
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    rotary: int = 0  # rotary dimensions
    interleaved: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    leftpad: bool = False
    batch_idx: bool = False
    splits: int = 0
    lengths: tuple[int, ...] = (5, 17, 0)
    capacity: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        return (
            "-".join(f"{k}{v}" for k, v in self._asdict().items() if v != self._field_defaults[k]) or "plain"
        )


def call_and_check(c: Call, device: str = "cpu"):
    """Run the call on fresh caches whose unused rows are NaN, and compare out, lse and the caches."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(c.dtype)

    B, (H, Hk), (D, Dv) = len(c.lengths), c.heads, c.dims
    capacity = c.capacity // c.page * c.page if c.page else c.capacity
    q, lens = normal(B, c.queries, H, D), torch.tensor(c.lengths, dtype=torch.int32)
    pads = torch.tensor([min(2, n) for n in c.lengths], dtype=torch.int32) if c.leftpad else None
    rows = [4, 0, 2][:B] if c.batch_idx else list(range(B))
    logical = [(normal(capacity, Hk, D), normal(capacity, Hk, Dv)) for _ in range(B)]
    for b, pair in enumerate(logical):
        for x in pair:
            x[c.lengths[b] :] = math.nan
            if c.leftpad:
                x[: pads[b]] = math.nan
    table = None
    if c.page:
        per = capacity // c.page
        order = torch.randperm(B * per + 2, generator=g)[: B * per].view(B, per)
        table = order.int()
        caches = [torch.full((B * per + 2, c.page, Hk, d), math.nan, dtype=c.dtype) for d in (D, Dv)]
        for b, pair in enumerate(logical):
            for cache, x in zip(caches, pair, strict=True):
                cache[order[b]] = x.unflatten(0, (per, c.page))
    else:
        caches = [torch.full((max(rows) + 1, capacity, Hk, d), math.nan, dtype=c.dtype) for d in (D, Dv)]
        for b, pair in enumerate(logical):
            for cache, x in zip(caches, pair, strict=True):
                cache[rows[b]] = x
    before = [x.clone() for x in caches]
    k, v = (normal(B, c.new, Hk, D), normal(B, c.new, Hk, Dv)) if c.new else (None, None)
    cos = sin = None
    if c.rotary:
        angle = torch.rand(capacity + 3, c.rotary // 2, generator=g) * 6.28
        cos, sin = angle.cos().to(c.dtype), angle.sin().to(c.dtype)

    index = torch.tensor(rows, dtype=torch.int32) if c.batch_idx else None
    slopes = torch.arange(1, H + 1) / 8 if c.alibi else None

    def send(x):
        return None if x is None else x.to(device)

    used = [send(x) for x in caches]
    out, lse = flash_attn_with_kvcache(
        send(q), *used, send(k), send(v), rotary_cos=send(cos), rotary_sin=send(sin), cache_seqlens=send(lens),
        cache_batch_idx=send(index), cache_leftpad=send(pads), block_table=send(table), causal=c.causal,
        window_size=c.window, softcap=c.softcap, rotary_interleaved=c.interleaved, alibi_slopes=send(slopes),
        num_splits=c.splits, return_softmax_lse=True,
    )  # fmt: skip
    out, lse, *caches = (x.cpu() for x in (out, lse, *used))

    # the same by hand: where each new row belongs, rotated in fp64 (exact) and as PyTorch does it in c.dtype (plain)
    expected = [x.clone() for x in before]
    keys = {"exact": before[0].double(), "plain": before[0].clone()}
    queries = {"exact": q.double(), "plain": q.clone()}
    local = c.causal or c.window != (-1, -1)
    for b, n in enumerate(c.lengths):
        for rotated in queries.values():
            if c.rotary:
                at = [n + (i if local else 0) for i in range(c.queries)]
                rotated[b] = rotate(rotated[b], cos[at], sin[at], c.interleaved)
        for i in range(c.new):
            place = (table[b, (n + i) // c.page], (n + i) % c.page) if c.page else (rows[b], n + i)
            for stored in keys.values():
                key = k[b, i].to(stored.dtype)
                if c.rotary:
                    key = rotate(key[None], cos[n + i][None], sin[n + i][None], c.interleaved)[0]
                stored[place] = key
            expected[0][place], expected[1][place] = keys["exact"][place].to(c.dtype), v[b, i]
    # v is copied, other rows are as they were
    assert torch.equal(caches[1].nan_to_num(9.0), expected[1].nan_to_num(9.0))
    assert torch.equal(caches[0].isnan(), expected[0].isnan())
    close(caches[0].nan_to_num(), expected[0].nan_to_num())
    if not c.rotary:
        assert torch.equal(caches[0].nan_to_num(), expected[0].nan_to_num())

    left, right = window_bounds(c.causal, c.window, c.queries, capacity)
    p = Problem(
        B, H, Hk, c.queries, capacity, D, Dv, c.dtype, left=left, right=right, scale=D**-0.5, softcap=c.softcap,
        alibi=c.alibi, seqused_k=True, leftpad=c.leftpad, page_size=c.page, batch_idx=c.batch_idx,
    )  # fmt: skip
    ops = Operands(
        queries["exact"], keys["exact"], expected[1], seqused_k=lens + c.new, leftpad_k=pads, block_table=table,
        cache_batch_idx=index, alibi_slopes=slopes,
    )  # fmt: skip
    want, want_lse = attention.forward(p, ops)
    plain, _ = eager.forward(p, ops._replace(q=queries["plain"], k=keys["plain"]))
    assert_as_close_as_torch(out, want, plain)
    seen = want_lse.isfinite()
    assert torch.equal(
        lse[~seen], torch.full_like(lse[~seen], torch.inf)
    )  # as FlashAttention-2 reports such rows
    if c.dtype == torch.float32 and seen.any():
        assert (lse.double() - want_lse)[seen].abs().max() < 1e-5
    return out, lse


def rotate(x, cos, sin, interleaved):
    return apply_rotary_emb_torch(x[None], cos.to(x.dtype), sin.to(x.dtype), interleaved)[0]


def close(actual, expected):
    """Two roundings of the largest value: one of each product, and the sum may cancel."""
    bound = 2 * torch.finfo(actual.dtype).eps * expected.double().abs().max()
    assert (actual.double() - expected.double()).abs().max() <= bound


APPEND = [
    Call(page=page, new=new, queries=m, causal=causal)
    for page, new, m, causal in itertools.product((0, 1, 16), (1, 4), (1, 3), (False, True))
]
ROTARY = [
    Call(page=page, new=new, queries=new, rotary=rotary, interleaved=style, causal=causal)
    for page, new, rotary, style, causal in itertools.product(
        (0, 16), (1, 3), (4, 16), (False, True), (False, True)
    )
]
OTHER = [
    Call(),
    Call(queries=3),
    Call(causal=True, queries=40),  # more queries than keys: rows that see none
    Call(heads=(4, 1), new=2, queries=2, causal=True),
    Call(heads=(3, 3), new=1),
    Call(dims=(24, 40), new=1, causal=True, queries=2),
    Call(dims=(7, 5), new=1),
    Call(new=2, rotary=8, dims=(20, 12), queries=2, causal=True),
    Call(leftpad=True, new=1, rotary=8, causal=True),
    Call(leftpad=True, page=4, new=2, queries=2, window=(4, 0)),
    Call(leftpad=True, batch_idx=True, new=1),
    Call(batch_idx=True, new=3, queries=3, causal=True, rotary=16, interleaved=True),
    Call(window=(3, 1), queries=4, new=4, rotary=8),
    Call(window=(3, -1), queries=2, page=1),
    Call(window=(-1, 0), queries=3, new=3, rotary=4),  # causal by another name: q rotates row by row
    Call(softcap=2.0, new=1, page=16),
    Call(alibi=True, queries=3, new=3, causal=True),
    Call(alibi=True, page=3, new=1, queries=2),
    Call(dtype=torch.bfloat16, new=2, queries=2, rotary=16, causal=True),
    Call(dtype=torch.float16, page=8, new=2, queries=2, rotary=8),
    Call(page=256, capacity=512, lengths=(300, 17), new=2, queries=2, causal=True, rotary=8),
    Call(splits=1, new=1, rotary=16, capacity=300, lengths=(290, 3, 0)),
    Call(splits=3, new=2, queries=2, causal=True, capacity=300, lengths=(298, 3, 0)),
    Call(splits=3, page=1, new=1, capacity=260, lengths=(200, 13)),
    Call(splits=3, page=16, new=1, window=(20, 0), queries=2, capacity=288, lengths=(250, 13), softcap=3.0),
    Call(splits=3, leftpad=True, page=8, alibi=True, capacity=264, lengths=(250, 13)),
    Call(splits=2, heads=(6, 2), dims=(40, 24), batch_idx=True, capacity=260, lengths=(250, 13, 0), queries=3),
]  # fmt: skip
# what the kernels must do differently; the decode kernel takes capacities from 256
KERNELS = (
    [APPEND[i] for i in (0, 9, 12, 23)] + [ROTARY[i] for i in (1, 6, 11, 20, 31)] + OTHER[3:12] + OTHER[-7:]
)


@pytest.mark.parametrize("c", APPEND + ROTARY + OTHER, ids=lambda c: c.id)
def test_cpu(c):
    with use_backend("cpu"):
        call_and_check(c)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("c", KERNELS, ids=lambda c: c.id)
def test_kernels(c, monkeypatch):
    from flash_attn.kvcache import append

    monkeypatch.setattr(append, "append_torch", append.append_triton)  # on the CPU, for the interpreter
    with use_backend("triton"):
        call_and_check(c)


@pytest.mark.parametrize("length", [-3, 31, 40])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.interpret)])
@pytest.mark.parametrize("page", [0, 4])
def test_a_bad_length_writes_nothing_outside_the_cache(length, kernel, page):
    """On a GPU nobody has looked at the lengths; the memory around the cache must survive them."""
    if kernel and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    from flash_attn.kvcache.append import append_torch, append_triton
    from flash_attn.problem import Append

    guard = torch.zeros(3, 32, 2, 16)
    k_cache, v_cache = guard[1:2].clone(), guard[1:2]
    table = torch.arange(8, dtype=torch.int32)[None] if page else None
    if page:
        k_cache, v_cache = (x.view(8, 4, 2, 16) for x in (k_cache, v_cache))
    p = Problem(1, 2, 2, 1, 32, 16, 16, torch.float32, seqused_k=True, page_size=page)
    k, v = torch.ones(2, 1, 4, 2, 16)
    new = Append(k, v, None, None, False, torch.tensor([length], dtype=torch.int32))
    run = append_triton if kernel else append_torch
    _, lengths = run(p, Operands(torch.ones(1, 1, 2, 16), k_cache, v_cache, block_table=table), new)
    assert not guard[0].any() and not guard[2].any()
    inside = [x for x in range(length, length + 4) if 0 <= x < 32]
    assert guard[1].flatten(1).any(1).nonzero().flatten().tolist() == inside
    assert 0 <= lengths.item() <= 32


def test_a_bad_page_is_not_written():
    from flash_attn.kvcache.append import append_torch
    from flash_attn.problem import Append

    k_cache, v_cache = torch.zeros(2, 4, 4, 1, 8)
    p = Problem(1, 1, 1, 1, 8, 8, 8, torch.float32, seqused_k=True, page_size=4)
    k, v = torch.ones(2, 1, 8, 1, 8)
    new = Append(k, v, None, None, False, torch.tensor([0], dtype=torch.int32))
    table = torch.tensor([[-1, 4]], dtype=torch.int32)
    append_torch(p, Operands(torch.ones(1, 1, 1, 8), k_cache, v_cache, block_table=table), new)
    assert not k_cache.any() and not v_cache.any()


def test_the_number_of_splits_does_not_change_what_is_stored():
    c = Call(new=2, queries=2, causal=True, rotary=8, capacity=300, lengths=(290, 3))
    with use_backend("cpu"):
        results = [call_and_check(c._replace(splits=s)) for s in (0, 1, 3)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
