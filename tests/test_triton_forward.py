"""The Triton forward kernel against the fp64 oracle: every feature and all pairs of features, on tiny tiles.

Runs on the interpreter (TRITON_INTERPRET=1) or a GPU. Outputs start as NaN, and so does all memory that no row may
read, so an unwritten or leaked element shows.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
from accuracy import assert_as_close_as_torch  # noqa: E402
from cases import CASES, SINGLE, Case, build, ids  # noqa: E402

from flash_attn.forward import launch  # noqa: E402
from flash_attn.reference import attention, eager  # noqa: E402
from flash_attn.tuning import table  # noqa: E402
from flash_attn.tuning.config import FwdConfig  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter or a GPU"
    ),
    # Triton's interpreter takes loop bounds from arrays of one element
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL, WIDE = FwdConfig(16, 16, 4, 1), FwdConfig(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    allocate = launch.empty_outputs

    def poisoned(problem, q):
        out, lse = allocate(problem, q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(launch, "empty_outputs", poisoned)


def check(problem, ops, config=SMALL):
    """Error of out and lse at most twice that of PyTorch in the same precision, and one rounding of the result."""
    with table.override(config):
        got = launch.forward(problem, ops)
    want, plain = attention.forward(problem, ops), eager.forward(problem, ops)
    assert got[0].dtype == problem.dtype and got[1].dtype == torch.float32
    for x, w, p in zip(got, want, plain, strict=True):
        assert_as_close_as_torch(x, w, p, want[1])
    return got


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle(case):
    """On small tiles; pairs of features on wider ones, for the interpreter's speed."""
    problem, ops, *_ = build(case, DEVICE)
    check(problem, ops, SMALL if case in SINGLE and case.max_k < 100 else WIDE)


# Triton 3.6's interpreter multiplies bfloat16 as integers, so those wait for a GPU
@pytest.mark.parametrize(
    "dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("name", ["causal", "window", "alibi", "softcap_dropout", "packed", "paged_page_1"])
def test_half_precision(name, dtype):
    case = next(c for c in CASES if c.id == name)
    problem, ops, *_ = build(case, DEVICE, dtype=dtype)
    check(problem, ops)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    check(*build(Case("scale", scale=scale, causal=True), DEVICE)[:2])


def test_strides_are_free_but_for_the_last_dimension():
    problem, ops, *_ = build(Case("strided", causal=True), DEVICE)
    parts = [
        torch.randn(2, 3, n, h, 48, device=DEVICE)[:, 1, :, :, 20:36] for n, h in ((17, 4), (23, 2), (23, 2))
    ]
    parts[0] = parts[0].transpose(1, 2).contiguous().transpose(1, 2)
    check(problem, ops._replace(q=parts[0], k=parts[1], v=parts[2]))


def test_page_that_holds_whole_tiles_is_read_tile_by_tile():
    case = Case("paged", max_q=5, max_k=64, seqused_k=(40, 64), page_size=32, causal=True)
    problem, ops, *_ = build(case, DEVICE)
    assert launch.features(problem, SMALL).page_tiles
    check(problem, ops)


@pytest.mark.parametrize(
    "config", [FwdConfig(16, 32, 4, 1), FwdConfig(64, 16, 4, 1), FwdConfig(16, 16, 4, 1, split=True)]
)
@pytest.mark.parametrize("name", ["causal_more_queries", "window", "packed"])
def test_tile_sizes_do_not_matter(name, config):
    problem, ops, *_ = build(next(c for c in CASES if c.id == name), DEVICE)
    check(problem, ops, config)


def test_sections_cover_every_head_and_block(monkeypatch):
    """Heads per section that do not divide the number of heads leave a narrower last section."""
    problem, ops, *_ = build(Case("sections", batch=1, heads=3, kv_heads=3, max_q=40, max_k=9), DEVICE)
    for width in (1, 2, 100):
        monkeypatch.setattr(launch, "section", lambda problem, w=width: w)
        launch._prepared.clear()
        check(problem, ops)


def test_rows_that_nobody_owns_are_written():
    """Behind cu_seqlens[-1] out is 0 and lse -inf, several tiles of them too."""
    problem, ops, *_ = build(Case("tail", batch=2, packed_q=(3, 5), packed_k=(4, 6)), DEVICE)
    tail = torch.full((50, *ops.q.shape[1:]), torch.nan, device=DEVICE)
    check(problem, ops._replace(q=torch.cat([ops.q, tail])))


@pytest.mark.parametrize("split", [False, True])
def test_sink_of_minus_infinity_is_no_sink(split):
    """Also for the 10 rows that see no key: -inf - -inf must not make them NaN."""
    case = Case("sink", sink=True, causal=True, max_q=30, max_k=20)
    problem, ops, *_ = build(case, DEVICE)
    ops.sink[1:] = -torch.inf
    got = check(problem, ops, SMALL._replace(split=split))
    assert got[1][:, 1:, :10].eq(-torch.inf).all() and got[0][:, :10].eq(0).all()


def test_many_sequences():
    """More than two steps of the search for a tile's sequence look at, 32 each."""
    lengths = tuple(i % 3 for i in range(70))
    case = Case(
        "many", batch=70, heads=1, kv_heads=1, max_q=2, max_k=2, packed_q=lengths, packed_k=lengths[::-1]
    )
    check(*build(case, DEVICE)[:2])


@pytest.mark.parametrize("name", ["head_dim_1", "head_dim_80", "window", "packed", "paged", "sink"])
def test_rows_that_start_anywhere_are_copied(name):
    """The kernel was wrong on an H200 for bfloat16 rows of 66 bytes, so GPUs only ever get rows of 16 bytes."""
    case = next(c for c in CASES if c.id == name)._replace(head_dim_v=13)
    problem, ops, *_ = build(case, DEVICE, dtype=torch.float16)
    assert not launch.aligned(ops)
    with table.override(SMALL):
        out, lse = launch.realigned(problem, ops)
    want, want_lse = attention.forward(problem, ops)
    plain, _ = eager.forward(problem, ops)
    assert out.is_contiguous() and out.shape == want.shape
    assert_as_close_as_torch(out, want, plain)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())


def test_alignment_is_of_every_row_of_q_k_and_v():
    _, ops, *_ = build(Case("x", head_dim=16), DEVICE, dtype=torch.float16)
    assert launch.aligned(ops)
    for name in "qkv":
        x = getattr(ops, name)
        shifted = torch.zeros(*x.shape[:-1], 24, dtype=x.dtype, device=DEVICE)[..., 4:20]
        narrow = torch.zeros(*x.shape[:-1], 20, dtype=x.dtype, device=DEVICE)[..., :16]
        assert not launch.aligned(ops._replace(**{name: shifted}))
        assert not launch.aligned(ops._replace(**{name: narrow}))
