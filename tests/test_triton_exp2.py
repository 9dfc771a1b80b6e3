"""tile/softmax.py's exp2 by multiplications, and how far a soft cap bounds its argument."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.problem import Problem  # noqa: E402
from flash_attn.tile import score, softmax  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter or a GPU"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
exp2_mixed, pivot = softmax.exp2_mixed, score.pivot


@triton.jit
def _powers(out, x, outer, N: tl.constexpr, MIXED: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, exp2_mixed(tl.load(x + at), outer, pivot(outer), MIXED))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cap", [0.001, 1.0, 30.0, 50.0, 51.0])
def test_powers_of_two(cap, mixed):
    outer = score.factors(0.1, cap)[1]
    x = torch.rand(16, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[0, :4] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    out = torch.full_like(x, float("nan"), device=DEVICE)
    _powers[(1,)](out, x.to(DEVICE), outer, 256, mixed)
    outer = float(torch.tensor(outer))  # as fp32, which the kernel gets
    exact = x.double() * outer - int(min(outer, 100 - outer) // 1)
    assert exact.min() >= -100 and exact.max() < 49
    # rounding an argument of 64 and more to fp32 changes the power by 2.7e-6, and the interpreter rounds fma twice
    assert (out.cpu().double() / exact.exp2() - 1).abs().max() < 6e-6


def test_not_a_number_remains():
    x = torch.full((16, 16), float("nan"), device=DEVICE)
    out = torch.zeros_like(x)
    _powers[(1,)](out, x, 10.0, 16, True)
    assert out.isnan().all()


def test_what_is_bounded():
    def bounded(dtype=torch.bfloat16, softcap=50.0, **options):
        return score.bounded(Problem(1, 1, 1, 8, 8, 64, 64, dtype, softcap=softcap, **options))

    assert bounded() and bounded(torch.float32) and bounded(softcap=51.0)
    assert not any([bounded(torch.float16), bounded(softcap=0.0), bounded(softcap=51.1)])
    assert not any([bounded(alibi=True), bounded(sink=True)])
