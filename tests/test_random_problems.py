"""Random problems over all features at once against the oracle: what no list of cases thought of.

Derandomised, so that a failure in CI is a failure here. HYPOTHESIS_PROFILE=explore looks further.
"""

import os

import pytest
import torch
from cases import Case, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn.attention import attention
from flash_attn.backends import cpu
from flash_attn.cpu import tile
from flash_attn.reference import attention as oracle
from flash_attn.utils.testing import check_backend, nan_empty

quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "ci", max_examples=150, derandomize=True, deadline=None, suppress_health_check=quiet
)
settings.register_profile("explore", max_examples=5000, deadline=None, suppress_health_check=quiet)
profile = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

STORAGE = ["dense", "packed", "used", "packed_used", "cache", "batch_idx", "paged"]


@st.composite
def problems(draw) -> Case:
    """Every combination that `cases.build` can make."""
    batch, Hk = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    page_size = draw(st.integers(1, 5))
    max_q, max_k = draw(st.integers(1, 20)), draw(st.integers(1, 6)) * page_size
    storage = draw(st.sampled_from(STORAGE))

    def lengths(longest, least=0):
        return tuple(draw(st.lists(st.integers(least, longest), min_size=batch, max_size=batch)))

    fields: dict = {}
    if storage in ("packed", "packed_used"):
        fields = dict(packed_q=lengths(max_q), packed_k=lengths(max_k))
    if storage == "packed_used":
        fields |= dict(seqused_k=tuple(draw(st.integers(0, n)) for n in fields["packed_k"]))
    if storage == "used":
        fields |= dict(seqused_q=lengths(max_q))
    if storage in ("used", "cache", "batch_idx", "paged"):
        fields |= dict(seqused_k=lengths(max_k))
    if storage in ("cache", "paged") and draw(st.booleans()):
        fields |= dict(leftpad=tuple(draw(st.integers(0, n)) for n in fields["seqused_k"]))
    if storage == "batch_idx":
        fields |= dict(batch_idx=tuple(draw(st.permutations(range(batch + 2)))[:batch]))
    if storage == "paged":
        fields |= dict(page_size=page_size)
    side = st.integers(-1, 12)
    D = draw(st.integers(1, 20))
    return Case(
        "random", batch, max_q, max_k, Hk * draw(st.integers(1, 3)), Hk, D,
        head_dim_v=draw(st.sampled_from([D, D, draw(st.integers(1, 20))])),
        causal=draw(st.booleans()), window=(draw(side), draw(side)),
        scale=draw(st.sampled_from([None, 0.0, -0.6, 2.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.7, 30.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])),
        alibi=draw(st.sampled_from(["", "h", "bh"])), sink=draw(st.booleans()),
        **fields,
    )  # fmt: skip


@pytest.fixture(params=["real", "small"])
def tiles(request, monkeypatch):
    if request.param == "small":
        for name, size in dict(ROWS=6, KEYS=4, MAX_KEYS=8, ELEMENTS=48, NARROWEST=1).items():
            monkeypatch.setattr(tile, name, size)


@settings(profile)
@given(case=problems(), seed=st.integers(0, 5))
def test_exact_in_fp64(tiles, case, seed):
    problem, ops, *_ = build(case, dtype=torch.float64, seed=seed)
    leaves = [x.clone().requires_grad_() for x in (ops.q, ops.k, ops.v)]
    if ops.sink is not None:
        leaves.append(ops.sink.double().requires_grad_())
        ops = ops._replace(sink=leaves[3])
    want, want_lse = oracle.forward(problem, ops)
    with nan_empty():
        out, lse = attention(problem, ops._replace(**dict(zip(("q", "k", "v"), leaves, strict=False))))
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-11)
    if cpu.supports(problem, "backward"):
        return
    dout, dlse = torch.randn_like(want), torch.randn_like(lse).masked_fill(lse.isinf(), 0.0)
    with nan_empty():
        got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for g, w in zip(got, oracle.backward(problem, ops, want, want_lse, dout, dlse), strict=False):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


@settings(profile, max_examples=profile.max_examples // 2)
@given(case=problems(), seed=st.integers(0, 5), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_as_close_as_torch_in_16_bits(case, seed, dtype):
    problem, ops, *_ = build(case, dtype=dtype, seed=seed)
    check_backend(cpu, problem, ops, seed)
