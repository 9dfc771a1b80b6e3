"""The Hopper forward without a GPU: what its backend refuses, how it cuts a problem, and what ptxas makes of it."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from cases import Case, build  # noqa: E402
from sass import inspect  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from flash_attn.backends import hopper as backend  # noqa: E402
from flash_attn.forward import hopper_launch  # noqa: E402
from flash_attn.forward.hopper import attn_fwd_hopper  # noqa: E402
from flash_attn.utils import device, launcher  # noqa: E402

HALF = dict(dtype=torch.bfloat16, heads=4, kv_heads=2, max_q=300, max_k=500, head_dim=64)
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on"),
]


@pytest.fixture(autouse=True)
def _h200():
    with device.assume(device.KNOWN["h200"]):
        hopper_launch.plan.cache_clear()
        yield
        hopper_launch.plan.cache_clear()


def problem(**changes):
    return Case("x", **HALF | changes).problem("cuda")


def test_runs_what_it_was_built_for():
    for changes in (
        {}, dict(causal=True), dict(window=(9, 5)), dict(softcap=5.0, sink=True), dict(dtype=torch.float16),
        dict(packed_q=(3, 4), packed_k=(7, 2)), dict(seqused_k=(4, 5)), dict(head_dim=192, head_dim_v=128),
    ):  # fmt: skip
        assert backend.supports(problem(**changes), "forward") is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=torch.float32), "float32"),
        (dict(head_dim=264), "256"),
        (dict(head_dim=60), "multiples of 8"),
        (dict(dropout_p=0.1), "dropout_p"),
        (dict(alibi="h"), "alibi"),
        (dict(page_size=16), "page_size"),
        (dict(leftpad=(1, 2)), "leftpad"),
        (dict(batch_idx=(1, 0)), "batch_idx"),
        (dict(scale=-1.0), "positive"),
    ],
)
def test_says_why_it_refuses(changes, reason):
    assert reason in backend.supports(problem(**changes), "forward")


def test_refuses_other_gpus():
    with device.assume(device.KNOWN["a100"]):
        assert "A100" in backend.supports(problem(), "forward")
    assert "cpu" in backend.supports(problem()._replace(device="cpu"), "forward")


def test_head_dims_become_powers_of_two_that_hold_them():
    for d in range(8, 257, 8):
        parts = hopper_launch.split_dim(d)
        assert sum(parts) >= d and all(p in (0, 32, 64, 128, 256) for p in parts)
        assert sum(parts) - d < 64
    assert hopper_launch.split_dim(96) == (64, 32)
    assert hopper_launch.split_dim(192) == (128, 64)


def test_tma_walks_views_of_packed_tensors_but_not_unaligned_ones():
    qkv = torch.empty(2, 10, 3, 4, 64, dtype=torch.bfloat16)
    assert all(hopper_launch.addressable(x) for x in qkv.unbind(2))
    assert not hopper_launch.addressable(torch.empty(2, 10, 4, 68, dtype=torch.bfloat16)[..., 4:])
    assert not hopper_launch.addressable(torch.empty(2, 10, 4, 60, dtype=torch.bfloat16))
    assert not hopper_launch.addressable(torch.empty(2, 10, 64, 4, dtype=torch.bfloat16).transpose(2, 3))
    assert not hopper_launch.addressable(torch.empty(2, 10, 1, 64, dtype=torch.bfloat16).expand(2, 10, 4, 64))


def test_measured_rows_serve_plain_problems_only():
    """A row was checked on dense problems; everything else runs the rule that was checked with every feature."""
    rule = hopper_launch.plan(problem(sink=True)).config._replace(sink=False)
    row = hopper_launch.plan(problem())
    assert row.config != rule and hopper_launch.plan(problem(dtype=torch.float16)).config == row.config
    for changes in (dict(softcap=3.0), dict(packed_q=(3, 4)), dict(head_dim=40), dict(seqused_k=(4, 5))):
        other = hopper_launch.plan(problem(**changes)).config
        assert (other.WARPGROUPS, other.BN, other.QREG) == (rule.WARPGROUPS, rule.BN, rule.QREG)


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_a_chained_tile_frees_what_later_ones_wait_for(d):
    """A warpgroup that passes over key tiles while it holds V of another one leaves the producer a stage."""
    for max_q in (128, 1024, 2048, 16384):
        for causal in (False, True):
            for special in (False, True):
                config = hopper_launch.plan(
                    problem(head_dim=d, max_q=max_q, max_k=max_q, causal=causal, sink=special)
                ).config
                unseen = -(-(config.WARPGROUPS - 1) * 64 // config.BN)
                assert not (causal and config.CHAIN) or config.WARPGROUPS <= 2 or unseen < config.STAGES


MIXED_DIMS = [(64, 256), (256, 64), (128, 192), (192, 256), (192, 64)]


@pytest.mark.parametrize("d", [64, 96, 128, 160, 192, 256])
def test_o_takes_the_place_of_q_only_where_it_fits(d):
    """Head dims of 64 and 256 (keys, values) did not compile: O was put where Q had been, which was a quarter of it."""
    for dv in (64, 96, 128, 160, 192, 256):
        config = hopper_launch.plan(problem(head_dim=d, head_dim_v=dv)).config
        assert not config.SHARE or (config.V0 == config.D0 and config.V1 in (0, config.D1))


def test_tiles_are_drawn_from_a_counter_only_where_programs_take_more_than_one():
    """A captured launch without a counter is one kernel."""
    for batch, drawn in ((1, False), (64, True)):
        case = Case("x", **HALF, batch=batch)
        assert hopper_launch.prepare(case.problem("cuda"), build(case).operands).draws == drawn


@pytest.mark.parametrize(
    "head_dim, max_q, swizzle", [(256, 16384, 8), (128, 16384, 16), (128, 4096, 16), (64, 4096, 32)]
)
def test_works_on_many_heads_together_where_tiles_differ_in_length(head_dim, max_q, swizzle):
    changes = dict(
        max_q=max_q, max_k=max_q, batch=16384 // max_q, heads=2048 // head_dim, kv_heads=2048 // head_dim
    )
    assert hopper_launch.plan(problem(causal=True, **changes | dict(head_dim=head_dim))).swizzle == swizzle
    assert hopper_launch.plan(problem(**changes | dict(head_dim=head_dim))).swizzle == 1


def compiled(case: Case):
    built = build(case)
    ops = built.operands
    ready = hopper_launch.prepare(case.problem("cuda"), ops)
    out, lse = torch.empty(ready.out_shape, dtype=case.dtype), torch.empty(ready.lse_shape)
    args = hopper_launch.arguments(ready, ops, out, lse, torch.zeros(2, dtype=torch.int32))
    values = args[: -len(ready.constants)]
    return ready.constants["C"], launcher.build(
        attn_fwd_hopper, values, ready.constants, target=GPUTarget("cuda", 90, 32)
    )


# every measured way to cut a problem, and each feature
CONFIGURATIONS = [
    Case("64", **HALF),
    Case("64_causal", causal=True, **HALF),
    Case("128", **HALF | dict(head_dim=128)),
    Case("128_causal", causal=True, **HALF | dict(head_dim=128)),
    Case("256_causal", causal=True, **HALF | dict(head_dim=256)),
    *(Case(f"{d}_{'causal' if c else 'full'}_4k", **HALF | dict(head_dim=d, max_q=4096, max_k=4096), causal=c)
      for d in (64, 128, 256) for c in (False, True)),
    Case("128_softcap_2k", softcap=9.0, **HALF | dict(head_dim=128, max_q=2000)),
    Case("192_causal", causal=True, **HALF | dict(head_dim=192)),
    Case("192_128_causal", causal=True, head_dim_v=128, **HALF | dict(head_dim=192)),
    Case("96_window_softcap_sink_fp16", window=(50, 20), softcap=9.0, sink=True,
         **HALF | dict(head_dim=96, dtype=torch.float16)),
    Case("128_packed_used_causal", causal=True, packed_q=(300, 20), packed_k=(500, 7), seqused_k=(400, 7),
         seqused_q=(280, 1), **HALF | dict(head_dim=128)),
]  # fmt: skip


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda c: c.id)
    def test_keeps_the_pipeline(self, case, tmp_path):
        config, kernel = compiled(case)
        report = inspect(kernel, tmp_path)
        assert report.warnings == []
        assert report.spills <= SPILLS.get(case.id, FEW)
        assert report.shared <= device.KNOWN["h200"].shared_memory
        assert report.register_a > 0, "P does not stay in registers"
        assert report.count["USETMAXREG"] > 0, "no register reallocation"
        assert report.count["UTMALDG"] > 0 and report.count["UTMASTG"] > 0, "no TMA"
        # each warpgroup takes the exponentials of a key tile at once, or anew: in its loop and at its start or end
        assert report.count["MUFU"] >= 2 * config.WARPGROUPS * config.BN // 2
        if config.OVERLAP:  # all of those in the loop run under P V
            loops = [n for n in report.overlap if n > 8]
            assert len(loops) == config.WARPGROUPS and min(loops) >= config.BN

    @pytest.mark.parametrize("dims", MIXED_DIMS, ids=str)
    def test_values_wider_or_narrower_than_keys(self, dims, tmp_path):
        case = Case("mixed", causal=True, head_dim_v=dims[1], **HALF | dict(head_dim=dims[0]))
        report = inspect(compiled(case)[1], tmp_path)
        assert report.warnings == [] and report.spills <= FEW
        assert report.shared <= device.KNOWN["h200"].shared_memory


# bytes that ptxas may spill: a few registers once a tile of queries, where a head dim takes all there are
FEW = 32 if triton.__version__.startswith("3.6.") else 48
# more: at D = 64 six (3.9: eight) registers, stored once a program and loaded once a tile; the other two spill some in
# the loop and are faster all the same than what spills nothing
SPILLS = {"64_causal_4k": 64, "128_causal_4k": 52, "192_128_causal": 256}
