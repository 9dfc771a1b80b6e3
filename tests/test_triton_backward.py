"""The Triton backward kernels against the fp64 oracle: every feature and all pairs of features, on tiny tiles.

Runs on the interpreter (TRITON_INTERPRET=1) or a GPU. Gradients are written into tensors full of NaN, and all memory
that no row may read is NaN too (dout included), so an unwritten or leaked element shows.
"""

import os
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
from cases import BACKWARD_CASES, PAIRWISE, Case, build, ids  # noqa: E402

from flash_attn.backward import launch  # noqa: E402
from flash_attn.problem import Gradients  # noqa: E402
from flash_attn.reference import attention, eager  # noqa: E402
from flash_attn.reference.layout import sequences  # noqa: E402
from flash_attn.tuning import backward as tuning  # noqa: E402
from flash_attn.tuning.config import BwdConfig  # noqa: E402
from flash_attn.utils.launcher import SharedMemoryError  # noqa: E402

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
SMALL, WIDE = BwdConfig(16, 16, 4, 1), BwdConfig(32, 16, 4, 1)
LEFTPAD = [
    Case("leftpad", batch=3, max_k=24, seqused_k=(9, 24, 13), leftpad=(2, 0, 13), causal=True),
    Case("leftpad_only", batch=2, max_k=21, leftpad=(5, 0), dropout_p=0.3, head_dim_v=8),
]


def make(case, seed=0, dtype=None):
    """(problem, operands, out, lse, dout) of a forward in fp64, rounded; dout is NaN in rows no sequence owns."""
    problem, ops, *_ = build(case, DEVICE, seed, dtype)
    out, lse = attention.forward(problem, ops)
    dout = torch.full(out.shape, torch.nan, dtype=problem.dtype, device=DEVICE)
    rows = dout if problem.varlen_q else dout.flatten(0, 1)
    generator = torch.Generator().manual_seed(seed + 1)
    for seq in sequences(problem, ops):
        fresh = torch.randn(len(seq.q_rows), *rows.shape[1:], generator=generator)
        rows[seq.q_rows] = fresh.to(rows)
    return problem, ops, out.to(problem.dtype), lse.float(), dout


def poisoned(ops):
    """NaN in the shapes of dq, dk and dv, as views of wider tensors."""
    return tuple(x.new_full((*x.shape[:-1], x.shape[-1] + 8), torch.nan)[..., : x.shape[-1]] for x in ops[:3])


def run(problem, ops, out, lse, dout, dlse=None, config=SMALL):
    into = poisoned(ops)
    with tuning.override(config, config) if config else nullcontext():
        got = launch.backward(problem, ops, out, lse, dout, dlse, into)
    assert all(x is y for x, y in zip(got, into, strict=False))
    return got


def compare(problem, ops, got: Gradients, dout, dlse=None):
    """Each error at most twice that of PyTorch in the same precision, and one rounding.

    In fp32 PyTorch gets two tries, of which the worse counts: autograd, and the formula of these kernels, which
    starts from an lse rounded to fp32 and so has relative errors of eps * lse in P that autograd's softmax has not.
    The kernels round lse once more, to base 2. The rounding of dq and dk is that of delta, which dS = P (dP - delta)
    subtracts: with one key they are 0.
    """
    out, lse = attention.forward(problem, ops)
    clean = dout.nan_to_num(0.0)  # the oracle reads no unowned row, autograd multiplies them with 0
    want = attention.backward(problem, ops, out, lse, clean, dlse)
    plain = [eager.backward(problem, ops, clean, dlse)]
    if problem.dtype is torch.float32:
        plain.append(attention.backward(problem, ops, out.float(), lse.float(), clean, dlse, torch.float32))
    delta = (out * clean).sum(-1).abs().max().item() * abs(problem.scale)
    lse2 = max(1.0, lse[lse.isfinite()].abs().max().item() * 1.4427) if lse.isfinite().any() else 1.0
    unrounded = [delta * x.nan_to_num(0.0).abs().max().item() if x.numel() else 0.0 for x in (ops.k, ops.q)]
    for i, (name, x, y) in enumerate(zip(Gradients._fields, got, want, strict=True)):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape and x.isfinite().all(), name
        if y.numel():
            errors = [(z.double() - y).abs().max().item() for z in (x, *(p[i] for p in plain))]
            size = max(y.abs().max().item(), unrounded[i] if i < 2 else 0.0)
            rounding = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps * lse2)
            budget = 2 * max(errors[1:]) + rounding * size
            assert errors[0] <= budget, f"{name}: error {errors[0]:.3g}, budget {budget:.3g}"


