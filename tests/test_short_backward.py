"""The backward in one launch: the cases of the two kernels that it joins, and when it runs."""

import os
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
import cases  # noqa: E402
from test_triton_backward import DEVICE, SMALL, WIDE, compare, make, poisoned  # noqa: E402

from flash_attn.backward import launch, short  # noqa: E402
from flash_attn.tuning import backward as tuning  # noqa: E402

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
        reason="needs the interpreter or a GPU",
    ),
    # Triton's interpreter takes loop bounds from arrays of one element
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def run(problem, ops, out, lse, dout, dlse=None, config=SMALL, way=short):
    into = poisoned(ops)
    with tuning.override(config, config) if config else nullcontext():
        got = way.backward(problem, ops, out, lse, dout, dlse, into)
    assert all(x is y for x, y in zip(got, into, strict=False))
    return got


@pytest.mark.parametrize("case", [c for c in cases.BACKWARD_CASES if not c.sink], ids=cases.ids)
def test_equals_the_oracle(case):
    problem, ops, out, lse, dout = make(case)
    config = WIDE if case in cases.PAIRWISE or case.id == "several_tiles" else SMALL
    compare(problem, ops, run(problem, ops, out, lse, dout, config=config), dout)


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_gradient_of_lse(name):
    problem, ops, out, lse, dout = make(next(c for c in cases.BACKWARD_CASES if c.id == name))
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    compare(problem, ops, run(problem, ops, out, lse, dout, dlse), dout, dlse)


def test_equals_two_launches_to_the_bit():
    """The same products in the same order."""
    problem, ops, out, lse, dout = make(cases.Case("tiles", batch=1, max_q=50, max_k=70, causal=True))
    one, two = (run(problem, ops, out, lse, dout, way=way) for way in (short, launch))
    assert all(torch.equal(x, y) for x, y in zip(one[:3], two[:3], strict=True))
