"""The decode kernel and its merge against the fp64 oracle, in the interpreter; the choice of splits, anywhere."""

import itertools
import math
import os

import pytest
import torch
from accuracy import assert_as_close_as_torch
from cases import CASES, Case, build

from flash_attn.kvcache import splits
from flash_attn.problem import Problem
from flash_attn.reference import attention, eager
from flash_attn.tuning.config import FwdConfig
from flash_attn.utils.device import KNOWN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpret = pytest.mark.interpret


def problem(**fields):
    default = dict(
        batch=1, heads=32, kv_heads=8, max_q=1, max_k=8192, head_dim=128, head_dim_v=128,
        dtype=torch.bfloat16, device="cuda", seqused_k=True,
    )  # fmt: skip
    return Problem(**(default | fields))


class TestPlanning:
    H200, SMALL = KNOWN["h200"], KNOWN["rtx4090"]

    @pytest.mark.parametrize(
        ("fields", "wanted"),
        [
            ({}, True),
            (dict(max_q=16), True),
            (
                dict(max_q=17),
                True,
            ),  # 68 rows of a kv head, but 32 programs would fill a quarter of the machine
            (dict(max_q=17, max_k=1024), False),
            (dict(max_k=255), False),
            (dict(dropout_p=0.1), False),
            (dict(max_q=17, num_splits=4), True),
            (dict(max_q=512, heads=8), True),  # 32 programs without splits
            (dict(max_q=512, heads=8, num_splits=1), False),
            (dict(max_q=512, heads=8, batch=8), False),
        ],
    )
    def test_wants(self, fields, wanted):
        assert splits.wants(problem(**fields), self.H200) is wanted

    @pytest.mark.parametrize("device", [H200, SMALL], ids=lambda d: d.name)
    @pytest.mark.parametrize(
        "dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512), (1, 1), (576, 512)]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_tiles_fit(self, device, dims, dtype):
        p = problem(head_dim=dims[0], head_dim_v=dims[1], dtype=dtype, max_q=9)
        found = splits.configs(p, device.shared_memory, device.multiprocessors)
        assert found
        d, dv = (max(16, 1 << (x - 1).bit_length()) for x in dims)
        for config in found[:-1]:
            used = max(config.num_stages - 1, 1) * config.block_n * (d + dv)
            assert used * dtype.itemsize <= device.shared_memory
            assert config.block_m == 64

    @pytest.mark.parametrize("device", KNOWN.values(), ids=lambda d: d.name)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_tiles_are_powers_of_two(self, device, dtype):
        """A range of any other length does not compile: head dims of 192 and 128 once gave 42 keys a tile."""
        dims = (1, 33, 40, 64, 96, 128, 192, 224, 256, 320, 576)
        shapes = itertools.product(dims, dims, (1, 5, 32), (1, 9), (1, 40), (0, 48), (0, 1))
        for d, dv, group, max_q, batch, page, num_splits in shapes:
            p = problem(
                head_dim=d, head_dim_v=dv, heads=4 * group, kv_heads=4, max_q=max_q, dtype=dtype, batch=batch,
                page_size=page, num_splits=num_splits,
            )  # fmt: skip
            for config in splits.configs.__wrapped__(p, device.shared_memory, device.multiprocessors):
                assert all(x >= 1 and x & (x - 1) == 0 for x in config[:3]), (p, config)
                assert config.block_n >= 16 and (config.block_m >= 16 or dtype == torch.float32), (p, config)

    @pytest.mark.parametrize("page", [0, 16])
    @pytest.mark.parametrize(
        "fields, block_n", [({}, 256), (dict(batch=1), 128), (dict(batch=64), 128), (dict(num_splits=1), 128)]
    )
    def test_head_dim_64_takes_long_steps_where_a_multiprocessor_has_one_program(self, fields, block_n, page):
        p = problem(**dict(batch=16, head_dim=64, head_dim_v=64, page_size=page) | fields)
        assert splits.configs(p, self.H200.shared_memory, 132)[0].block_n == block_n

    @pytest.mark.parametrize("batch", [1, 3, 16, 40, 128])
    @pytest.mark.parametrize("max_k", [256, 4096, 131072])
    def test_splits_fill_the_machine_and_no_more(self, batch, max_k):
        p = problem(batch=batch, max_k=max_k)
        config = splits.configs(p, self.H200.shared_memory, 132)[0]
        spans = splits.num_splits(p, config, 132)
        assert 1 <= spans <= splits.MAX_SPLITS
        assert spans * config.block_n <= max(max_k, config.block_n)
        if max_k == 131072:
            waves = batch * 8 * spans / 132
            at_once = (
                config.block_n == 64 and config.num_stages == 3
            )  # three programs fit on a multiprocessor
            assert waves / math.ceil(waves) > 0.85 or (at_once and waves <= 3)

    def test_splits_asked_for_are_taken(self):
        config = FwdConfig(16, 64, 4, 3)
        assert splits.num_splits(problem(num_splits=7), config, 132) == 7
        assert splits.num_splits(problem(num_splits=1), config, 132) == 1
        assert splits.num_splits(problem(num_splits=1000), config, 132) == splits.MAX_SPLITS

    def test_a_window_is_all_there_is_to_split(self):
        assert splits.visible_keys(problem(left=100, right=0, max_q=3)) == 104
        assert splits.visible_keys(problem(left=None, right=0)) == 8192


if INTERPRETED:
    from flash_attn.forward import decode, launch

    KERNEL_CASES = [c for c in CASES if not c.dropout_p and c.id != "several_tiles"]
else:
    KERNEL_CASES = []

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
CONFIG = FwdConfig(16, 16, 4, 2)  # several tiles of rows and of keys even in small cases
LARGE = FwdConfig(64, 16, 4, 2)


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that decode allocates starts as NaN."""
    empty = torch.empty

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", nan)


def with_few_queries(case):
    """At most three a sequence: the merge has a program per row and head, and the interpreter takes 25 ms for each."""
    packed, used = (x and tuple(min(n, 3) for n in x) for x in (case.packed_q, case.seqused_q))
    return case._replace(max_q=min(case.max_q, 3), packed_q=packed, seqused_q=used)


def check(p, ops, out, lse):
    """Error at most twice that of PyTorch in the same precision and a rounding of the largest value; lse to fp32."""
    want, want_lse = attention.forward(p, ops)
    plain, _ = eager.forward(p, ops)
    assert out.dtype == p.dtype
    assert_as_close_as_torch(out, want, plain, want_lse)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    assert torch.equal(lse[~lse.isfinite()], want_lse[~lse.isfinite()].float())
    seen = want_lse.isfinite()
    if seen.any():
        assert (lse.double() - want_lse)[seen].abs().max() <= 2e-6 * max(1, want_lse[seen].abs().max().item())


@interpret
@needs_interpreter
@pytest.mark.usefixtures("poisoned")
class TestKernel:
    @pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda c: c.id)
    def test_equals_the_oracle(self, case):
        p, ops, *_ = build(case)
        check(p, ops, *decode.run(p, ops, LARGE, 1))
        if KERNEL_CASES.index(case) % 2:
            p, ops, *_ = build(with_few_queries(case))
            check(p, ops, *decode.run(p, ops, LARGE, 2))

    @pytest.mark.parametrize("spans", [1, 2, 5])
    @pytest.mark.parametrize("name", ["gqa", "window", "paged", "pages_of_whole_tiles", "lengths"])
    def test_spans(self, name, spans):
        """More spans than tiles too: a span without keys must not be read by the merge."""
        case = {
            "gqa": Case("gqa", heads=6, kv_heads=2, max_q=3, max_k=70, causal=True),
            "window": Case("window", max_q=2, max_k=70, window=(20, 0)),
            "paged": Case("paged", max_q=2, max_k=70, page_size=7, seqused_k=(33, 70)),
            "pages_of_whole_tiles": Case("pages", max_q=2, max_k=96, page_size=32, seqused_k=(33, 70)),
            "lengths": Case("lengths", max_q=1, max_k=70, seqused_k=(0, 17), sink=True),
        }[name]
        p, ops, *_ = build(case)
        check(p, ops, *decode.run(p, ops, CONFIG, spans))

    @pytest.mark.parametrize("spans", [1, 3])
    def test_sink_of_minus_infinity_is_no_sink(self, spans):
        """Also for the rows that see no key: -inf - -inf must not make them NaN."""
        p, ops, *_ = build(Case("sink", max_q=3, max_k=70, causal=True, seqused_k=(0, 40), sink=True))
        ops.sink[1:] = -math.inf
        out, lse = decode.run(p, ops, CONFIG, spans)
        check(p, ops, out, lse)
        assert lse[0, 1:].eq(-math.inf).all() and out[0].eq(0).all()

    @pytest.mark.parametrize("page_size", [1, 8, 12, 32])
    def test_the_table_behind_the_last_page_may_hold_anything(self, page_size):
        """Pages are looked up before the length is known: what lies behind it must not be followed."""
        p, ops, *_ = build(Case("stale", max_q=1, max_k=96, page_size=page_size, seqused_k=(0, 35)))
        stale = ops.block_table.clone()
        stale[0] = 2**31 - 1
        stale[1, -(-35 // page_size) :] = -1
        for spans in (1, 3):
            check(p, ops, *decode.run(p, ops._replace(block_table=stale), CONFIG, spans))

    def test_half_precision(
        self,
    ):  # bfloat16 waits for a GPU: Triton 3.6's interpreter multiplies it as integers
        p, ops, *_ = build(Case("half", max_q=2, max_k=48, causal=True), dtype=torch.float16)
        check(p, ops, *decode.run(p, ops, CONFIG, 3))

    def test_lengths_beyond_the_cache_read_nothing_behind_it(self):
        p, ops, *_ = build(Case("whole", max_q=1, max_k=40, seqused_k=(40, 40)))
        out, lse = decode.run(p, ops, CONFIG, 2)
        far, far_lse = decode.run(
            p, ops._replace(seqused_k=torch.tensor([41, 10**9], dtype=torch.int32)), CONFIG, 2
        )
        assert torch.equal(out, far) and torch.equal(lse, far_lse)

    def test_one_span_does_not_depend_on_the_batch(self):
        p, ops, *_ = build(Case("three", batch=3, max_q=1, max_k=300, seqused_k=(300, 40, 111)))
        p = p._replace(num_splits=1)
        assert decode.wants(p)
        out, lse = decode.forward(p, ops)
        for b in range(3):
            one = ops._replace(
                q=ops.q[b : b + 1], k=ops.k[b : b + 1], v=ops.v[b : b + 1], seqused_k=ops.seqused_k[b : b + 1]
            )
            single, single_lse = decode.forward(p._replace(batch=1), one)
            assert torch.equal(single[0], out[b]) and torch.equal(single_lse[0], lse[b])

    def test_the_backend_takes_it(self):
        from flash_attn import dispatch

        p, ops, *_ = build(Case("decode", max_q=1, max_k=260, seqused_k=(3, 260)))
        with dispatch.use_backend("triton"):
            out, lse = dispatch.select(p).forward(p, ops)
        direct = decode.run(p, ops, *decode.choose(p)[0])
        assert torch.equal(out, direct[0]) and torch.equal(lse, direct[1])
        check(p, ops, out, lse)
        assert not torch.equal(out, launch.forward(p, ops)[0])  # the other kernel rounds differently
