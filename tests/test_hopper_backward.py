"""The Hopper backward without a GPU: what it refuses, how it walks over tiles, and what ptxas makes of it."""

import os
import types

import pytest
import torch

triton = pytest.importorskip("triton")
from cases import Case, build  # noqa: E402
from sass import inspect  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from flash_attn.backends import hopper as backend  # noqa: E402
from flash_attn.backward import hopper_launch, hopper_tiles  # noqa: E402
from flash_attn.backward.hopper_launch import Features  # noqa: E402
from flash_attn.dispatch import use_backend  # noqa: E402
from flash_attn.reference import attention as oracle  # noqa: E402
from flash_attn.utils import device, launcher  # noqa: E402
from flash_attn.utils.testing import nan_empty  # noqa: E402

HALF = dict(dtype=torch.bfloat16, heads=4, kv_heads=2, max_q=300, max_k=500, head_dim=64)
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on"),
]


@pytest.fixture(autouse=True)
def _h200():
    with device.assume(device.KNOWN["h200"]):
        yield


def problem(**changes):
    return Case("x", **HALF | changes).problem("cuda")


def test_runs_what_it_was_built_for():
    for changes in (
        {}, dict(causal=True), dict(window=(9, 5)), dict(softcap=5.0, sink=True), dict(dtype=torch.float16),
        dict(packed_q=(3, 4), packed_k=(7, 2)), dict(seqused_k=(4, 5)), dict(head_dim=192, head_dim_v=128),
        dict(kv_heads=1), dict(deterministic=True), dict(deterministic=True, causal=True, head_dim=128),
        dict(deterministic=True, packed_q=(3, 4), packed_k=(7, 2)), dict(deterministic=True, window=(9, 5)),
        dict(deterministic=True, causal=True, head_dim=256),
    ):  # fmt: skip
        with use_backend(
            "hopper"
        ):  # unforced, it leaves short problems to one launch of the portable kernels
            assert backend.supports(problem(**changes), "backward") is None


def test_leaves_short_problems_to_one_launch():
    small = dict(max_q=128, max_k=128, heads=8, kv_heads=8, batch=1)
    for changes in (
        small,
        small | dict(max_q=512, max_k=512),
        small | dict(packed_q=(3, 4), packed_k=(7, 2)),
    ):
        assert "three launches" in backend.supports(problem(**changes), "backward")
        with use_backend("hopper"):
            assert backend.supports(problem(**changes), "backward") is None
    for changes in (
        small | dict(max_q=1024, max_k=1024), small | dict(batch=64), small | dict(sink=True),
        small | dict(head_dim=256), small | dict(max_q=512, max_k=512, kv_heads=1),
        small | dict(max_q=512, max_k=512, batch=2, head_dim=128),
    ):  # fmt: skip
        assert backend.supports(problem(**changes), "backward") is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=torch.float32), "float32"),
        (dict(head_dim=264), "256"),
        (dict(head_dim=60), "multiple"),
        (dict(head_dim=32), "32"),
        (dict(dropout_p=0.1), "dropout"),
        (dict(alibi="h"), "ALiBi"),
        (dict(page_size=16), "paged"),
        (dict(leftpad=(1, 2)), "left-padded"),
        (dict(batch_idx=(1, 0)), "cache_batch_idx"),
        (dict(scale=-1.0), "positive"),
        (dict(max_q=0), "no queries"),
        (dict(batch=70_000), "65535"),
    ],
)
def test_says_why_it_refuses(changes, reason):
    assert reason in hopper_launch.supports(problem(**changes))


def test_every_head_dim_fits_its_padded_tile():
    for d in range(40, 257, 8):
        for dv in range(40, 257, 8):
            T = hopper_launch.schedule(problem(head_dim=d, head_dim_v=dv))
            assert max(d, T.DV) <= T.D and dv <= T.DV
            assert T.DV == 64 or dv > T.DV // 2


