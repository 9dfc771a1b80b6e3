"""FlashAttention-2's own rules of acceptance, as its tests state them, on a sample of its grid of cases.

Out within twice, gradients within three times the error of PyTorch in the same precision against fp32; `S_dmask` with
the dropped entries negative; everything but dq bitwise the same in every run; a cache call within three times. The
sample is drawn once from the whole grid with a fixed seed; the formulas are written here anew.
"""

import itertools
import random

import pytest
import torch

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, flash_attn_gpu
from flash_attn.layers.rotary import apply_rotary_emb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024))


def sample(count: int, **axes) -> list[dict]:
    """`count` cells of the product of `axes`, in which every value of every axis occurs."""
    rng = random.Random(7)
    columns = {}
    for name, values in axes.items():
        column = list(itertools.islice(itertools.cycle(values), count))
        rng.shuffle(column)
        columns[name] = column
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def ids(cell: dict) -> str:
    return "-".join(f"{k}_{v}".replace("torch.", "") for k, v in cell.items() if v not in (False, 0.0))


def formula(
    q, k, v, q_mask=None, k_mask=None, causal=False, window=(-1, -1), softcap=0.0, alibi=None, drop=None, p=0.0,
    upcast=True, reorder=False, leftpad=None,
):  # fmt: skip
    """(out, probabilities) of dense q, k, v (B, S, H, D), in fp32 or (upcast False) in the dtype of q."""
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    M, N, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    scale = q.shape[-1] ** -0.5
    s = torch.einsum("bmhd,bnhd->bhmn", *((q, k * scale) if reorder else (q * scale, k)))
    if softcap:
        s = (s / softcap).tanh() * softcap
    rows, cols = torch.arange(M, device=q.device)[:, None], torch.arange(N, device=q.device)
    m = torch.full((1, 1, 1, 1), M, device=q.device) if q_mask is None else q_mask.sum(1)[:, None, None, None]
    n = torch.full((1, 1, 1, 1), N, device=q.device) if k_mask is None else k_mask.sum(1)[:, None, None, None]
    if leftpad is not None:
        cols = cols - leftpad[:, None, None, None]
        n = n - leftpad[:, None, None, None]
    diagonal = rows + n - m
    hidden = torch.zeros(1, 1, M, N, dtype=torch.bool, device=q.device)
    if k_mask is not None:
        hidden = hidden | ~k_mask[:, None, None, :]
    if leftpad is not None:
        hidden = hidden | (cols < 0)
    right = 0 if causal else window[1]
    if right >= 0:
        hidden = hidden | (cols > diagonal + right)
    if window[0] >= 0:
        hidden = hidden | (cols < diagonal - window[0])
    if alibi is not None:
        s = s - alibi[:, :, None, None].to(s.dtype) * (cols - diagonal).abs().to(s.dtype)
    s = s.masked_fill(hidden, -torch.inf)
    weights = s.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0).to(v.dtype)
    kept = weights if drop is None else weights.masked_fill(~drop, 0.0)
    out = torch.einsum("bhmn,bnhd->bmhd", kept, v / (1 - p))
    if q_mask is not None:
        out = out.masked_fill(~q_mask[:, :, None, None], 0.0)
        weights = weights.masked_fill(~q_mask[:, None, :, None], 0.0)
    return out.to(dtype), weights.to(dtype)


def within(times, got, low, exact, plus=0.0):
    error, allowed = (got - exact).abs().max().item(), (low - exact).abs().max().item()
    assert error <= times * allowed + plus, f"{error} > {times} * {allowed} + {plus}"


GRID = dict(
    dtype=(torch.float16, torch.bfloat16), heads_k=(6, 1, 2), deterministic=(False, True), alibi=(False, True),
    local=(False, True), causal=(False, True), d=DIMS, lengths=LENGTHS, p=(0.0, 0.17), softcap=(0.0, 50.0),
)  # fmt: skip


def window_of(cell, N):
    return tuple(torch.randint(0, N, (2,)).tolist()) if cell["local"] else (-1, -1)


