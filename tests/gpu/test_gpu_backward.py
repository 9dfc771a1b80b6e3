"""The Triton backward on a GPU at real sizes, with the tiles that users get: numbers, repeatability, far offsets."""

import pytest
import torch

pytest.importorskip("triton")
from cases import Case, ids  # noqa: E402
from test_triton_backward import check, compare, make, run  # noqa: E402

from flash_attn.backward import launch  # noqa: E402
from flash_attn.problem import Operands, Problem  # noqa: E402
from flash_attn.tuning import backward as tuning  # noqa: E402
from flash_attn.tuning import table  # noqa: E402
from flash_attn.tuning.config import BwdConfig  # noqa: E402

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
    Case("mla192_128", **LONG | dict(head_dim=192), head_dim_v=128, causal=True),
    Case("head_dim_512", max_q=200, max_k=300, dtype=HALF, head_dim=512, causal=True),
    Case("fp32", max_q=300, max_k=400, head_dim=128, causal=True),
    Case("mqa", **LONG, heads=8, kv_heads=1),
    Case("softcap", **LONG, softcap=20.0, causal=True),
    Case("alibi", **LONG | dict(head_dim=128), alibi="bh", causal=True),
    Case("dropout", **LONG | dict(head_dim=128), dropout_p=0.17, causal=True),
    Case("dropout_softcap", **LONG, dropout_p=0.3, softcap=15.0),
    Case("sink", **LONG, sink=True, window=(128, 0)),
    Case(
        "packed", batch=5, max_q=700, max_k=900, dtype=HALF, head_dim=128, causal=True,
        packed_q=(700, 0, 1, 129, 512), packed_k=(900, 7, 0, 128, 600),
    ),
    Case(
        "packed_all", batch=4, **LONG, window=(300, 20), alibi="h", dropout_p=0.1,
        packed_q=(700, 0, 65, 129), packed_k=(900, 7, 300, 128), seqused_k=(800, 7, 0, 120), sink=True,
    ),
    Case("used", batch=3, **LONG, seqused_q=(700, 3, 0), seqused_k=(11, 900, 500)),
    Case("leftpad", **LONG | dict(max_q=300), seqused_k=(500, 900), leftpad=(77, 0), causal=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle(case):
    check(case, config=None)


def measured_tiles():
    """Each (head dims, dK/dV tile, dQ tile) that the table can choose on this kind of GPU."""
    seen = set()
    for row in table.rows():
        if row["direction"] == "dkdv":
            key = row["problem"]
            for other in table.rows():
                if other["direction"] == "dq" and other["problem"] == key:
                    tiles = BwdConfig(**row["config"]), BwdConfig(**other["config"])
                    seen.add((key["head_dim"], key["head_dim_v"], *tiles))
    return sorted(seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D, Dv, dkdv, dq", measured_tiles(), ids=str)
def test_measured_tiles(D, Dv, dkdv, dq, causal):
    """Every row of the table gives the right gradients, with dropout in both orientations too."""
    for extra in ({}, dict(dropout_p=0.2), dict(window=(200, 60))):
        case = Case("row", **LONG | dict(head_dim=D), head_dim_v=Dv, causal=causal, **extra)
        problem, ops, out, lse, dout = make(case)
        with tuning.override(dkdv, dq):
            compare(problem, ops, run(problem, ops, out, lse, dout, config=None), dout)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["full64", "causal128", "window256", "mqa", "dropout", "packed", "sink"])
def test_repeats_bitwise(name, deterministic):
    """dk, dv and dsink always; dq when asked to be deterministic."""
    case = next(c for c in CASES if c.id == name)._replace(deterministic=deterministic)
    problem, ops, out, lse, dout = make(case)
    first = run(problem, ops, out, lse, dout, config=None)
    for _ in range(20):
        again = run(problem, ops, out, lse, dout, config=None)
        for field, x, y in zip(first._fields, first, again, strict=True):
            if x is not None and (field != "dq" or deterministic):
                assert torch.equal(x, y), field


def test_offsets_beyond_2_31():
    """A head stride of 2^30 elements: the last of 4 heads starts 3 * 2^30 elements in, past 2^31."""
    M, D, far = 130, 64, 2**30
    if torch.cuda.mem_get_info()[0] < 2 * (3 * far + M * D) + 2**30:
        pytest.skip("needs 7 GB of free GPU memory")
    storage = torch.zeros(3 * far + M * D, dtype=torch.float16, device="cuda")
    spread = storage.as_strided((1, M, 4, D), (0, D, far, 1))
    near = [torch.randn(1, M, 4, D, device="cuda").half() for _ in range(5)]
    lse = torch.full((1, 4, M), 5.0, device="cuda")
    problem = Problem(1, 4, 4, M, M, D, D, torch.float16, device="cuda", right=0, scale=0.125)
    q, k, v, out, dout = near
    want = launch.backward(problem, Operands(q, k, v), out, lse, dout)
    for place in range(3):  # q, k and v in turn live far out, and so does the gradient
        spread.copy_(near[place])
        ops = Operands(*(spread if i == place else near[i] for i in range(3)))
        got = launch.backward(problem, ops, out, lse, dout)
        assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3], strict=True))
        into = tuple(spread if i == place else None for i in range(3))
        got = launch.backward(problem, Operands(q, k, v), out, lse, dout, into=into)
        assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3], strict=True))


def test_a_new_length_compiles_nothing():
    from flash_attn.utils.launcher import compilations

    def step(M, N):
        problem = Problem(1, 2, 2, M, N, 64, 64, torch.float16, device="cuda", right=0, scale=0.125)
        q, k, v, out, dout = (torch.randn(1, n, 2, 64, device="cuda").half() for n in (M, N, N, M, M))
        launch.backward(problem, Operands(q, k, v), out, torch.zeros(1, 2, M, device="cuda"), dout)

    step(300, 300)
    before = compilations()
    for M, N in [(1, 1), (16, 16), (17, 300), (256, 1024), (1000, 999)]:
        step(M, N)
    assert compilations() == before
