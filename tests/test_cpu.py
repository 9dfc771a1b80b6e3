"""The CPU backend against the oracle: every case, every type, and each property it promises."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import BACKWARD_CASES, CASES, Case, build, ids

from flash_attn.backends import cpu, empty
from flash_attn.cpu import backward as tiled_backward
from flash_attn.cpu import forward as tiled_forward
from flash_attn.cpu import tile, torch_flash
from flash_attn.reference import attention as oracle
from flash_attn.utils.testing import (
    assert_as_close_as_torch,
    assert_gradients_as_close_as_torch,
    check_backend,
    nan_empty,
    strided_like,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EXACT = dict(rtol=1e-9, atol=1e-11)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few elements, so that small cases have many, ragged ones included."""
    monkeypatch.setattr(tile, "ROWS", 8)
    monkeypatch.setattr(tile, "NARROWEST", 2)
    monkeypatch.setattr(tile, "KEYS", 4)
    monkeypatch.setattr(tile, "MAX_KEYS", 8)
    monkeypatch.setattr(tile, "ELEMENTS", 96)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_as_close_as_torch(case, dtype):
    problem, ops, *_ = build(case, dtype=dtype)
    check_backend(cpu, problem, ops, seed=DTYPES.index(dtype))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_exact_in_fp64_whatever_the_tiles(case, small_tiles):
    problem, ops, *_ = build(case, dtype=torch.float64)
    want, want_lse = oracle.forward(problem, ops)
    with nan_empty():
        out, lse = tiled_forward.forward(problem, ops)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)
    if cpu.supports(problem, "backward"):
        return
    dout, dlse = torch.randn_like(want), torch.randn_like(lse).masked_fill(lse.isinf(), 0.0)
    with nan_empty():
        got = cpu.backward(problem, ops, out, lse, dout, dlse)
    for g, w in zip(got, oracle.backward(problem, ops, want, want_lse, dout, dlse), strict=True):
        if w is not None:
            torch.testing.assert_close(g, w.to(g.dtype), **EXACT if g.dtype == w.dtype else {})


LENGTHS = [(1, 1), (1, 700), (700, 1), (257, 513), (520, 260)]


@pytest.mark.parametrize("max_q, max_k", LENGTHS)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (130, 40), (0, 0)])
def test_lengths_around_the_real_tiles(max_q, max_k, window):
    case = Case("tiles", batch=1, max_q=max_q, max_k=max_k, heads=2, kv_heads=1, window=window, head_dim=8)
    problem, ops, *_ = build(case)
    check_backend(cpu, problem, ops)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_torch_kernel_and_ours_agree(kv_heads, causal, dtype):
    problem, ops, *_ = build(Case("both", max_q=70, max_k=70, kv_heads=kv_heads, causal=causal), dtype=dtype)
    assert torch_flash.computes(problem)
    want = oracle.forward(problem, ops)
    mine, theirs = tiled_forward.forward(problem, ops), torch_flash.forward(problem, ops)
    for a, b, w in zip(mine, theirs, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and b.is_contiguous()
        step = torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=4 * step)
    dout = torch.randn_like(mine[0])
    into = strided_like(ops[:3])
    theirs = torch_flash.backward(problem, ops, *mine, dout, into)
    assert all(g.data_ptr() == x.data_ptr() for g, x in zip(theirs, into, strict=False))
    for grads in (theirs, tiled_backward.backward(problem, ops, *mine, dout)):
        if dtype == torch.float64:  # the oracle's own precision: nothing to measure an error against
            exact = oracle.backward(problem, ops, *want, dout)
            torch.testing.assert_close(tuple(grads[:3]), tuple(exact[:3]), **EXACT)
        else:
            assert_gradients_as_close_as_torch(grads, problem, ops, dout)


@pytest.mark.parametrize(
    "change",
    [dict(causal=True, max_k=24), dict(window=(4, 0)), dict(softcap=1.0), dict(alibi="h"), dict(sink=True),
     dict(dropout_p=0.1), dict(head_dim_v=8), dict(seqused_k=(3, 23)), dict(max_q=0)],
    ids=str,
)  # fmt: skip
def test_torch_kernel_gets_only_what_it_computes(change):
    assert torch_flash.computes(Case("plain", max_q=23).problem())
    assert not torch_flash.computes(Case("other", max_q=23)._replace(**change).problem())


@pytest.mark.parametrize("case", [Case("full", max_q=64, max_k=64), *BACKWARD_CASES[-6:]], ids=ids)
def test_every_result_is_reproducible_to_the_bit(case):
    problem, ops, *_ = build(case, dtype=torch.bfloat16)

    def run():
        out, lse = cpu.forward(problem, ops)
        return out, lse, *cpu.backward(problem, ops, out, lse, torch.ones_like(out))

    for a, b in zip(run(), run(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_num_splits_changes_nothing():
    problem, ops, *_ = build(Case("splits", seqused_k=(5, 23)))
    for a, b in zip(cpu.forward(problem, ops), cpu.forward(problem._replace(num_splits=4), ops), strict=True):
        assert torch.equal(a, b)


def test_large_logits_do_not_overflow():
    problem, ops, *_ = build(Case("large", scale=1e4, causal=True, max_q=30, max_k=20), dtype=torch.float64)
    out, lse = tiled_forward.forward(problem, ops)
    want, want_lse = oracle.forward(problem, ops)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)


def test_sink_of_minus_infinity_is_no_sink():
    problem, ops, *_ = build(Case("sink", sink=True, causal=True, max_q=30, max_k=20), dtype=torch.float64)
    out, lse = cpu.forward(problem, ops._replace(sink=torch.full_like(ops.sink, -math.inf)))
    want, want_lse = tiled_forward.forward(problem._replace(sink=False), ops._replace(sink=None))
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)


