"""Tile choice: override, then the nearest measured row, then a rule; all legal on every known device."""

import json
from contextlib import nullcontext

import pytest
import torch

from flash_attn.errors import UnsupportedError
from flash_attn.problem import Problem
from flash_attn.tuning import backward, search, table
from flash_attn.tuning.config import FwdConfig, fits, pieces, smaller
from flash_attn.tuning.precision import precision
from flash_attn.utils import device

BASE = Problem(2, 16, 16, 4096, 4096, 128, 128, torch.bfloat16, device="cuda", scale=0.1)
ROW = dict(
    direction="forward", gpu="NVIDIA H200", capability=[9, 0], config=FwdConfig(64, 32, 4, 2)._asdict(),
    problem=table.describe(BASE),
)  # fmt: skip


@pytest.fixture
def rows(monkeypatch):
    """Replace the measured rows."""

    def use(*found):
        monkeypatch.setattr(table, "rows", lambda: found)
        table._lookup.cache_clear()

    yield use
    table._lookup.cache_clear()


@pytest.fixture
def torch_is_set_to():
    """Change how torch may multiply fp32."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield lambda asked: setattr(setting, "fp32_precision", asked)
    setting.fp32_precision = before


def choose(problem, name="h200"):
    with device.assume(device.KNOWN[name]):
        return table.forward_config(problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", device.KNOWN)
@pytest.mark.parametrize("measured", [True, False])
def test_every_choice_is_legal(name, dtype, measured, rows):
    if not measured:
        rows()
    for D in (1, 16, 40, 64, 80, 96, 128, 192, 224, 256, 320, 512):
        for max_q in (1, 100, 4096):
            problem = BASE._replace(head_dim=D, head_dim_v=D, dtype=dtype, max_q=max_q)
            assert fits(choose(problem, name), problem, device.KNOWN[name])


def test_override_wins_and_ends():
    config = FwdConfig(16, 64, 4, 1)
    before = choose(BASE)
    with table.override(config):
        assert choose(BASE) == config
    assert choose(BASE) == before != config


def test_measured_row_beats_the_rule_on_its_device_only(rows):
    rows(ROW)
    assert choose(BASE) == FwdConfig(64, 32, 4, 2)
    assert choose(BASE, "a100") == table.rule(BASE, device.KNOWN["a100"])
    other_dim = BASE._replace(head_dim=64, head_dim_v=64)
    assert choose(other_dim) == table.rule(other_dim, device.KNOWN["h200"])


def test_nearest_row_prefers_the_mask_then_the_length(rows):
    def row(stages, **changes):
        config = FwdConfig(64, 64, 4, stages)._asdict()
        return ROW | dict(config=config, problem=table.describe(BASE._replace(**changes)))

    rows(row(1, max_q=512, max_k=512), row(2, max_q=8192, max_k=8192), row(3, right=0, max_q=4096))
    assert choose(BASE).num_stages == 2
    assert choose(BASE._replace(max_q=600, max_k=600)).num_stages == 1
    assert choose(BASE._replace(right=0, max_q=700, max_k=700)).num_stages == 3


def test_a_row_too_large_for_the_device_shrinks(rows):
    rows(ROW | dict(config=FwdConfig(128, 256, 8, 4)._asdict()))
    config = choose(BASE)
    assert fits(config, BASE, device.KNOWN["h200"]) and config != FwdConfig(128, 256, 8, 4)


def test_smaller_ends():
    config, steps = FwdConfig(128, 128, 8, 4), 0
    while config is not None:
        assert steps < 20
        config, steps = smaller(config), steps + 1


def test_measured_rows_say_where_they_come_from():
    for row in table.rows():
        assert set(row) >= {
            "direction",
            "gpu",
            "capability",
            "problem",
            "config",
            "tflops",
            "torch",
            "triton",
            "date",
        }


@pytest.mark.parametrize(
    "dim, tiles",
    [(1, (16, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0)),
     (192, (128, 64)), (224, (256, 0)), (256, (256, 0)), (320, (256, 64)), (512, (512, 0))],
)  # fmt: skip
def test_two_tiles_cover_a_head_dim(dim, tiles):
    assert pieces(dim) == tiles


def test_search_takes_the_fastest_and_passes_over_what_does_not_fit(tmp_path):
    times = {FwdConfig(64, 64, 4, 2): 2e-3, FwdConfig(128, 64, 8, 3): 1e-3, FwdConfig(128, 128, 8, 3): None}

    def timer(problem, config, direction):
        if times[config] is None:
            raise UnsupportedError("too large")
        return times[config]

    with device.assume(device.KNOWN["h200"]):
        row = search.search(BASE, configs=times, timer=timer)
        assert row["config"] == FwdConfig(128, 64, 8, 3)._asdict()
        assert row["tflops"] == round(4 * 2 * 16 * 4096 * 4096 * 128 / 1e-3 / 1e12, 1)
        with pytest.raises(UnsupportedError, match="too large"):
            search.search(BASE, configs=[FwdConfig(128, 128, 8, 3)], timer=timer)
        path = tmp_path / "x.json"
        search.write([row], path)
        search.write([row | dict(tflops=1.0)], path)  # replaces
    assert [json.loads(line)["tflops"] for line in path.read_text().splitlines()] == [1.0]


@pytest.mark.parametrize("direction", search.DIRECTIONS)
def test_candidates_are_many_and_legal(direction):
    with device.assume(device.KNOWN["h200"]):
        found = search.candidates(BASE, direction)
        assert len(found) > 10
        if direction == "forward":
            assert all(fits(c, BASE, device.KNOWN["h200"]) for c in found)


def test_a_window_and_dropout_have_rows_of_their_own():
    keys = [
        table.describe(p)
        for p in (BASE, BASE._replace(left=9), BASE._replace(right=0), BASE._replace(dropout_p=0.1))
    ]
    assert len({json.dumps(k) for k in keys}) == 4


@pytest.mark.parametrize(
    "gpu, asked, products",
    [("h200", "none", "tf32x3"), ("h200", "ieee", "ieee"), ("h200", "tf32", "tf32"), ("a100", "none", "tf32x3"),
     ("t4", "none", "ieee"), (None, "none", "ieee")],
)  # fmt: skip
def test_fp32_is_multiplied_as_torch_is_set_to(gpu, asked, products, torch_is_set_to):
    torch_is_set_to(asked)
    t4 = device.DeviceInfo("Tesla T4", (7, 5), 40, 64 * 1024)
    with device.assume(t4 if gpu == "t4" else device.KNOWN[gpu]) if gpu else nullcontext():
        assert precision(BASE._replace(dtype=torch.float32)) == products
        assert precision(BASE._replace(dtype=torch.bfloat16)) == "ieee"
        # a sum of few products rounds too little to hide the rounding of its factors
        for head_dim in (1, 31):
            assert precision(BASE._replace(dtype=torch.float32, head_dim=head_dim)) == (
                "tf32" if asked == "tf32" else "ieee"
            )


def test_fp32_has_a_tile_for_each_way_of_multiplying(torch_is_set_to):
    problem, found = BASE._replace(dtype=torch.float32, head_dim=64, head_dim_v=64), set()
    for asked in ("none", "ieee", "tf32"):
        torch_is_set_to(asked)
        with device.assume(device.KNOWN["h200"]):
            row = table.nearest(problem, device.KNOWN["h200"])
            assert row["problem"]["products"] == precision(problem)
            found.add((table.forward_config(problem), *backward.backward_config(problem)))
    assert len(found) == 3
