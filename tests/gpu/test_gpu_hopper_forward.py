"""The Hopper forward on the GPU: every feature against the oracle, tile boundaries, repeatability, provoked races."""

import json

import pytest
import torch

pytest.importorskip("triton")
from cases import Case, build, ids  # noqa: E402

from flash_attn.backends import hopper as backend  # noqa: E402
from flash_attn.forward import hopper_launch  # noqa: E402
from flash_attn.problem import Operands  # noqa: E402
from flash_attn.reference import attention as oracle  # noqa: E402
from flash_attn.reference import eager  # noqa: E402
from flash_attn.tuning import table  # noqa: E402
from flash_attn.utils import device  # noqa: E402
from flash_attn.utils.testing import assert_as_close_as_torch, nan_empty  # noqa: E402

info = device.info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(info is None or info.capability != (9, 0), reason="needs a Hopper GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
LONG = dict(max_q=700, max_k=900, dtype=BF16, head_dim=64)
PACKED = dict(
    batch=6, packed_q=(1, 130, 64, 300, 0, 257), packed_k=(70, 130, 0, 555, 12, 128), max_q=300, max_k=555
)
LONGER = LONG | dict(max_q=1100)  # the rule takes smaller key tiles and more warpgroups from 1024 queries on
LONGER_PACKED = PACKED | dict(packed_q=(1, 1100, 64, 300, 0, 257), max_q=1100)
CASES = [
    Case(f"{name}_{d}", **LONG | dict(head_dim=d) | mask)
    for d in (64, 128, 256)
    for name, mask in {
        "full": {}, "causal": dict(causal=True), "window": dict(window=(100, 50)), "left": dict(window=(129, -1)),
        "right": dict(window=(-1, 77)), "slide": dict(window=(200, 0)), "softcap": dict(softcap=5.0, scale=1.0),
        "sink": dict(sink=True, causal=True), "more_queries": dict(causal=True, max_q=900, max_k=300),
        "packed": PACKED, "packed_causal": PACKED | dict(causal=True),
        "packed_all": PACKED | dict(window=(40, 20), softcap=8.0, sink=True, seqused_k=(33, 130, 0, 1, 12, 127)),
        "packed_used": PACKED | dict(causal=True, seqused_q=(1, 100, 0, 300, 0, 200)),
        "used": dict(batch=3, seqused_k=(0, 900, 130), seqused_q=(700, 3, 0), causal=True),
    }.items()
] + [
    Case(f"longer_{name}_{d}", **LONGER | dict(head_dim=d) | mask)
    for d in (64, 96, 128)
    for name, mask in {
        "softcap": dict(softcap=5.0, scale=1.0), "right": dict(window=(-1, 77)), "sink": dict(sink=True, causal=True),
        "packed": LONGER_PACKED, "packed_causal": LONGER_PACKED | dict(causal=True),
        "used": dict(batch=3, seqused_k=(0, 900, 130), seqused_q=(1100, 3, 0), causal=True),
    }.items()
] + [
    Case("fp16_causal_128", **LONG | dict(head_dim=128, dtype=FP16), causal=True),
    Case("fp16_softcap_64", **LONG | dict(dtype=FP16), softcap=20.0),
    Case("mqa", **LONG, heads=8, kv_heads=1, causal=True),
    Case("mla_192_128", **LONG | dict(head_dim=192), head_dim_v=128, causal=True),
    Case("mla_packed", head_dim=192, head_dim_v=128, dtype=BF16, causal=True, **PACKED),
    *(Case(f"head_dim_{d}", **LONG | dict(head_dim=d), causal=True) for d in (8, 32, 40, 72, 80, 96, 160, 192, 224)),
    Case("head_dim_64_v128", **LONG, head_dim_v=128),
    Case("head_dim_64_v256", **LONG, head_dim_v=256, causal=True),
    Case("head_dim_256_v64", **LONG | dict(head_dim=256), head_dim_v=64),
    Case("head_dim_192_v256", **LONG | dict(head_dim=192), head_dim_v=256, window=(90, 10)),
]  # fmt: skip


def check(
    case: Case, changes: tuple = (), seed: int = 0, stretch: tuple[float, float] = (1, 1), jump: float = 1
):
    """`stretch`: factors of the first and the last key, between them linear; `jump`: a factor of the second half."""
    built = build(case, device="cuda", seed=seed)
    problem, ops = built.problem, built.operands
    if stretch != (1, 1):
        factors = torch.linspace(*stretch, ops.k.shape[1], device="cuda")[:, None, None]
        ops = ops._replace(k=(ops.k * factors).to(ops.k.dtype))
    if jump != 1:
        ops.k[:, ops.k.shape[1] // 2 :] *= jump
    with nan_empty():
        out, lse = hopper_launch.forward(problem, ops, changes)
    want, want_lse = oracle.forward(problem, ops)
    plain, plain_lse = eager.forward(problem, ops)
    assert_as_close_as_torch(out, want, plain, name="out")
    assert_as_close_as_torch(lse, want_lse, plain_lse, name="lse")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle(case):
    assert backend.supports(case.problem("cuda"), "forward") is None
    check(case)


def measured() -> list:
    """(head dim, causal, config as changes) of every measured row, each config once."""
    found = {}
    for row in table.rows():
        if row["direction"] == "hopper forward":
            key = row["problem"]["head_dim"], row["problem"]["mask"] == "causal"
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in row["config"].items()}
            found[(*key, json.dumps(config, sort_keys=True))] = (*key, tuple(config.items()))
    return [
        pytest.param(*row, id=f"{row[0]}_{'causal' if row[1] else 'full'}_{i}")
        for i, row in enumerate(found.values())
    ]


MEASURED = measured()


@pytest.mark.parametrize("head_dim, causal, config", MEASURED)
def test_every_length_around_a_tile(head_dim, causal, config):
    for n in (1, 2, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257, 385):
        for m in (1, 64, 65, 129, 193):
            case = Case(
                "x", max_q=m, max_k=n, dtype=BF16, head_dim=head_dim, causal=causal, heads=2, kv_heads=1
            )
            check(case, config, seed=n)


@pytest.mark.parametrize("stretch", [(0.1, 5), (5, 0.1)], ids=["growing", "shrinking"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_follows_scores_that_grow_along_the_keys(head_dim, causal, stretch):
    """The output is rescaled at each of many tiles of keys, or only at the first."""
    check(Case("x", **LONG | dict(head_dim=head_dim), causal=causal), stretch=stretch)


@pytest.mark.parametrize("head_dim, causal, config", MEASURED)
def test_scores_may_jump_by_more_than_an_exponential_holds(head_dim, causal, config):
    """By hundreds of powers of two from one tile of keys to the next, so that 2**difference is infinite."""
    check(Case("x", **LONG | dict(head_dim=head_dim), causal=causal), config, jump=300)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_sink_of_minus_infinity_is_no_sink(head_dim):
    """Also for the 200 rows that see no key: -inf - -inf must not make them NaN."""
    case = Case("x", **LONG | dict(head_dim=head_dim, max_q=500, max_k=300), causal=True, sink=True)
    built = build(case, device="cuda")
    sink = built.operands.sink.clone()
    sink[1:] = -torch.inf
    ops = built.operands._replace(sink=sink)
    with nan_empty():
        out, lse = hopper_launch.forward(built.problem, ops)
    want, want_lse = oracle.forward(built.problem, ops)
    plain, plain_lse = eager.forward(built.problem, ops)
    assert_as_close_as_torch(out, want, plain, name="out")
    assert_as_close_as_torch(lse, want_lse, plain_lse, name="lse")
    assert lse[:, 1:, :200].eq(-torch.inf).all() and out[:, :200].eq(0).all()


def test_many_sequences():
    """More than one round of the search for a packed tile's sequence."""
    lengths = tuple((1, 3, 17, 64, 100, 0, 130)[i % 7] for i in range(300))
    check(Case("x", batch=300, packed_q=lengths, packed_k=lengths, max_q=130, max_k=130, head_dim=64, dtype=BF16,
               causal=True))  # fmt: skip


def test_strided_and_unaligned_inputs():
    """Views of one packed tensor are read in place; what TMA cannot walk is copied, and says the same."""
    case = Case("x", max_q=200, max_k=200, heads=4, kv_heads=4, head_dim=64, dtype=BF16, causal=True)
    qkv = torch.randn(2, 200, 3, 4, 64, device="cuda", dtype=BF16)
    views = Operands(*qkv.unbind(2))
    apart = Operands(*(x.contiguous() for x in views[:3]))
    odd = Operands(*(torch.cat([x.new_empty(2, 200, 4, 1), x], -1)[..., 1:] for x in views[:3]))
    problem = case.problem("cuda")
    want = hopper_launch.forward(problem, apart)
    for ops in (views, odd):
        for got, w in zip(hopper_launch.forward(problem, ops), want, strict=True):
            assert torch.equal(got, w)


def repeated(head_dim: int, causal: bool, **changes) -> Case:
    sizes = dict(batch=4, max_q=1024, max_k=1024, heads=16, kv_heads=16) | changes
    return Case("x", head_dim=head_dim, dtype=BF16, causal=causal, **sizes)


@pytest.mark.parametrize("head_dim, causal, config", MEASURED)
def test_repeats_bitwise(head_dim, causal, config):
    built = build(repeated(head_dim, causal), device="cuda")
    want = hopper_launch.forward(built.problem, built.operands, config)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for got, w in zip(hopper_launch.forward(built.problem, built.operands, config), want, strict=True):
            different += (got != w).sum()
    assert different.item() == 0


@pytest.mark.parametrize("head_dim, causal, config", MEASURED)
def test_random_delays_change_nothing(head_dim, causal, config):
    """Sleeps before every wait of every role: a missing barrier would show."""
    built = build(repeated(head_dim, causal), device="cuda")
    want = hopper_launch.forward(built.problem, built.operands, config)
    for _ in range(5):
        got = hopper_launch.forward(built.problem, built.operands, (*config, ("DELAY", 4095)))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "changes", [{}, dict(batch=1, max_q=128, max_k=128)], ids=["tiles_drawn", "one_tile_each"]
)
def test_graph_replays_beside_eager_calls(changes):
    """A captured launch has a tile counter of its own, or needs none."""
    built = build(repeated(64, True, **changes), device="cuda")
    want, _ = hopper_launch.forward(built.problem, built.operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = hopper_launch.forward(built.problem, built.operands)
    side = torch.cuda.Stream()
    for _ in range(20):
        captured.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.replay()
        eager_out, _ = hopper_launch.forward(built.problem, built.operands)
        torch.cuda.synchronize()
        assert torch.equal(captured, want) and torch.equal(eager_out, want)