@pytest.mark.parametrize("sign", [-1, 1])
def test_backward_takes_either_infinity(sign):
    problem, ops, *_ = build(Case("empty", causal=True, max_q=30, max_k=20), dtype=torch.float64)
    out, lse = cpu.forward(problem, ops)
    assert lse[..., :10].isneginf().all() and lse[..., 10:].isfinite().all()
    dout = torch.randn_like(out)
    got = cpu.backward(problem, ops, out, lse.masked_fill(lse.isinf(), sign * math.inf), dout)
    want = oracle.backward(problem, ops, out, lse, dout)
    torch.testing.assert_close(tuple(got[:3]), tuple(want[:3]), **EXACT)


def test_decode_of_a_long_cache():
    case = Case("decode", batch=3, max_q=1, max_k=9000, kv_heads=1, seqused_k=(9000, 4097, 9000))
    problem, ops, *_ = build(case, dtype=torch.bfloat16)
    check_backend(cpu, problem, ops)


# Peak resident memory beyond the inputs in MB, as the kernel counts it: nothing can hide from it.
MEMORY = """
    import sys, torch
    from pathlib import Path
    from flash_attn.backends import cpu, empty
    from flash_attn.problem import Operands, Problem

    S, H, D, naive = (int(x) for x in sys.argv[1:])
    def status(field):
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024
    def step(S):
        q, k, v, dout = (torch.randn(1, S, H, D) for _ in range(4))
        p = Problem(1, H, H, S, S, D, D, torch.float32, right=0, scale=D**-0.5)
        before = status("VmRSS")
        if naive:
            (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)
        else:
            out, lse = cpu.forward(p, Operands(q, k, v))
            cpu.backward(p, Operands(q, k, v), out, lse, dout)
        return status("VmHWM") - before
    step(64)  # libraries load
    print(step(S))
"""


def peak_extra_mb(S: int, H: int, D: int, naive: bool = False) -> float:
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), *map(str, (S, H, D, int(naive)))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_the_score_matrix():
    S, H, D = 4096, 4, 32
    scores = S * S * H * 4 / 2**20  # 256 MB, once
    assert peak_extra_mb(S, H, D) < scores / 4
    assert peak_extra_mb(S, H, D, naive=True) > scores


def test_check_rejects_a_wrong_result():
    """The checker itself: off by a little more than twice the error of torch, unwritten, or infinite."""
    want = torch.linspace(-1, 1, 100, dtype=torch.float64)
    near = want.float() + 1e-4
    assert_as_close_as_torch(want.float() + 1.9e-4, want, near)
    for wrong in (want.float() + 2.1e-4, want.float().index_fill(0, torch.tensor(3), math.nan),
                  want.float().index_fill(0, torch.tensor(3), math.inf)):  # fmt: skip
        with pytest.raises(AssertionError, match="exceeds"):
            assert_as_close_as_torch(wrong, want, near)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_close_as_torch(near[:50], want, near)


def test_unwritten_memory_shows():
    with nan_empty():
        made = [torch.empty(3), torch.ones(3).new_empty(2), torch.empty_like(torch.ones(2)),
                torch.empty_strided((2, 2), (2, 1))]  # fmt: skip
        assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert all(x.isnan().all() for x in made)
    assert torch.zeros(3).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("N", [7, 40])
@pytest.mark.parametrize("fields", [{}, dict(causal=True, kv_heads=4), dict(softcap=3.0)], ids=str)
def test_a_nan_stays_one(fields, N, where, dtype):
    """torch's kernel gave 0, and lse 0, to a query of NaN that met fewer than 16 keys."""
    case = Case("nan", max_q=N, max_k=N, dtype=dtype, **fields)
    problem, ops, *_ = build(case)
    getattr(ops, where)[0, 2, 0] = torch.nan
    out, lse = cpu.forward(problem, ops)
    want, want_lse = oracle.forward(problem, ops)
    assert want.isnan().any() and torch.equal(out.isnan(), want.isnan())
    assert torch.equal(lse.isnan(), want_lse.isnan())
    grads = cpu.backward(problem, ops, out, lse, torch.ones_like(out))
    exact = oracle.backward(problem, ops, want, want_lse, torch.ones_like(out))
    assert torch.equal(grads.dq.isnan(), exact.dq.isnan()) and grads.dk.isnan().any()


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_k=0), dict(max_k=0, seqused_q=(3, 17)), dict(packed_q=(4, 0, 7), packed_k=(0, 0, 0), batch=3),
        dict(packed_q=(4, 7), packed_k=(0, 0), seqused_q=(2, 7)),
    ],
    ids=str,
)  # fmt: skip
def test_without_a_key_only_rows_of_a_sequence_have_the_sink(fields):
    """Rows behind the last sequence or the used ones had the sink as their lse, and gave it a gradient."""
    problem, ops, *_ = build(Case("no keys", sink=True, **fields))
    ops = ops._replace(k=ops.k[..., :0, :, :], v=ops.v[..., :0, :, :])
    out, lse = empty.forward(problem, ops)
    want, want_lse = oracle.forward(problem, ops)
    assert torch.equal(out.double(), want)
    torch.testing.assert_close(lse.double(), want_lse)
    dlse = torch.randn_like(lse)
    got = empty.backward(problem, ops, out, lse, torch.ones_like(out), dlse)
    exact = oracle.backward(problem, ops, want, want_lse, torch.ones_like(out), dlse)
    torch.testing.assert_close(got.dsink, exact.dsink.float())
