"""The Hopper backward on the GPU: every feature against the oracle, tile boundaries, repeatability, output views."""

import pytest
import torch

pytest.importorskip("triton")
from cases import Case, build, ids  # noqa: E402

from flash_attn.backward import hopper_launch  # noqa: E402
from flash_attn.problem import Operands  # noqa: E402
from flash_attn.reference import attention as oracle  # noqa: E402
from flash_attn.utils import device  # noqa: E402
from flash_attn.utils.testing import (  # noqa: E402
    assert_as_close_as_torch,
    assert_gradients_as_close_as_torch,
    max_error,
    nan_empty,
)

info = device.info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(info is None or info.capability != (9, 0), reason="needs a Hopper GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
LONG = dict(max_q=500, max_k=700, dtype=BF16, head_dim=64)
PACKED = dict(
    batch=6, packed_q=(1, 130, 64, 300, 0, 257), packed_k=(70, 130, 0, 555, 12, 128), max_q=300, max_k=555
)
FEATURES = {
    "full": {}, "causal": dict(causal=True), "window": dict(window=(100, 50)), "left": dict(window=(129, -1)),
    "right": dict(window=(-1, 77)), "slide": dict(window=(200, 0)), "softcap": dict(softcap=5.0, scale=1.0),
    "sink": dict(sink=True, causal=True), "more_queries": dict(causal=True, max_q=700, max_k=300),
    "packed": PACKED, "packed_causal": PACKED | dict(causal=True),
    "packed_all": PACKED | dict(window=(40, 20), softcap=8.0, sink=True, seqused_k=(33, 130, 0, 1, 12, 127)),
    "packed_used": PACKED | dict(causal=True, seqused_q=(1, 100, 0, 300, 0, 200)),
    "used": dict(batch=3, seqused_k=(0, 700, 130), seqused_q=(500, 3, 0), causal=True),
}  # fmt: skip
CASES = [
    Case(f"{name}_{d}", **LONG | dict(head_dim=d) | what) for d in (64, 128, 256) for name, what in FEATURES.items()
] + [
    Case(f"ordered_{name}_{d}", **LONG | dict(head_dim=d, deterministic=True) | FEATURES[name])
    for d in (64, 128, 256) for name in ("full", "causal", "slide", "left", "packed", "packed_causal", "used")
] + [
    Case("fp16_causal_128", **LONG | dict(head_dim=128, dtype=FP16), causal=True),
    Case("fp16_256", **LONG | dict(head_dim=256, dtype=FP16)),
    *(Case(f"long_{name}_64", **LONG | dict(max_q=2300, max_k=2400) | what) for name, what in (
        ("causal", dict(causal=True)), ("slide", dict(window=(700, 0))),
        ("ordered", dict(causal=True, deterministic=True)),
    )),
    Case("mqa", **LONG, heads=8, kv_heads=1, causal=True),
    # 14 pairs in groups of 8: the last group is of another width
    *(Case(f"odd_groups_{d}", batch=7, heads=6, kv_heads=2, max_q=300, max_k=390, head_dim=d, dtype=BF16, causal=True)
      for d in (64, 128, 256)),
    # of the 128 queries of a program of dQ only the second half sees a key
    Case("half_a_tile_without_keys", **LONG | dict(head_dim=256, max_q=700, max_k=252), causal=True),
    Case("mla_192_128", **LONG | dict(head_dim=192), head_dim_v=128, causal=True),
    Case("mla_packed", head_dim=192, head_dim_v=128, dtype=BF16, causal=True, **PACKED),
    *(Case(f"head_dim_{d}", **LONG | dict(head_dim=d), causal=True) for d in (40, 72, 96, 160, 192, 224)),
    Case("head_dim_64_v128", **LONG, head_dim_v=128),
    Case("head_dim_64_v256", **LONG, head_dim_v=256, causal=True),
    Case("head_dim_256_v64", **LONG | dict(head_dim=256), head_dim_v=64),
    Case("head_dim_192_v256", **LONG | dict(head_dim=192), head_dim_v=256, window=(90, 10)),
]  # fmt: skip


def make(case: Case, seed: int = 0):
    built = build(case, device="cuda", seed=seed)
    p, ops = built.problem, built.operands
    out, lse = oracle.forward(p, ops)
    dout = torch.randn(out.shape, device="cuda").to(p.dtype)
    return p, ops, out.to(p.dtype), lse.float(), dout


def check(case: Case, seed: int = 0, dlse: bool = False) -> None:
    p, ops, out, lse, dout = make(case, seed)
    grad_lse = torch.randn(lse.shape, device="cuda") if dlse else None
    with nan_empty():
        got = hopper_launch.backward(p, ops, out, lse, dout, grad_lse)
    if p.sink:
        got = got._replace(dsink=check_dsink(got.dsink, p, ops, out, lse, dout, grad_lse))
    assert_gradients_as_close_as_torch(got, p, ops, dout, grad_lse)


def check_dsink(got, p, ops, out, lse, dout, dlse):
    """-sum of exp(sink - lse) * delta over rows, from the 16-bit `out` that the backward is given.

    PyTorch evaluates the same in fp32. What rounding `out` changes is 10^4 times as large, and more than twice the
    error of autograd (which has no `out` to round) in one of ten draws, whoever computes delta from `out`.
    Returns the gradient that belongs to an `out` that is not rounded.
    """

    def terms(dtype):
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1).movedim(-1, 0 if p.varlen_q else 1)
        delta = delta - (0 if dlse is None else dlse.to(dtype))
        return torch.where(lse.isinf(), 0.0, (ops.sink.to(dtype).view(-1, 1) - lse.to(dtype)).exp() * delta)

    rows = 1 if p.varlen_q else (0, 2)
    exact = terms(torch.float64)
    step = torch.finfo(torch.float32).eps * exact.abs().sum(rows).max().item()  # one rounding of each summand
    assert_as_close_as_torch(got, -exact.sum(rows), -terms(torch.float32).sum(rows), name="dsink", step=step)
    return oracle.backward(p, ops, *oracle.forward(p, ops), dout, dlse).dsink


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle(case):
    check(case)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradient_of_lse(head_dim):
    check(Case("x", **LONG | dict(head_dim=head_dim), causal=True), dlse=True)
    check(Case("x", **LONG | dict(head_dim=head_dim) | PACKED, sink=True), dlse=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_length_around_a_tile(head_dim, causal):
    for n in (2, 63, 64, 65, 127, 128, 129, 193, 257):
        for m in (1, 63, 64, 65, 128, 129, 257):
            if causal and n <= m:
                continue  # its last rows see one key, see `test_a_single_key`
            check(
                Case(
                    "x", max_q=m, max_k=n, dtype=BF16, head_dim=head_dim, causal=causal, heads=2, kv_heads=1
                ),
                seed=n,
            )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_single_key(head_dim):
    """P is 1, so dS = dP - delta is exactly 0; two fp32 sums of the same products may differ by their rounding."""
    p, ops, out, lse, dout = make(Case("x", max_q=70, max_k=1, dtype=BF16, head_dim=head_dim))
    got = hopper_launch.backward(p, ops, out, lse, dout)
    products = (dout.double() * out.double()).abs().sum(-1).max().item()
    rounding = head_dim * torch.finfo(torch.float32).eps * products
    assert got.dq.abs().max() <= rounding * ops.k.abs().max()
    assert got.dk.abs().max() <= p.max_q * p.group * rounding * ops.q.abs().max()
    want = oracle.backward(p, ops, *oracle.forward(p, ops), dout)
    assert max_error(got.dv, want.dv) <= torch.finfo(BF16).eps * want.dv.abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sums_of_dq_zeroed_by_earlier_programs(head_dim, causal):
    case = Case(
        "x",
        batch=125,
        max_q=200,
        max_k=200,
        heads=8,
        kv_heads=8,
        head_dim=head_dim,
        dtype=BF16,
        causal=causal,
    )
    assert hopper_launch.plan(case.problem("cuda")).ahead < 1000
    check(case)
    check(case._replace(deterministic=True, batch=480, heads=2, kv_heads=1))
    check(case._replace(packed_q=(200, 1, 130, 0) * 31 + (5,), packed_k=(70, 200, 130, 9) * 31 + (6,)))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_random_delays_change_nothing(head_dim, causal, ordered, monkeypatch):
    case = Case(
        "x", max_q=900, max_k=1000, head_dim=head_dim, dtype=BF16, causal=causal, deterministic=ordered
    )
    p, ops, out, lse, dout = make(case)
    want = hopper_launch.backward(p, ops, out, lse, dout)
    late = hopper_launch.plan(p, hopper_launch.schedule(p)._replace(DELAY=0xFFF))
    monkeypatch.setattr(hopper_launch, "plan", lambda *_: late)
    for _ in range(50):
        got = hopper_launch.backward(p, ops, out, lse, dout)
        assert torch.equal(got.dk, want.dk) and torch.equal(got.dv, want.dv)
        assert torch.equal(got.dq, want.dq) or not (ordered or head_dim == 256)
    assert_gradients_as_close_as_torch(got, p, ops, dout)


@pytest.mark.parametrize("what", [
    dict(max_q=512, max_k=500), dict(max_q=900, max_k=1000, causal=True), dict(max_q=900, max_k=1000, window=(200, 60)),
    PACKED | dict(causal=True),
], ids=["full", "causal", "window", "packed"])  # fmt: skip
def test_short_sequences_agree_in_all_runs(what, monkeypatch):
    """Two programs a processor (`hopper_single.py`): many runs at full speed, then some with random delays."""
    p, ops, out, lse, dout = make(
        Case("x", heads=8, kv_heads=8, head_dim=64, dtype=BF16, **{"batch": 3} | what)
    )
    assert hopper_launch.schedule(p).SINGLE
    first = hopper_launch.backward(p, ops, out, lse, dout)
    assert_gradients_as_close_as_torch(first, p, ops, dout)
    different = torch.zeros(2, dtype=torch.int64, device="cuda")

    def compare(times):
        nonlocal different
        for _ in range(times):
            again = hopper_launch.backward(p, ops, out, lse, dout)
            different += torch.stack([(a != b).sum() for a, b in zip(again[1:3], first[1:3], strict=True)])
        assert_gradients_as_close_as_torch(again, p, ops, dout)

    compare(500)
    late = hopper_launch.plan(p, hopper_launch.schedule(p)._replace(DELAY=0xFFF))
    monkeypatch.setattr(hopper_launch, "plan", lambda *_: late)
    compare(50)
    assert different.tolist() == [0, 0]


@pytest.mark.parametrize(
    "form",
    ["packed", "packed_causal", "packed_used", "packed_all", "used", "slide", "left", "window", "right"],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_ordered_sums_of_every_form_agree(head_dim, form, monkeypatch):
    """Who waits for whom differs by mask and lengths; a turn that is never passed on would hang."""
    p, ops, out, lse, dout = make(
        Case("x", **LONG | dict(head_dim=head_dim, deterministic=True) | FEATURES[form]), seed=1
    )
    first = hopper_launch.backward(p, ops, out, lse, dout)
    different = torch.zeros(3, dtype=torch.int64, device="cuda")

    def compare(times):
        nonlocal different
        for _ in range(times):
            again = hopper_launch.backward(p, ops, out, lse, dout)
            different += torch.stack([(a != b).sum() for a, b in zip(again[:3], first[:3], strict=True)])

    compare(120)
    late = hopper_launch.plan(p, hopper_launch.schedule(p)._replace(DELAY=0xFFF))
    monkeypatch.setattr(hopper_launch, "plan", lambda *_: late)
    compare(25)
    assert different.tolist() == [0, 0, 0]


def test_both_infinities_of_lse_mean_a_row_without_keys():
    p, ops, out, lse, dout = make(Case("x", max_q=300, max_k=100, dtype=BF16, head_dim=128, causal=True))
    assert (lse == -torch.inf).any()
    got = hopper_launch.backward(p, ops, out, lse, dout)
    same = hopper_launch.backward(p, ops, out, torch.where(lse == -torch.inf, torch.inf, lse), dout)
    assert torch.equal(got.dk, same.dk) and torch.equal(got.dv, same.dv)
    assert (got.dq[:, :200] == 0).all() and (same.dq[:, :200] == 0).all()


def test_writes_into_views_and_reads_what_tma_cannot():
    case = Case("x", max_q=256, max_k=256, heads=4, kv_heads=4, head_dim=64, dtype=BF16, deterministic=True)
    p, ops, out, lse, dout = make(case)
    want = hopper_launch.backward(p, ops, out, lse, dout)
    dqkv = torch.full((2, 256, 3, 4, 64), torch.nan, device="cuda", dtype=BF16)
    got = hopper_launch.backward(p, ops, out, lse, dout, into=tuple(dqkv.unbind(2)))
    odd = tuple(
        torch.full((2, 256, 4, 68), torch.nan, device="cuda", dtype=BF16)[..., 3:67] for _ in range(3)
    )
    hopper_launch.backward(p, ops, out, lse, dout, into=odd)
    unaligned = []
    for x in (*ops[:3], out, dout):
        wide = torch.full((*x.shape[:-1], 68), torch.nan, device="cuda", dtype=BF16)
        wide[..., 3:67] = x
        unaligned.append(wide[..., 3:67])
    q, k, v, out, dout = unaligned
    moved = hopper_launch.backward(p, Operands(q, k, v), out, lse, dout)
    for i in range(3):
        assert got[i].data_ptr() == dqkv[:, :, i].data_ptr()
        assert torch.equal(dqkv[:, :, i], want[i])
        assert torch.equal(odd[i], want[i])
        assert torch.equal(moved[i], want[i])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_thousand_runs_agree(head_dim, causal, ordered):
    size, kv_heads = (1152, 8) if ordered else (1100, 4)
    case = Case("x", batch=2, max_q=size, max_k=size, heads=8, kv_heads=kv_heads, head_dim=head_dim, dtype=BF16,
                causal=causal, deterministic=ordered)  # fmt: skip
    p, ops, out, lse, dout = make(case)
    first = hopper_launch.backward(p, ops, out, lse, dout)
    different = torch.zeros(3, dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = hopper_launch.backward(p, ops, out, lse, dout)
        different += torch.stack([(a != b).sum() for a, b in zip(again[:3], first[:3], strict=True)])
    assert different[1:].tolist() == [0, 0]
    if ordered or head_dim == 256:  # no sums over programs there
        assert different[0].item() == 0


def test_can_be_captured_in_a_graph():
    p, ops, out, lse, dout = make(
        Case("x", max_q=512, max_k=512, kv_heads=4, head_dim=128, dtype=BF16, causal=True, deterministic=True)
    )
    want = hopper_launch.backward(p, ops, out, lse, dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = hopper_launch.backward(p, ops, out, lse, dout)
    for x in got[:3]:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
