"""The backward in one launch on a GPU, with the tiles that users get: numbers, repeatability, when it is chosen."""

import pytest
import torch

pytest.importorskip("triton")
from cases import Case, ids  # noqa: E402
from test_short_backward import run  # noqa: E402
from test_triton_backward import compare, make  # noqa: E402

from flash_attn.backends import triton as backend  # noqa: E402
from flash_attn.backward import short  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF = dict(max_q=200, max_k=250, dtype=torch.bfloat16)
CASES = [
    Case("full64", head_dim=64, **HALF),
    Case("causal128", head_dim=128, causal=True, **HALF),
    Case("window64", head_dim=64, window=(130, 9), **HALF),
    Case("fp16_80", head_dim=80, causal=True, **HALF | dict(dtype=torch.float16)),
    Case("alibi_softcap40_96", head_dim=40, head_dim_v=96, alibi="bh", softcap=20.0, **HALF),
    Case("dropout128", head_dim=128, dropout_p=0.2, causal=True, **HALF),
    Case("packed_used", batch=4, head_dim=64, causal=True, packed_q=(200, 0, 65, 1), packed_k=(250, 7, 0, 128),
         seqused_k=(200, 7, 0, 120), **HALF),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_oracle(case):
    problem, ops, out, lse, dout = make(case)
    assert short.wants(problem)
    got = run(problem, ops, out, lse, dout, config=None)
    compare(problem, ops, got, dout)
    chosen = backend.backward(problem, ops, out, lse, dout)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], chosen[:3], strict=True))
    for _ in range(10):
        again = run(problem, ops, out, lse, dout, config=None)
        assert all(torch.equal(x, y) for x, y in zip(got[:3], again[:3], strict=True))


def test_a_new_length_compiles_nothing():
    from flash_attn.utils.launcher import compilations

    def step(M, N):
        problem, ops, out, lse, dout = make(CASES[1]._replace(max_q=M, max_k=N))
        assert short.wants(problem)
        run(problem, ops, out, lse, dout, config=None)

    step(200, 250)
    before = compilations()
    for M, N in [(2, 2), (17, 200), (130, 129), (64, 256)]:
        step(M, N)
    assert compilations() == before
