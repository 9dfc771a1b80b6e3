"""The kernel model, its validation against stored measurements, calibration, sweeps and the command line."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from flash_attn.cli import cost as cli
from flash_attn.cost import calibrate, fit, measured, sweep
from flash_attn.cost.counts import count
from flash_attn.cost.hardware import HARDWARE, get_hardware
from flash_attn.cost.kernels import Constants, constants, estimate, estimate_passes, makespan, plan
from flash_attn.cost.peers import PEERS, estimate_peer
from flash_attn.cost.report import Table, human
from flash_attn.cost.tiles import Tile, Tiles, tiles_of
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

ROOT = Path(__file__).parents[1]
PUBLISHED = json.loads((ROOT / "bench" / "published.json").read_text())
# Published rows that cannot hold beside another row of the same kernel: see the test that shows it.
CONTRADICTORY = {("forward", "triton", 128, "causal", 512), ("backward", "fa2", 128, "causal", 8192)}
LAYER = Problem(4, 16, 16, 4096, 4096, 128, 128, torch.bfloat16, "cuda")


def test_parts_add_up_and_name_what_bounds():
    for direction in ("forward", "backward"):
        for backend in ("hopper", "triton"):
            e = estimate(LAYER, direction, "h200", backend)
            assert sum(e.parts.values()) == pytest.approx(e.time_s)
            assert e.bound == max(e.parts, key=e.parts.get) == "matrix"
            assert 0.2 < e.tflops / 989.4 < 0.9


def test_causal_costs_about_half_and_a_window_far_less():
    full = estimate(LAYER._replace(max_q=16384, max_k=16384, batch=1)).time_s
    causal = estimate(LAYER._replace(max_q=16384, max_k=16384, batch=1, right=0)).time_s
    window = estimate(LAYER._replace(max_q=16384, max_k=16384, batch=1, left=1023, right=0)).time_s
    assert 0.45 < causal / full < 0.6 and window < causal / 4


def test_tile_quantisation_and_waves():
    """One row more than a tile costs a tile, one tile more than the processors costs a wave."""

    def time(rows):
        return estimate(one._replace(max_q=rows), "forward", "h200", "hopper", tile=Tile(128, 128)).time_s

    one = LAYER._replace(batch=1, heads=132, kv_heads=1, max_q=128)  # few bytes: the products bind
    assert time(384) == time(257) > 1.2 * time(256)
    more = one._replace(heads=133)
    times = [estimate(p, "forward", "h200", "hopper", tile=Tile(128, 128)) for p in (one, more)]
    assert times[1].time_s > 1.8 * times[0].time_s and times[1].bound == "imbalance"


def test_varlen_is_the_work_of_its_sequences():
    packed = LAYER._replace(varlen_q=True, varlen_k=True, right=0)
    equal = estimate(packed, lens_q=[4096] * 4, lens_k=[4096] * 4)
    assert equal.time_s == pytest.approx(estimate(packed).time_s, rel=0.02)  # another order of the tiles
    short = estimate(packed, lens_q=[4096, 100, 100, 100], lens_k=[4096, 100, 100, 100])
    assert equal.time_s / 4 < short.time_s < equal.time_s / 2


def test_few_programs_spread_over_the_processors_first():
    """With a program a processor at most, it has the processor to itself, however many would fit."""
    few = Problem(1, 8, 8, 1024, 1024, 64, 64, torch.bfloat16, "cuda")
    passes = plan(few, "forward", "triton", Tiles(Tile(128, 64, 4)), (None, None))
    assert passes[0].resident > 1
    alone = [one._replace(resident=1) for one in passes]
    args = constants("triton", "forward"), get_hardware("h200"), few, "triton", "forward", Tile(128, 64, 4)
    work = count(few)
    assert estimate_passes(passes, *args, work) == estimate_passes(alone, *args, work)


def test_packed_tiles_are_taken_in_their_order():
    """The kernels walk over packed sequences in turn: a long one at the end makes all wait, one at the start hides."""
    packed = LAYER._replace(varlen_q=True, varlen_k=True, batch=129, heads=1, kv_heads=1)
    lens = [512] * 128

    def time(lens):
        return estimate(packed, "forward", "h200", "hopper", lens, lens).time_s

    assert time([4096, *lens]) < 0.8 * time([*lens, 4096])


def test_decode_is_bound_by_memory_until_it_is_too_small():
    big = estimate(Problem(128, 32, 8, 1, 8192, 128, 128, torch.bfloat16, "cuda"))
    assert big.kind == "decode" and big.bound == "memory" and big.gbs > 0.8 * 4800
    small = estimate(Problem(1, 8, 8, 1, 512, 128, 128, torch.bfloat16, "cuda"))
    assert small.bound != "memory" and small.time_s < 40e-6


def test_decode_waits_for_the_processor_with_the_most_to_read():
    """Five programs on some processors and four on the others take as long as five on all."""

    def time(batch):
        return estimate(Problem(batch, 8, 1, 1, 16384, 128, 128, torch.bfloat16, "cuda", num_splits=1)).time_s

    assert time(4 * 132 + 2) == pytest.approx(time(5 * 132), rel=0.02) and time(4 * 132) < 0.85 * time(
        5 * 132
    )


def test_makespan_is_that_of_the_greedy_schedule():
    assert makespan([(3.0, 2), (2.0, 3)], 2) == 7.0  # 3+2+2 | 3+2
    assert makespan([(1.0, 10)], 4) == 3.0
    assert makespan([(5.0, 1)], 4) == 5.0
    assert makespan([], 4) == makespan([(1.0, 0)], 4) == 0.0
    assert makespan([(1.0, 2), (2.0, 1), (9.0, 1)], 2, in_order=True) == 10.0  # 1+2 | 1+9, not 9 | 2+1+1
    many = [(float(cost), 5000) for cost in range(1, 11)]  # estimated, not played through
    assert makespan(many, 132) == pytest.approx(sum(c * n for c, n in many) / 132, rel=1e-2)


def test_tiles_come_from_the_tuning_table():
    from flash_attn.tuning import table
    from flash_attn.tuning.config import FwdConfig

    with table.override(FwdConfig(32, 16, 4, 1)):
        tiles_of.__globals__["_tiles"].cache_clear()
        assert tiles_of(LAYER, "triton", "forward", get_hardware("a100")).main == Tile(32, 16, 4)
    tiles_of.__globals__["_tiles"].cache_clear()
    assert tiles_of(LAYER, "triton", "backward", get_hardware("a100")).rows is not None
    slow = estimate(LAYER, hardware="a100", tile=Tile(16, 16)).time_s
    assert slow > estimate(LAYER, hardware="a100").time_s


def test_hopper_tiles_are_those_of_the_launches():
    """`cost` needs no Triton, so it repeats the rules of the two launch files; here they meet."""
    pytest.importorskip("triton")
    from flash_attn.backward import hopper_launch as backward
    from flash_attn.forward import hopper_launch as forward
    from flash_attn.utils import device

    h200 = get_hardware("h200")
    with device.assume(device.KNOWN["h200"]):
        for D in (64, 96, 128, 192, 256):
            for S in (512, 2048, 8192):
                for left, right in ((None, None), (None, 0), (1024, 0)):
                    p = LAYER._replace(max_q=S, max_k=S, head_dim=D, head_dim_v=D, left=left, right=right)
                    tile = forward._tile(p)
                    want = Tile(64 * tile["WARPGROUPS"], tile["BN"])
                    assert tiles_of(p, "hopper", "forward", h200).main == want, p
                    schedule = backward.schedule(p)
                    want = Tile(schedule.BLOCK_M, schedule.BLOCK_N)
                    assert tiles_of(p, "hopper", "backward", h200).main == want, p


def test_every_device_predicts_every_direction():
    for name in HARDWARE:
        for direction in ("forward", "backward"):
            e = estimate(LAYER, direction, name)
            assert 0 < e.time_s < 100 and e.hardware == name
    assert estimate(LAYER, hardware="cpu").backend == "cpu"


def published_seconds(row):
    flops = 4 * row["B"] * row["H"] * row["S"] ** 2 * row["D"] * (0.5 if row["mask"] == "causal" else 1)
    return flops * (2.5 if row["kind"] == "backward" else 1) / row["tflops"] / 1e12


def test_published_rows_of_peers_are_predicted_from_data_sheets_alone():
    """Nothing here was fitted to these rows: all but two are predicted to 25 %."""
    outside = set()
    for row in PUBLISHED:
        p = Problem(row["B"], row["H"], row["Hk"], row["S"], row["S"], row["D"], row["D"], torch.bfloat16)
        p = p._replace(right=0 if row["mask"] == "causal" else None)
        predicted = estimate_peer(p, row["peer"], row["kind"], row["hardware"]).time_s
        if abs(published_seconds(row) / predicted - 1) > 0.25:
            outside.add(tuple(row[key] for key in ("kind", "peer", "D", "mask", "S")))
    assert len(PUBLISHED) == 163 and outside == CONTRADICTORY


def test_the_published_rows_outside_contradict_others():
    """Half of the work would take as long as all of it on kernels that skip hidden tiles, as their other rows show."""
    at = {}
    for row in PUBLISHED:
        key = tuple(row[key] for key in ("kind", "peer", "D", "mask", "S"))
        at.setdefault(key, []).append(published_seconds(row) / row["B"])
    for kind, peer, dim, mask, length in CONTRADICTORY:
        (causal,), (full,) = at[kind, peer, dim, mask, length], at[kind, peer, dim, "full", length]
        assert causal > 0.95 * full
    for length in (1024, 2048, 4096, 8192, 16384):
        assert (
            at["forward", "triton", 128, "causal", length][0]
            < 0.7 * at["forward", "triton", 128, "full", length][0]
        )
    assert all(
        seconds < 0.62 * at["forward", "fa2", 128, "full", 8192][0]
        for seconds in at["forward", "fa2", 128, "causal", 8192]
    )


def test_stored_measurements_are_predicted():
    """Median at most 10 %, 90th percentile at most 20 %, on the rows that did not calibrate."""
    rows = measured.load(measured.result_files())
    assert rows, "bench/results holds no measured row of our kernels"
    chosen = [row for of_family in fit.families(rows).values() for row in fit.validation_half(of_family)]
    errors = measured.errors(measured.compare(chosen))
    assert errors.median <= 0.10 and errors.p90 <= 0.20, errors


def test_fit_finds_the_constants_that_made_the_rows():
    truth = Constants(0.7, 0.8, 2e-7, 1e-7, 2e-6)
    rows = []
    for D in (64, 128, 256):
        for S in (256, 512, 1024, 4096, 16384):
            for causal in (False, True):
                f = dict(kind="forward", backend="hopper", B=max(1, 8192 // S), H=16, Hk=16, M=S, N=S, D=D,
                         dtype="bfloat16", causal=causal, time_us=1.0, gpu="NVIDIA H200")  # fmt: skip
                row = measured.row_of(f, "made")
                rows.append(row._replace(time_s=row.predict(truth).time_s))
    found = fit.fit(rows, fit.START["forward"])
    assert fit.loss(rows, found) < 1e-4
    assert found.matrix == pytest.approx(truth.matrix, rel=0.1)


def test_halves_share_no_shape_and_do_not_depend_on_order():
    f = dict(
        kind="forward",
        backend="triton",
        B=1,
        H=1,
        Hk=1,
        M=64,
        D=64,
        dtype="float16",
        time_us=1.0,
        gpu="NVIDIA H200",
    )
    rows = [measured.row_of(f | {"N": n}, "made") for n in range(64, 74)]
    rows.append(rows[0]._replace(source="measured again"))
    rows.append(measured.row_of(f | {"N": 80, "held_out": True}, "made"))
    a, b = fit.calibration_half(rows), fit.validation_half(rows)
    assert len(a) == len(b) == 6 and not {r.label for r in a} & {r.label for r in b} and rows[-1] in b
    assert {r.label for r in fit.calibration_half(rows[::-1])} == {r.label for r in a}


@pytest.mark.parametrize(
    "change,match",
    [
        ({"N": None}, "lacks N"),
        ({"kind": "sideways"}, "kind must be one of forward"),
        ({"dtype": "float12"}, "dtype must be the name"),
        ({"gpu": "Voodoo 2"}, "gpu must name one of"),
    ],
)
def test_bad_rows_are_refused(change, match):
    good = dict(
        kind="forward",
        backend="triton",
        B=1,
        H=1,
        Hk=1,
        M=64,
        N=64,
        D=64,
        dtype="float16",
        time_us=1.0,
        gpu="H200",
    )
    assert measured.row_of(good, "x").hardware == "h200"
    with pytest.raises(ArgumentValueError, match=match):
        measured.row_of(good | change, "x")


def test_result_files_of_other_kinds_are_passed_over(tmp_path):
    (tmp_path / "a.json").write_text('{"anything": 1}')
    (tmp_path / "b.json").write_text("[1, 2]")
    assert measured.load(measured.result_files(tmp_path)) == []
    with pytest.raises(ArgumentValueError, match="no measured results"):
        measured.result_files(tmp_path / "none")


def test_the_latest_measurement_of_a_call_counts(tmp_path):
    f = dict(kind="forward", backend="triton", B=1, H=1, Hk=1, M=64, N=64, D=64, dtype="float16", gpu="H200")
    for name, date, time_us in (("a", "2026-11-21T20:00", 2.0), ("b", "2026-11-21T16:00", 1.0)):
        content = {
            "meta": {"date": date},
            "rows": [f | {"time_us": time_us}, f | {"M": 32, "time_us": time_us}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "c.json").write_text(json.dumps([f | {"B": 2, "time_us": 5.0}]))
    rows = measured.load(measured.result_files(tmp_path))
    assert sorted(row.time_s for row in rows) == pytest.approx([2e-6, 2e-6, 5e-6])


def test_calibration_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ArgumentValueError, match="--calibrate"):
        get_hardware("local")
    values = calibrate.measure("cpu", small=True)
    assert all(values[name] > 0 for name in calibrate.MEASURED)
    path = calibrate.save(values)
    assert tmp_path in path.parents
    hw = get_hardware("local")
    assert hw.matrix_rate("fp32") == pytest.approx(values["matrix_flops"] / 0.75)
    assert hw.exps == pytest.approx(values["exps"] / calibrate.SUSTAINED_EXP)
    assert estimate(LAYER._replace(dtype=torch.float32), hardware="local").backend == "cpu"
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ArgumentValueError, match="lacks matrix_flops"):
        get_hardware("local")
    with pytest.raises(ArgumentValueError, match="cuda or cpu"):
        calibrate.measure("tpu")


def test_calibrated_gpu_keeps_its_kernels():
    h200 = get_hardware("h200")
    values = dict(device="cuda", name="NVIDIA H200", processors=132, matrix_flops=h200.matrix["bf16"] * 0.75,
                  bandwidth=h200.bandwidth * 0.895, exps=h200.exps * 0.5, launch_s=h200.launch,
                  memory=10**11)  # fmt: skip
    hw = calibrate.hardware_of(values, "here")
    assert estimate(LAYER, hardware=hw).time_s == pytest.approx(estimate(LAYER, hardware="h200").time_s)
    slower = calibrate.hardware_of(values | {"matrix_flops": values["matrix_flops"] / 2}, "here")
    assert estimate(LAYER, hardware=slower).time_s > 1.4 * estimate(LAYER, hardware="h200").time_s


def test_sweep_ranges():
    assert sweep.parse("seqlen=1k:8k").values == [1024, 2048, 4096, 8192]
    assert sweep.parse("head-dim=64,256,128").values == [64, 128, 256]
    assert sweep.parse("batch=1:100:3").values == [1, 10, 100]
    assert sweep.number("1M") == 2**20
    for bad in ("seqlen", "depth=1:2", "seqlen=8:4", "seqlen=a:b", "seqlen=0:4", "seqlen=1:2:3:4"):
        with pytest.raises(ArgumentValueError):
            sweep.parse(bad)


def test_flash_beats_standard_attention_in_memory_and_long_sequences():
    rows = sweep.problem_rows(
        LAYER._replace(batch=1), sweep.parse("seqlen=1k:64k"), [get_hardware("h200")], ["forward"], None
    )
    assert all(row["flash_bytes"] < row["standard_bytes"] for row in rows)
    assert rows[-1]["standard_s"] > 1.5 * rows[-1]["flash_s"]
    growth = (
        rows[-1]["flash_bytes"] / rows[0]["flash_bytes"],
        rows[-1]["standard_bytes"] / rows[0]["standard_bytes"],
    )
    assert growth[0] == 64 and growth[1] > 2000


def test_tables_and_units():
    table = Table([{"a": 1, "b": None}, {"a": 2.5, "b": "x"}])
    assert table.to_csv() == "a,b\n1,\n2.5,x\n" and table.column("a") == [1, 2.5]
    with pytest.raises(ArgumentValueError, match="column must be one of a, b"):
        table.column("c")
    assert [human(x, "B") for x in (0, 1, 999, 1500, 2.5e-6)] == ["0 B", "1 B", "999 B", "1.5 kB", "2.5 uB"]
    assert human(2**30, "B", 1024) == "1 GiB"


@pytest.fixture
def run():
    app = typer.Typer()
    cli.register(app)
    app.command("other")(lambda: None)

    def call(*args, ok=True):
        result = CliRunner().invoke(app, ["cost", *map(str, args)], env={"COLUMNS": "200"})
        assert (result.exit_code == 0) is ok, result.output
        return result.output

    return call


def test_cli_problem_and_compare(run):
    text = run("--causal", "--compare", "a100,h200", "--seqlen", "8k")
    assert "exact" in text and "a100" in text and "hopper backward" in text and "matrix" in text
    assert "825 GFLOP" in run("--mode", "genz-corrected") and "275 GFLOP" in run("--mode", "paper")


def test_cli_model_and_genz(run, tmp_path):
    text = run("--model", "llama-3.1-70b", "--phase", "decode", "--hardware", "h100")
    assert "does not fit" in text and "ffn up" in text and "largest batch" in text
    out = tmp_path / "rows.csv"
    text = run("--model", "llama2_7b", "--mode", "genz-original", "--hardware", "A100_80GB_GPU", "--csv", out)
    assert "205.1122" in text and out.read_text().startswith("hardware,mode,Layer Name")
    assert "261.4974" in run(
        "--model", "llama2_7b", "--mode", "genz-corrected", "--hardware", "A100_80GB_GPU"
    )
    assert "requests/s" in run(
        "--model", "llama2_7b", "--mode", "genz-original", "--phase", "decode", "--hardware", "h200"
    )


def test_cli_sweep_writes_files(run, tmp_path):
    files = [tmp_path / name for name in ("s.png", "s.csv", "s.json")]
    run("--sweep", "seqlen=1k:4k", "--png", files[0], "--csv", files[1], "--json", files[2])
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    assert files[1].read_text().count("\n") == 7 and len(json.loads(files[2].read_text())) == 6
    run("--model", "qwen3-8b", "--sweep", "batch=1:4", "--phase", "decode", "--png", files[0])


def test_cli_list_calibrate_validate(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda device: MEASURED_CPU)
    assert "mixtral-8x7b" in run("--list") and "hardware local" in run("--calibrate", "--device", "cpu")
    row = dict(kind="forward", backend="hopper", B=4, H=16, Hk=16, M=4096, N=4096, D=128, dtype="bfloat16",
               time_us=880.0, gpu="NVIDIA H200")  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps([row]))
    png = tmp_path / "v.png"
    assert "90th percentile" in run("--validate", "--results", tmp_path, "--png", png)
    assert png.read_bytes()[:4] == b"\x89PNG"


MEASURED_CPU = dict(
    device="cpu", name="some CPU", processors=8, dtype="float32", matrix_flops=1e12, bandwidth=5e10, exps=1e10,
    launch_s=5e-6, memory=2**36, torch="2.9", date="2026-01-01",
)  # fmt: skip


@pytest.mark.parametrize(
    "args,match",
    [
        (("--hardware", "h3"), "a100, h100"),
        (("--mode", "x"), "paper, genz-original"),
        (("--model", "nope"), "llama-2-7b"),
        (("--model", "qwen3-8b", "--phase", "chat"), "prefill, decode, train"),
        (("--model", "qwen3-8b", "--tensor", "3"), "tensor parallelism"),
        (("--model", "qwen3-8b", "--mode", "paper"), "mode must be exact"),
        (("--model", "qwen3-8b", "--mode", "genz-original", "--phase", "train"), "training"),
        (("--seqlen", "0"), "--seqlen must be positive"),
        (("--sweep", "depth=1:2"), "seqlen"),
        (("--backend", "cuda"), "hopper, triton, cpu"),
        (("--png", "x.png"), "sweep"),
        (("--direction", "up"), "forward, backward, both"),
        (("--heads", "6", "--kv-heads", "4"), "kv-heads"),
        (("--validate", "--results", "/nonexistent"), "no measured results"),
        (("--results", "somewhere"), "--validate"),
        (("--csv", "/nonexistent/rows.csv"), "no folder /nonexistent"),
        (("--seqlen", "1e30"), "--seqlen must be an integer"),
        (("--backend", "cpu"), "does not run on NVIDIA H200"),
        (("--backend", "hopper", "--hardware", "a100"), "h100 and h200"),
        (("--model", "qwen3-8b", "--micro-batches", "-2"), "micro_batches must be 0"),
    ],
)
def test_cli_bad_input(run, args, match):
    assert match in run(*args, ok=False)


def test_peers_and_families_are_listed_when_unknown():
    with pytest.raises(ArgumentValueError, match=", ".join(PEERS)):
        estimate_peer(LAYER, "fa9")
    with pytest.raises(ArgumentValueError, match="hopper/forward"):
        constants("hopper", "sideways")
    with pytest.raises(ArgumentValueError, match="dtype must be one of bf16"):
        estimate(LAYER._replace(dtype=torch.float64), hardware="h200")
