"""The Triton forward on a GPU at real sizes, with the tiles that users get: numbers, repeatability, far offsets."""

import pytest
import torch

pytest.importorskip("triton")
from accuracy import assert_as_close_as_torch  # noqa: E402
from cases import Case, build, ids  # noqa: E402

from flash_attn.forward import launch  # noqa: E402
from flash_attn.problem import Operands, Problem  # noqa: E402
from flash_attn.reference import attention, eager  # noqa: E402
from flash_attn.utils import launcher  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF, LONG = torch.bfloat16, dict(max_q=700, max_k=900, dtype=torch.bfloat16, head_dim=64)
CASES = [
    Case("full64", **LONG),
    Case("causal128", **LONG | dict(head_dim=128), causal=True),
    Case("causal_more_queries", max_q=900, max_k=300, dtype=HALF, head_dim=128, causal=True),
    Case("window256", **LONG | dict(head_dim=256), window=(200, 90)),
    Case("left_only", **LONG, window=(130, -1)),
    Case("fp16_80", **LONG | dict(head_dim=80, dtype=torch.float16), causal=True),
    Case("head_dim_40", **LONG | dict(head_dim=40)),
    Case("head_dim_96", **LONG | dict(head_dim=96), causal=True),
    Case("head_dim_224", **LONG | dict(head_dim=224), causal=True),
    Case("head_dim_33", **LONG | dict(head_dim=33), causal=True),
    Case("mla192_128", **LONG | dict(head_dim=192), head_dim_v=128, causal=True),
    Case("head_dim_512", max_q=200, max_k=300, dtype=HALF, head_dim=512, causal=True),
    Case("fp32", max_q=300, max_k=400, head_dim=128, causal=True),
    Case("mqa", **LONG, heads=8, kv_heads=1),
    Case("softcap", **LONG, softcap=20.0, causal=True),
    Case("softcap_fp16", **LONG | dict(dtype=torch.float16), softcap=20.0),
    Case("softcap_small", **LONG | dict(dtype=torch.float16), softcap=1.5),
    Case("alibi", **LONG | dict(head_dim=128), alibi="bh", causal=True),
    Case("dropout", **LONG | dict(head_dim=128), dropout_p=0.17, causal=True),
    Case("dropout_softcap", **LONG, dropout_p=0.3, softcap=15.0),
    Case("sink", **LONG, sink=True, window=(128, 0)),
    Case("used", **LONG, seqused_q=(3, 650), seqused_k=(900, 130), causal=True),
    Case("leftpad", **LONG, leftpad=(130, 0), seqused_k=(870, 700), causal=True),
    Case("batch_idx", **LONG, seqused_k=(870, 700), batch_idx=(3, 1), causal=True),
    Case("packed", batch=5, max_q=700, max_k=900, dtype=HALF, head_dim=128, causal=True,
         packed_q=(700, 0, 1, 129, 512), packed_k=(900, 7, 0, 128, 600)),
    Case("packed_all", batch=4, **LONG, window=(300, 20), alibi="h", dropout_p=0.1, sink=True,
         packed_q=(700, 0, 65, 129), packed_k=(900, 7, 300, 128), seqused_k=(800, 7, 0, 120)),
    Case("paged_16", **LONG | dict(max_k=960), seqused_k=(950, 300), page_size=16, causal=True),
    Case("paged_64", **LONG | dict(max_k=960), seqused_k=(950, 300), page_size=64, causal=True),
    Case("paged_12", **LONG | dict(max_k=960), seqused_k=(950, 300), page_size=12, causal=True),
    Case("paged_256", **LONG | dict(max_k=1024, head_dim=128), seqused_k=(950, 300), page_size=256, causal=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    allocate = launch.empty_outputs

    def poisoned(problem, q):
        out, lse = allocate(problem, q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(launch, "empty_outputs", poisoned)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle_and_itself(case):
    """Error at most twice that of PyTorch in the same precision, and one rounding; ten runs agree in every bit."""
    problem, ops, *_ = build(case, "cuda")
    got = launch.forward(problem, ops)
    want, plain = attention.forward(problem, ops), eager.forward(problem, ops)
    for x, w, p in zip(got, want, plain, strict=True):
        assert_as_close_as_torch(x, w, p, want[1])
    for _ in range(10):
        for x, y in zip(got, launch.forward(problem, ops), strict=True):
            assert torch.equal(x, y)


def test_offsets_beyond_two_to_the_31():
    """k, v and out of 2^31 + elements: the last sequence of a batch lies beyond 32-bit offsets, and so do late rows."""
    B, M, N, H, D = 3, 64, 70000, 128, 128  # k: 3.4e9 elements, 1.1e9 in one sequence
    q = torch.randn(B, M, H, D, dtype=HALF, device="cuda")
    k, v = (torch.randn(B, N, H, D, dtype=HALF, device="cuda") for _ in range(2))
    assert k.numel() > 2**31
    problem = Problem(B, H, H, M, N, D, D, HALF, device="cuda", left=300, right=0, scale=D**-0.5)
    out, lse = launch.forward(problem, Operands(q, k, v))
    heads, tail = slice(H - 2, H), slice(N - M - 300, N)
    part = Operands(q[2:, :, heads], k[2:, tail, heads], v[2:, tail, heads])
    small = problem._replace(batch=1, heads=2, kv_heads=2, max_k=M + 300)
    want, want_lse = attention.forward(small, part)
    assert (out[2:, :, heads].double() - want).norm() <= 1e-2 * want.norm()
    assert (lse[2:, heads].double() - want_lse).norm() <= 1e-5 * want_lse.norm()


def test_a_new_length_stride_or_scale_compiles_nothing():
    def run(B, M, N, H, scale, causal=True):
        q, k, v = (torch.randn(B, n, H, 64, dtype=HALF, device="cuda") for n in (M, N, N))
        p = Problem(B, H, H, M, N, 64, 64, HALF, device="cuda", right=0 if causal else None, scale=scale)
        return p, launch.forward(p, Operands(q, k, v))

    # warm every tile that the table gives to lengths in this range
    for n in (100, 300, 1000, 3000):
        run(1, n, n, 1, 0.1)
    before = launcher.compilations()
    for n in (1, 16, 17, 128, 333, 1024, 2049):
        run(1 + n % 3, n, n + 16 * (n % 2), 1 + n % 5, 1.0 / n)
    assert launcher.compilations() == before


def test_runs_on_the_current_stream_and_in_a_graph():
    problem, ops, *_ = build(CASES[1], "cuda")
    want, _ = launch.forward(problem, ops)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = launch.forward(problem, ops)
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_float32_follows_the_precision_that_torch_is_set_to():
    problem, ops, *_ = build(next(c for c in CASES if c.id == "fp32"), "cuda")
    want, _ = attention.forward(problem, ops)
    setting = torch.backends.cuda.matmul
    before, errors = setting.fp32_precision, {}
    try:
        for asked in ("none", "ieee", "tf32"):
            setting.fp32_precision = asked
            out, _ = launch.forward(problem, ops)
            errors[asked] = ((out.double() - want).norm() / want.norm()).item()
    finally:
        setting.fp32_precision = before
    assert max(errors["none"], errors["ieee"]) < 1e-6 < 1e-5 < errors["tf32"] < 2e-3
    assert errors["none"] != errors["ieee"]


def test_a_tile_too_large_for_the_device_is_replaced():
    from flash_attn.tuning import table
    from flash_attn.tuning.config import FwdConfig

    problem, ops, *_ = build(CASES[1], "cuda")
    want, _ = launch.forward(problem, ops)
    with table.override(FwdConfig(128, 256, 8, 4)):  # 600 KiB of shared memory
        got, _ = launch.forward(problem, ops)
    assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()