@pytest.mark.parametrize("cell", sample(32, **GRID, pack=("no", "kv", "qkv", "varlen")), ids=ids)
def test_out_and_gradients(cell):
    torch.manual_seed(0)
    B, H, d, p, pack = 4, 6, cell["d"], cell["p"], cell["pack"]
    M, N = cell["lengths"]
    if pack == "qkv":
        M = N
    window = window_of(cell, N)
    Hk = H if pack == "qkv" else cell["heads_k"]
    make = dict(device="cuda", dtype=cell["dtype"])
    q = torch.randn(B, M, H, d, **make) * (cell["softcap"] or 1.0)
    k, v = torch.randn(2, B, N, Hk, d, **make).unbind()
    alibi = torch.rand(B, H, device="cuda") * 0.3 if cell["alibi"] else None
    options = dict(
        causal=cell["causal"], window_size=window, softcap=cell["softcap"], alibi_slopes=alibi,
        deterministic=cell["deterministic"], return_attn_probs=True,
    )  # fmt: skip
    masks = [None, None]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if pack == "varlen":
        masks = [
            torch.arange(n, device="cuda") < torch.randint(max(1, n - 20), n + 1, (B, 1), device="cuda") for n in (M, N)
        ]  # fmt: skip
        q_rows, q_indices, cu_q, max_q, _ = unpad_input(q, masks[0])
        k_rows, _, cu_k, max_k, _ = unpad_input(k, masks[1])
        v_rows = unpad_input(v, masks[1])[0]
        rows, lse, s_dmask = flash_attn_varlen_func(
            q_rows, k_rows, v_rows, cu_q, cu_k, max_q, max_k, p, **options
        )
        out = pad_input(rows, q_indices, B, M)
        padded = torch.zeros(B, H, M, N, **make)
        if p:
            padded[:, :, : s_dmask.shape[2], : s_dmask.shape[3]] = s_dmask
        s_dmask = padded
    elif pack == "qkv":
        out, lse, s_dmask = flash_attn_qkvpacked_func(torch.stack(leaves, 2), p, **options)
    elif pack == "kv":
        out, lse, s_dmask = flash_attn_kvpacked_func(q, torch.stack((k, v), 2), p, **options)
    else:
        out, lse, s_dmask = flash_attn_func(q, k, v, p, **options)
    drop = s_dmask >= 0 if p else None
    common = dict(
        q_mask=masks[0], k_mask=masks[1], causal=cell["causal"], window=window, softcap=cell["softcap"], alibi=alibi,
        drop=drop, p=p,
    )  # fmt: skip
    exact, weights = formula(*leaves, **common)
    low = formula(*leaves, **common, upcast=False, reorder=True)[0]
    within(2, out, low, exact)
    if p:
        shown = weights > 1e-3  # S_dmask holds exp(s - max): the same up to a factor of each row
        ratio = s_dmask.abs() / weights.clamp_min(1e-30)
        largest = ratio.masked_fill(~shown, 0.0).amax(-1, keepdim=True)
        assert ((ratio - largest).abs() <= 0.05 * largest)[shown].all()
        seen = weights > 0  # -0 would count as kept
        dropped, total = ((~drop) & seen).sum().item(), seen.sum().item()
        assert abs(dropped - p * total) <= 5 * (p * (1 - p) * total) ** 0.5
    g = torch.randn_like(out)
    mine, theirs, want = (torch.autograd.grad(x, leaves, g) for x in (out, low, exact))
    for a, b, c in zip(mine, theirs, want, strict=True):
        assert a.isfinite().all()
        within(3, a, b, c)