def check(case, seed=0, dtype=None, config=SMALL):
    problem, ops, out, lse, dout = make(case, seed, dtype)
    got = run(problem, ops, out, lse, dout, config=config)
    compare(problem, ops, got, dout)
    return got


@pytest.mark.parametrize("case", BACKWARD_CASES + LEFTPAD, ids=ids)
def test_equals_the_oracle(case):
    """On small tiles; pairs of features on wider ones, for the interpreter's speed."""
    check(case, config=WIDE if case in PAIRWISE or case.id == "several_tiles" else SMALL)


# Triton 3.6's interpreter multiplies bfloat16 as integers, so those wait for a GPU
@pytest.mark.parametrize(
    "dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("name", ["causal", "alibi", "softcap_dropout", "packed", "sink"])
def test_half_precision(name, dtype):
    check(next(c for c in BACKWARD_CASES if c.id == name), dtype=dtype)


ROWS_FIRST = SMALL._replace(rows_first=True)


@pytest.mark.parametrize(
    "name", ["causal_more_queries", "window", "alibi", "softcap_dropout", "packed", "cache"]
)
def test_rows_first(name):
    """The other orientation of attn_bwd_dkdv."""
    check(next(c for c in BACKWARD_CASES if c.id == name), config=ROWS_FIRST)


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("dims", [(192, 128), (200, 130), (320, 7)])
def test_head_dims_of_two_tiles(dims, rows_first):
    case = Case("dims", max_q=5, max_k=19, causal=True, head_dim=dims[0], head_dim_v=dims[1])
    check(case, config=SMALL._replace(rows_first=rows_first))


@pytest.mark.parametrize(
    "config", [BwdConfig(32, 16, 4, 1), BwdConfig(16, 32, 4, 1, rows_first=True)], ids=str
)
def test_tiles_of_any_shape(config):
    check(Case("tiles", max_q=41, max_k=53, window=(9, 6), dropout_p=0.2, heads=2, kv_heads=1), config=config)


def test_rows_that_nobody_owns_get_zeros():
    """Behind cu_seqlens[-1] dq, dk and dv are 0, several tiles of them too."""
    problem, ops, out, lse, dout = make(Case("tail", batch=2, packed_q=(3, 5), packed_k=(4, 6)))

    def longer(x, fill=torch.nan):
        return torch.cat([x, x.new_full((50, *x.shape[1:]), fill)])

    ops = ops._replace(q=longer(ops.q), k=longer(ops.k), v=longer(ops.v))
    lse = torch.cat([lse, lse.new_full((lse.shape[0], 50), -torch.inf)], 1)
    dout = longer(dout)
    compare(problem, ops, run(problem, ops, longer(out, 0.0), lse, dout), dout)


def test_rows_far_apart():
    """Offsets inside a tile have 32 bits; where rows lie further apart, the kernels read a copy."""
    problem, ops, out, lse, dout = make(
        Case("far", max_q=3, max_k=4, head_dim=8, heads=1, kv_heads=1, batch=1)
    )
    wanted = run(problem, ops, out, lse, dout)
    memory = torch.empty(3 * 2**24, device=DEVICE)
    far = memory.as_strided(ops.q.shape, (0, 2**24, 8, 1)).copy_(ops.q)
    got = run(problem, ops._replace(q=far), out, lse, dout)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], wanted[:3], strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_of_lse(packed):
    """dlse joins delta; sink's gradient has a term of its own from it."""
    lengths = dict(packed_q=(7, 0, 20), packed_k=(11, 4, 24), batch=3) if packed else {}
    case = Case("dlse", causal=True, sink=True, max_q=20, max_k=24, **lengths)
    problem, ops, out, lse, dout = make(case)
    dlse = torch.randn(lse.shape, device=DEVICE)
    seen = lse.isfinite()
    got = run(problem, ops, out, lse, dout, dlse)
    compare(problem, ops, got, dout, torch.where(seen, dlse, 0.0))


