"""The FlagGems backend with the real FlagGems: right results or a reason, on named cases and public calls."""

import cases
import pytest
import torch

import flash_attn
from flash_attn import flash_attn_flaggems_backend as backend
from flash_attn import use_backend
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch, check_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # FlagGems warns while it is imported
]


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("flag_gems")
    assert backend.probe("cuda") is None


LARGER = [
    cases.Case("large", max_q=300, max_k=700, head_dim=128, heads=8, causal=True),
    cases.Case("large_left", max_q=300, max_k=700, head_dim=64, window=(100, -1)),
    cases.Case("large_right", max_q=700, max_k=300, head_dim=64, window=(-1, 40)),
    cases.Case("large_dim_96", max_q=300, max_k=300, head_dim=96, causal=True),
    cases.Case("large_dim_192", max_q=300, max_k=300, head_dim=192, causal=True),
    cases.Case("large_packed", batch=3, max_q=500, max_k=500, head_dim=128, packed_q=(500, 0, 131),
               packed_k=(500, 7, 260), causal=True),
    cases.Case("large_decode", batch=3, max_q=1, max_k=1024, heads=8, head_dim=128, seqused_k=(1000, 33, 512),
               page_size=64),
    cases.Case("large_cache", batch=3, max_q=4, max_k=1024, heads=8, head_dim=128, seqused_k=(1000, 33, 512),
               causal=True),
]  # fmt: skip


@pytest.mark.parametrize("case", cases.CASES + LARGER, ids=cases.ids)
def test_named_cases(case):
    built = cases.build(case, device="cuda", dtype=torch.bfloat16)
    reason = backend.supports(built.problem, "forward")
    if reason is not None:
        pytest.skip(reason)
    check_backend(backend, built.problem, built.operands)


def test_public_calls_train_on_it():
    q, k, v = (
        torch.randn(2, 200, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)
    )
    results = []
    dout = torch.randn_like(q)
    for name in ("flaggems", "triton"):
        with use_backend(name):
            out = flash_attn.flash_attn_func(q, k, v, causal=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_cache_call():
    case = cases.Case("decode", batch=3, max_q=1, max_k=512, heads=8, head_dim=64, seqused_k=(500, 33, 256))
    built = cases.build(case, device="cuda", dtype=torch.bfloat16)
    with use_backend("flaggems"):
        out = flash_attn.flash_attn_with_kvcache(**built.kwargs)
    want, plain = (m.forward(built.problem, built.operands)[0] for m in (oracle, eager))
    assert_as_close_as_torch(out, want, plain)