def test_a_packed_sequence_has_padded_tiles_of_its_own():
    lengths = (1, 300, 64, 0, 129, 128)
    p = problem(batch=len(lengths), packed_q=lengths, packed_k=lengths)
    end, start = 0, 0
    for b, n in enumerate(lengths):
        first = start // 64 + b  # as `hopper_tiles.place` has it
        assert first >= end
        end, start = first + -(-n // 64), start + n
    assert end <= hopper_launch.query_tiles(p, start, 64)


def test_work_on_the_host_in_a_group_fits_the_cache():
    p = problem(causal=True, batch=64)
    width = hopper_launch.group_width(p)
    assert 1 < width <= p.batch * p.kv_heads
    assert width * p.max_q * 128 * 2 * p.group <= 16 << 20
    assert hopper_launch.group_width(problem()) == 1
    p = problem(causal=True, batch=64, head_dim=256)
    width = hopper_launch.dq_group_width(p)
    assert p.group < width <= p.batch * p.heads
    assert width // p.group * p.max_k * 512 * 2 <= 16 << 20
    assert hopper_launch.dq_group_width(problem(head_dim=256)) == 1


def plain(jitted, **others):
    """The integer arithmetic of a device function, run by Python."""
    stand_in = types.SimpleNamespace(
        minimum=min, maximum=max, constexpr=None, cdiv=lambda a, b: -(-a // b),
        where=lambda condition, x, y: x if condition else y,
        umulhi=lambda x, y: ((x & 0xFFFFFFFF) * (y & 0xFFFFFFFF)) >> 32,
    )  # fmt: skip
    return types.FunctionType(jitted.fn.__code__, {**jitted.fn.__globals__, "gl": stand_in, **others})


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 8, 12, 64, 96, 127, 641, 2**16 + 1, 2**30 - 1, 2**31 - 1])
def test_divides_by_multiplying(d):
    quotient, by = plain(hopper_tiles.quotient), hopper_launch.divider(d)
    assert all(-(2**31) <= n < 2**31 for n in by)
    near = [k * d + e for k in (0, 1, 2, 1000, (2**31 - 1) // d) for e in (-1, 0, 1)]
    for x in (*near, 2**31 - 1):
        if 0 <= x < 2**31:
            assert quotient(x, by) == x // d


BANDS = [(None, None), (None, 0), (None, 7), (20, 0), (70, 33), (15, None), (0, 0)]
SIZES = [(300, 500), (500, 300), (64, 64), (1, 200), (200, 1), (129, 128), (257, 127)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("left, right", BANDS)
def test_tiles_cover_the_mask_and_take_turns(head_dim, left, right):
    """`query_range` is exact, `unmasked_range` never too wide, and `turn_of` counts programs in their launch order."""
    query_range, unmasked_range, turn_of = (
        plain(f) for f in (hopper_tiles.query_range, hopper_tiles.unmasked_range, hopper_tiles.turn_of)
    )
    T = hopper_launch.schedule(problem(head_dim=head_dim, causal=right is not None))  # both schedules at 64
    BM, BN = T.BLOCK_M, T.BLOCK_N
    F = Features(left is not None, right is not None, False, True)
    band = (left or 0, right or 0)
    for M, N in SIZES:
        distance = torch.arange(N) - (torch.arange(M)[:, None] + N - M)
        sees = torch.ones(M, N, dtype=torch.bool)
        if left is not None:
            sees &= distance >= -left
        if right is not None:
            sees &= distance <= right
        tiles = -(-N // BN)
        visits: dict[int, list[int]] = {}
        for n in range(tiles + 1):  # one tile more than there are keys
            lo, hi = query_range(n, M, N, band, F, T)
            seen = [m for m in range(-(-M // BM)) if sees[m * BM : (m + 1) * BM, n * BN : (n + 1) * BN].any()]
            assert list(range(lo, hi)) == seen or not seen
            for m in range(lo, hi):
                assert turn_of(n, m, M, N, band, F, T) == len(visits.setdefault(m, []))
                visits[m].append(n)
            for key0 in range(n * BN, (n + 1) * BN, BN // 2):
                whole_lo, whole_hi = unmasked_range(key0, BN // 2, M, N, band, hi, F, T)
                for m in range(max(lo, whole_lo), min(hi, whole_hi)):
                    assert key0 + BN // 2 <= N and sees[m * BM : (m + 1) * BM, key0 : key0 + BN // 2].all()


@pytest.mark.parametrize("left, right", BANDS)
def test_a_program_of_dq_meets_every_key_that_it_sees(left, right):
    """And the first warpgroup, which sees at most one key tile less, may leave out the last."""
    hopper_dq = pytest.importorskip("flash_attn.backward.hopper_dq")
    F = Features(left is not None, right is not None, False, True)
    band = (left or 0, right or 0)
    stand_in = types.SimpleNamespace(minimum=min, maximum=max, constexpr=None)
    find_keys = plain(hopper_dq.key_range, tl=stand_in)
    key_tiles = plain(hopper_dq._key_tiles, key_range=find_keys, KEYS=64)
    for M, N in SIZES:
        distance = torch.arange(N) - (torch.arange(M)[:, None] + N - M)
        sees = torch.ones(M, N, dtype=torch.bool)
        if left is not None:
            sees &= distance >= -left
        if right is not None:
            sees &= distance <= right
        for row in range(0, M + 128, 128):  # one program more than there are queries
            first, count = key_tiles(row, 128, M, N, band, F)
            seen = sees[row : row + 128].any(0).nonzero().flatten() // 64
            assert count == 0 if row >= M else set(seen.tolist()) <= set(range(first, first + count))
            assert len(seen) == 0 or (seen.min() == first and seen.max() == first + count - 1)
            for_first, of_first = key_tiles(row, 64, M, N, band, F)
            assert for_first == first and count - 1 <= of_first <= count
            assert (sees[row : row + 64].any(0).nonzero() < (first + of_first) * 64).all()


@pytest.mark.parametrize("pairs, width, key_tiles", [(1, 1, 1), (12, 4, 5), (10, 4, 3), (7, 8, 2), (9, 1, 4)])
def test_every_key_tile_has_one_program(pairs, width, key_tiles):
    """And sums are zeroed, and turns passed on, by programs that start earlier than those that wait for them."""
    by = (hopper_launch.divider(d) for d in (width * key_tiles, width, pairs % width or width))
    sizes = (0, 0, 0, 0, pairs, width, key_tiles, 0, 0, *by)
    order = plain(hopper_tiles.order, quotient=plain(hopper_tiles.quotient))
    place = [order(i, sizes) for i in range(pairs * key_tiles)]
    assert sorted(place) == [(n, pair) for n in range(key_tiles) for pair in range(pairs)]
    at = {x: i for i, x in enumerate(place)}
    assert all(at[n - 1, pair] < at[n, pair] for n, pair in place if n)
    for ahead in range(width, pairs, width):
        for n, pair in place:
            assert pair < ahead or all(at[m, pair - ahead] < at[n, pair] for m in range(key_tiles))


def fragments(x: torch.Tensor) -> torch.Tensor:
    """A (64, columns) piece of dQ in the order of a warpgroup's accumulator: [column / 8, warp, r, t, lower, 2]."""
    return x.view(4, 2, 8, x.shape[1] // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(-1)


@pytest.mark.interpret
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs Triton kernels in the interpreter"
)
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # range over a loaded number
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 96), (256, 128)])
@pytest.mark.parametrize("packed", [None, (70, 1, 0, 300)])
def test_the_kernels_around_the_main_one(head_dim, head_dim_v, packed):
    """The main kernel replaced by the oracle: it must find the row statistics and zeros, and its sums must reach dq.

    Above head dimension 128 the kernel of dQ is replaced, too, and there are no sums.
    """
    what = (
        dict(packed_q=packed, packed_k=packed, batch=len(packed), max_q=max(packed), max_k=max(packed))
        if packed
        else dict(max_q=150, max_k=90)
    )
    case = Case("x", causal=True, sink=True, head_dim_v=head_dim_v,
                **HALF | dict(heads=2, kv_heads=1, head_dim=head_dim) | what)  # fmt: skip
    built = build(case)
    p, ops = case.problem("cuda"), built.operands
    out, lse = oracle.forward(built.problem, ops)
    dout, dlse = torch.randn(out.shape).bfloat16(), torch.randn(lse.shape)
    want = oracle.backward(built.problem, ops, out.bfloat16(), lse.float(), dout, dlse)
    T = hopper_launch.schedule(p)
    columns = hopper_launch.piece_columns(T)
    pieces = T.BLOCK_M * T.D // (64 * columns)  # of a tile
    starts = [b * p.max_q for b in range(p.batch + 1)] if packed is None else ops.cu_seqlens_q.tolist()
    flat = lambda x: x.flatten(0, 1) if packed is None else x  # noqa: E731  rows of all sequences in one dimension
    by_head = lambda x: x.transpose(0, 1).flatten(1) if packed is None else x  # noqa: E731
    delta = (flat(dout).double() * flat(out.bfloat16()).double()).sum(-1).T - by_head(dlse)

    def run(kernel, grid, args, constants, *_):
        if not kernel.__name__.startswith("attn_bwd"):
            return kernel[grid](*args, **constants)
        given = dict(zip(kernel.arg_names, args, strict=False))
        tiles = given["sizes"][7]
        if given["seqs"][4] is not None:
            check_list(given["seqs"][4].view(-1, 8), starts, T.BLOCK_N)
        if kernel.__name__ == "attn_bwd_dq":
            stats = given["stats"]
            rows = slice(0, starts[-1])
            flat(given["dq_desc"].base)[rows] = flat(want.dq)[rows].to(p.dtype)
        else:
            stats = given["stats_desc"].base
            if T.FOLD:
                stats = stats.view(-1, 8).double()
                thirds, zeros = stats[:, :3].sum(1), stats[:, 3:]
                stats = torch.where(zeros.eq(0).all(1), thirds, torch.nan)
        stats = stats.view(p.heads, tiles, 2, T.BLOCK_M)
        sums = given.get("dq_acc")
        sums = None if sums is None else sums.view(p.heads, tiles, pieces, 64 * columns)
        for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            first = b * -(-p.max_q // T.BLOCK_M) if packed is None else start // T.BLOCK_M + b
            for m in range(-(-(end - start) // T.BLOCK_M)):
                rows = slice(start + m * T.BLOCK_M, min(end, start + (m + 1) * T.BLOCK_M))
                n = rows.stop - rows.start
                of_lse, of_delta = stats[:, first + m, 0], stats[:, first + m, 1]
                torch.testing.assert_close(
                    of_lse[:, :n].double(), -by_head(lse)[:, rows] / p.scale, rtol=1e-5, atol=1e-5
                )
                torch.testing.assert_close(of_delta[:, :n].double(), -delta[:, rows], rtol=1e-5, atol=1e-5)
                assert (of_lse[:, n:] == -torch.inf).all() and (of_delta[:, n:] == 0).all()
                if sums is None:
                    continue
                assert (sums[:, first + m] == 0).all()
                dq = torch.zeros(p.heads, T.BLOCK_M, T.D)
                dq[:, :n, :head_dim] = flat(want.dq)[rows].transpose(0, 1) / p.scale
                for h in range(p.heads):
                    halves = dq[h].split(columns, 1) if columns < T.D else dq[h].split(64)
                    for w in range(pieces):
                        sums[h, first + m, w] = fragments(halves[w].contiguous())

    def check_list(found, starts, block):
        want = []
        for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            n = end - start
            tiles = -(-n // block)
            want += [(tiles - i, b, [i, b, start, n, n, start, n, n]) for i in range(tiles)]
        want = [x[2] for x in sorted(want, key=lambda x: (-x[0], x[1]))]
        assert found.tolist() == want + [[0] * 8] * (len(found) - len(want))

    with pytest.MonkeyPatch.context() as patch, nan_empty():
        patch.setattr(hopper_launch, "_launch", run)
        got = hopper_launch.backward(p, ops, out.bfloat16(), lse.float(), dout, dlse)
    torch.testing.assert_close(got.dq.double(), want.dq, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(got.dsink.double(), want.dsink.double(), rtol=1e-3, atol=1e-3)
    if packed is not None:
        assert (got.dk[starts[-1] :] == 0).all() and (got.dv[starts[-1] :] == 0).all()


def compiled(case: Case, name: str = "attn_bwd_hopper"):
    """A kernel of a case, for a GPU that need not be there."""
    ops = build(case).operands
    p = case.problem("cuda")
    calls = []
    dout = torch.empty(*ops.q.shape[:-1], p.head_dim_v, dtype=p.dtype)
    lse = torch.empty((p.heads, ops.q.shape[0]) if p.varlen_q else (p.batch, p.heads, p.max_q))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hopper_launch,
            "_launch",
            lambda kernel, grid, args, constants, *_: calls.append((kernel, args, constants)),
        )
        hopper_launch.backward(p, ops, dout, lse, dout)
    (kernel, args, constants) = next(c for c in calls if c[0].__name__ == name)
    return launcher.build(kernel, args, constants, target=GPUTarget("cuda", 90, 32))


# what ptxas 12.8 spills, stores and loads, in bytes: at head dim 64 (the tile that ran fastest) all but two loads lie
# outside of the loops over queries
CONFIGURATIONS = [
    (Case("64", **HALF), 128),
    (Case("64_causal", causal=True, **HALF | dict(max_q=900)), 160),
    (Case("128", **HALF | dict(head_dim=128)), 0),
    (Case("128_causal", causal=True, **HALF | dict(head_dim=128)), 8),
    (Case("256_causal", causal=True, **HALF | dict(head_dim=256)), 0),
    (Case("192_128_causal", causal=True, head_dim_v=128, **HALF | dict(head_dim=192)), 0),
    (Case("128_ordered_causal_fp16", causal=True, deterministic=True,
          **HALF | dict(head_dim=128, dtype=torch.float16)), 32),
    (Case("256_window", window=(40, 20), **HALF | dict(head_dim=256)), 0),
]  # fmt: skip


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize("case, spills", CONFIGURATIONS, ids=lambda x: getattr(x, "id", ""))
    def test_keeps_the_pipeline(self, case, spills, tmp_path):
        report = inspect(compiled(case), tmp_path)
        assert report.warnings == []
        assert report.spills <= spills
        assert report.shared <= device.KNOWN["h200"].shared_memory
        assert report.count["USETMAXREG"] > 0, "no register reallocation"
        assert report.count["UTMALDG"] > 0 and report.count["UTMASTG"] > 0, "no TMA"
        assert report.register_a > 0, "P and dS do not stay in registers"
        if case.head_dim <= 128:
            assert report.count["UTMAREDG"] > 0, "dQ does not leave by TMA"

    @pytest.mark.parametrize(
        "changes", [{}, dict(causal=True), dict(window=(40, 20), dtype=torch.float16)],
        ids=lambda x: "-".join(x) or "full",
    )  # fmt: skip
    def test_two_short_programs_fit_a_processor(self, changes, tmp_path):
        case = Case("short", **HALF | dict(kv_heads=4) | changes)
        report = inspect(compiled(case, "attn_bwd_hopper_single"), tmp_path)
        assert report.warnings == []
        assert report.spills <= 140  # with Triton 3.9; few of them inside of the loop
        assert 2 * (report.shared + 1024) <= 228 * 1024  # 1 KiB is the system's
        assert report.count["UTMALDG"] > 0 and report.count["UTMASTG"] > 0 and report.count["UTMAREDG"] > 0
        assert report.register_a > 0, "P and dS do not stay in registers"

    @pytest.mark.parametrize(
        "changes, spills",
        [({}, 40), (dict(causal=True), 40), (dict(window=(40, 20), dtype=torch.float16), 40), (dict(softcap=5.0), 256),
         (dict(head_dim=192, head_dim_v=128, causal=True), 0)],  # 0 but for the soft cap with Triton 3.6
        ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
    )  # fmt: skip
    def test_keeps_the_pipeline_of_dq(self, changes, spills, tmp_path):
        case = Case("dq", **HALF | dict(head_dim=256) | changes)
        report = inspect(compiled(case, "attn_bwd_dq"), tmp_path)
        assert report.warnings == []
        assert report.spills <= spills
        assert report.shared <= device.KNOWN["h200"].shared_memory
        assert report.count["USETMAXREG"] > 0, "no register reallocation"
        assert report.count["UTMALDG"] > 0 and report.count["UTMASTG"] > 0, "no TMA"
        assert report.register_a > 0, "dS does not stay in registers"