@pytest.mark.parametrize("infinity", [-torch.inf, torch.inf])
def test_rows_without_keys_take_either_infinity(infinity):
    case = Case("hidden", causal=True, max_q=29, max_k=13)
    problem, ops, out, lse, dout = make(case)
    assert (lse == -torch.inf).any()
    got = run(problem, ops, out, lse.masked_fill(lse == -torch.inf, infinity), dout)
    compare(problem, ops, got, dout)


def test_uses_the_lse_and_out_it_is_given():
    """Half of the keys, with out and lse of all of them: the halves' dq add up (what ring attention does)."""
    problem, ops, out, lse, dout = make(Case("whole", max_q=20, max_k=32))
    whole = run(problem, ops, out, lse, dout)
    half = problem._replace(max_k=16)
    parts = []
    for keys in (slice(0, 16), slice(16, 32)):
        part = ops._replace(k=ops.k[:, keys], v=ops.v[:, keys])
        parts.append(run(half, part, out, lse, dout))
    compare(problem, ops, whole, dout)
    torch.testing.assert_close(parts[0].dq + parts[1].dq, whole.dq, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([p.dk for p in parts], 1), whole.dk, rtol=1e-5, atol=1e-6)


def test_allocates_what_it_is_not_given_and_takes_any_stride():
    problem, ops, out, lse, dout = make(Case("strides", max_q=19, max_k=25, head_dim=24, head_dim_v=8))
    wanted = run(problem, ops, out, lse, dout)
    spread = ops._replace(
        q=torch.stack([ops.q, ops.q], 3)[:, :, :, 1],
        k=ops.k.transpose(1, 2).contiguous().transpose(1, 2),
        v=torch.cat([ops.v, ops.v], -1)[..., 8:],
    )
    columns = dout.mT.contiguous().mT  # last dimension not contiguous
    out = torch.cat([out, out], 1)[:, : out.shape[1]]
    with tuning.override(SMALL, SMALL):
        got = launch.backward(problem, spread, out, lse.mT.contiguous().mT, columns)
    for x, y, source in zip(got[:3], wanted[:3], ops[:3], strict=True):
        assert torch.equal(x, y) and x.is_contiguous() and x.dtype == source.dtype


def test_smaller_tiles_where_the_first_do_not_fit(monkeypatch):
    """A device with less shared memory than thought: the next smaller tile runs, never a failed launch."""
    case = Case("small", max_q=40, max_k=40, causal=True, sink=True)
    problem, ops, out, lse, dout = make(case)
    really, tried = launch.launch, []

    def launch_small(kernel, grid, args, constants, *rest):
        tiling = constants["T"]
        tried.append((tiling.block_m, tiling.block_n))
        if tiling.block_m > 16:
            raise SharedMemoryError("too big")
        really(kernel, grid, args, constants, *rest)

    monkeypatch.setattr(launch, "launch", launch_small)
    got = run(problem, ops, out, lse, dout, config=BwdConfig(64, 32, 4, 2))
    assert tried == [(64, 32), (64, 32), (32, 32), (16, 16), (16, 32)]
    compare(problem, ops, got, dout)


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(page_size=16), "paged"),
        (dict(batch_idx=True), "cache_batch_idx"),
        (dict(head_dim=520), "head_dim"),
    ],
)
def test_refuses_by_name(fields, word):
    problem = Case("refused").problem()._replace(**fields)
    assert word in launch.supports(problem)