@pytest.mark.parametrize("p", [0.0, 0.17])
@pytest.mark.parametrize("d, causal", [(64, True), (96, False), (128, True), (256, False)])
def test_race_condition(d, causal, p):
    """250 runs of 60 short batches: out, lse, dk and dv are bitwise those of the first."""
    q, k, v = (
        torch.randn(60, 239, 4, d, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)
    )
    torch.manual_seed(42)
    first = flash_attn_func(q, k, v, p, causal=causal, return_attn_probs=True)
    g = torch.randn_like(first[0])
    dq, dk, dv = torch.autograd.grad(first[0], (q, k, v), g)
    for _ in range(250):
        torch.manual_seed(42)
        out, lse, _ = flash_attn_func(q, k, v, p, causal=causal, return_attn_probs=True)
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
        dq_now, dk_now, dv_now = torch.autograd.grad(out, (q, k, v), g)
        assert torch.equal(dk_now, dk) and torch.equal(dv_now, dv)
        torch.testing.assert_close(dq_now, dq, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("d", [16, 32, 64])
@pytest.mark.parametrize("length", [1, 2, 17, 128])
def test_backward_with_large_scores(d, length):
    torch.manual_seed(0)
    q = torch.randn(2, length, 5, d, device="cuda", dtype=torch.float16) * 5
    k, v = (torch.randn(2, length, 5, d, device="cuda", dtype=torch.float16) * 3 for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True)
    exact = formula(*leaves, causal=True)[0]
    low = formula(*leaves, causal=True, upcast=False, reorder=True)[0]
    within(2, out, low, exact)
    if length == 1:
        assert torch.equal(out, v)
    g = torch.randn_like(out)
    mine, theirs, want = (torch.autograd.grad(x, leaves, g) for x in (out, low, exact))
    for a, b, c in zip(mine, theirs, want, strict=True):
        within(5, a, b, c, 1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_gradient_that_is_not_contiguous(d, causal):
    leaves = [
        torch.randn(5, 256, 2, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    g = torch.randn(256, 10, d, device="cuda", dtype=torch.bfloat16).view(256, 5, 2, d).transpose(0, 1)
    mine, want, low = (
        torch.autograd.grad(out, leaves, g)
        for out in (
            flash_attn_func(*leaves, causal=causal), formula(*leaves, causal=causal)[0],
            formula(*leaves, causal=causal, upcast=False, reorder=True)[0],
        )
    )  # fmt: skip
    for a, b, c in zip(mine, low, want, strict=True):
        within(2, a, b, c)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("d, causal", [(64, True), (96, False), (128, True), (192, False), (256, True)])
def test_deterministic(d, causal, varlen):
    q, k, v = (torch.randn(5, 239, 6, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lengths = ()
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = torch.arange(0, 6, device="cuda", dtype=torch.int32) * 239
        lengths = (cu, cu, 239, 239)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    function = flash_attn_varlen_func if varlen else flash_attn_func
    out = function(*leaves, *lengths, causal=causal, window_size=(100, 50), deterministic=True)
    g = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, g, retain_graph=True)
    for _ in range(50):
        again = torch.autograd.grad(out, leaves, g, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


CACHE = dict(
    num_splits=(1, 0), heads_k=(6, 1, 3), new=(False, True), alibi=(False, True), local=(False, True),
    causal=(False, True), whole=(False, True), interleaved=(False, True), rotary=(0.0, 0.5, 1.0), page=(None, 256, 16),
    leftpad=(False, True), indexed=(False, True), d=(59, 64, 128, 256),
    lengths=((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128)),
)  # fmt: skip


@pytest.mark.parametrize("cell", sample(40, **CACHE), ids=ids)
def test_kvcache(cell):
    """A cache call against the cache gathered, rotated and extended by hand."""
    torch.manual_seed(0)
    M, N = cell["lengths"]
    B, H, Hk, d, page = 2, 6, cell["heads_k"], cell["d"], cell["page"]
    half = dict(device="cuda", dtype=torch.float16)
    indexed = cell["indexed"] and page is None
    rows = B * 2 if indexed else B
    dim = int(cell["rotary"] * d) // 32 * 16 if cell["new"] else 0  # half of the rotated dimensions
    new_rows = M if cell["whole"] else max(1, M // 2)
    q = torch.randn(B, M, H, d, **half)
    new = torch.randn(2, B, new_rows, Hk, d, **half).unbind() if cell["new"] else (None, None)
    if page is None:
        stored = torch.randn(2, rows, N, Hk, d, **half)
        table = None
    else:
        per_row = -(-N // page)
        table = torch.randperm(per_row * B * 3, device="cuda", dtype=torch.int32)[: per_row * B].view(
            B, per_row
        )
        stored = torch.randn(2, per_row * B * 3, page, Hk, d, **half)
    index = torch.randperm(rows, device="cuda", dtype=torch.int32)[:B] if indexed else None

    def gather(x):
        if page is not None:
            return x[table.long().flatten()].view(B, -1, Hk, d)[:, :N]
        return x[index.long()] if indexed else x

    room = N - (new_rows if cell["new"] else 0)
    lengths = torch.randint(min(1, room), room + 1, (B,), dtype=torch.int32, device="cuda")
    leftpad = None
    if cell["leftpad"]:
        leftpad = torch.stack([torch.randint(0, int(n) + 1, ()) for n in lengths]).to("cuda", torch.int32)
        leftpad = leftpad.minimum((lengths - 1).clamp_min(0))
    window = window_of(cell, N)
    alibi = torch.rand(B, H, device="cuda") * 0.3 if cell["alibi"] else None
    cos = sin = None
    q_rotated, k_rotated = q, new[0]
    if dim:
        angle = torch.rand(-(-N // (page or 1)) * (page or 1), dim, device="cuda") * 6.28
        cos, sin = angle.cos().half(), angle.sin().half()
        if cell["causal"] or cell["local"]:
            q_rotated = apply_rotary_emb(q, cos, sin, cell["interleaved"], seqlen_offsets=lengths)
        else:
            heads_in_rows = q.flatten(1, 2)[:, None]  # every query at the one position of cache_seqlens
            q_rotated = apply_rotary_emb(heads_in_rows, cos, sin, cell["interleaved"], seqlen_offsets=lengths)
            q_rotated = q_rotated[:, 0].view(q.shape)
        k_rotated = apply_rotary_emb(new[0], cos, sin, cell["interleaved"], seqlen_offsets=lengths)
    keys, values = (gather(x).clone() for x in stored)
    for b in range(B if cell["new"] else 0):
        keys[b, lengths[b] : lengths[b] + new_rows] = k_rotated[b]
        values[b, lengths[b] : lengths[b] + new_rows] = new[1][b]
    ends = lengths + (new_rows if cell["new"] else 0)
    options = dict(
        k_mask=torch.arange(N, device="cuda") < ends[:, None], causal=cell["causal"], window=window, alibi=alibi,
        leftpad=leftpad,
    )  # fmt: skip
    exact = formula(q_rotated, keys, values, **options)[0]
    low = formula(q_rotated, keys, values, **options, upcast=False, reorder=True)[0]
    out = flash_attn_with_kvcache(
        q, *stored, *new, cos, sin, lengths, index, leftpad, table, causal=cell["causal"], window_size=window,
        rotary_interleaved=cell["interleaved"], alibi_slopes=alibi, num_splits=cell["num_splits"],
    )  # fmt: skip
    within(5 if cell["alibi"] else 3, out, low, exact, 1e-5)
    after = [gather(x) for x in stored]
    torch.testing.assert_close(after[0], keys, rtol=1e-3, atol=1e-3)
    assert torch.equal(after[1], values)


def test_messages():
    """The three errors whose words upstream's tests match."""
    q = torch.randn(2, 4, 64, device="cuda", dtype=torch.float16)
    pages = torch.randn(4, 256, 2, 64, device="cuda", dtype=torch.float16)
    cu = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    table = torch.arange(4, dtype=torch.int32, device="cuda").view(2, 2)
    used = torch.tensor([300, 512], dtype=torch.int32, device="cuda")
    common = (q, pages, pages, cu, cu * 512, 1, 512, 0.0, 0.125, False, -1, 0)
    default = _flash_attn_varlen_forward(*common, block_table=table, seqused_k=used)[0]
    heuristic = _flash_attn_varlen_forward(*common, block_table=table, seqused_k=used, num_splits=0)[0]
    assert torch.equal(default, heuristic)
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported"):
        _flash_attn_varlen_forward(*common, block_table=table, seqused_k=used, num_splits=2)
    dense = q[None]
    with pytest.raises(RuntimeError, match="generator` argument is no longer supported"):
        flash_attn_gpu.fwd(dense, dense, dense, None, None, 0.0, 0.1, False, -1, -1, 0.0, False, object())
