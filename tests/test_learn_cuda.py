"""The CUDA ladder without a GPU: every step runs right in the emulator, and says what to change when it cannot run."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from learn.cuda import check_with_torch, ladder

# the steps of the ladder beside one of each kind of case; check_with_torch itself runs all of them
CASES = {(100, 150), (150, 100), (5, 0)}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Builds a step for the CPU."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler for the emulator")
    # with pytest-xdist the parent of a worker's folder is common to all, so that each step is built once
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    return lambda step, head_dim=64: ladder.load(ladder.build(step, head_dim, None, folder))


def test_the_ladder_has_no_missing_rung():
    numbers = [int(step.split("_")[1]) for step in ladder.steps()[1:]]
    assert numbers == list(range(2, len(numbers) + 2))
    assert len(numbers) >= 13


@pytest.mark.parametrize("step", ladder.steps())
def test_step(step, emulated, capsys):
    library = emulated(step)
    cases, dims, dtypes, has_backward = check_with_torch.workload(library, 64, "cpu")
    for dtype in dtypes:
        for d in dims:
            for m, n, options in cases:
                if (m, n) in CASES or "dropout_p" in options:
                    gradients = has_backward and n > 0
                    rows = check_with_torch.check(library, m, n, d, dtype, "cpu", options, gradients, 1, 2)
                    for name, ours, theirs in rows:
                        assert check_with_torch.passes(ours, theirs), (
                            name,
                            ours,
                            theirs,
                            m,
                            n,
                            d,
                            dtype,
                            options,
                        )


def test_the_16_bit_types_of_the_emulator_round_like_torch(tmp_path):
    """Every fp16 and bf16 number, the midpoints between neighbours, and what lies beside those."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler for the emulator")
    source = tmp_path / "types.cpp"
    source.write_text("""
        #include "common.cuh"
        extern "C" void to_half(const float* x, uint16_t* y, int n) { while (n--) y[n] = __float2half(x[n]).bits; }
        extern "C" void from_half(const uint16_t* x, float* y, int n) { while (n--) y[n] = __half2float({x[n]}); }
        extern "C" void to_bf16(const float* x, uint16_t* y, int n) { while (n--) y[n] = __float2bfloat16(x[n]).bits; }
        extern "C" void from_bf16(const uint16_t* x, float* y, int n) { while (n--) y[n] = __bfloat162float({x[n]}); }
    """)
    words = ladder.compile_command("flash_attn_minimal", tmp_path / "types.so", 64, None, f"-I{ladder.HERE}")
    subprocess.run([str(source) if word.endswith(".cu") else word for word in words], check=True)
    library = ctypes.CDLL(str(tmp_path / "types.so"))

    def convert(name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = torch.empty(len(x), dtype=dtype)
        getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), len(x))
        return y

    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for name, dtype in (("half", torch.float16), ("bf16", torch.bfloat16)):
        floats = convert(f"from_{name}", codes, torch.float32)
        assert floats.nan_to_num(7.0).equal(codes.view(dtype).float().nan_to_num(7.0))
        finite = floats[floats.isfinite()].sort().values
        middle = (finite[:-1].double() + finite[1:].double()).div(2).float()
        inputs = torch.cat(
            [finite, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), floats]
        )
        inputs = torch.cat([inputs, torch.tensor([65519.996, 65520.0, 1e6, -1e6, 3.4e38, 1e-9, -1e-9])])
        got, want = convert(f"to_{name}", inputs, torch.int16).view(dtype), inputs.to(dtype)
        assert got.isnan().equal(want.isnan())
        assert got[~want.isnan()].view(torch.int16).equal(want[~want.isnan()].view(torch.int16))


def test_a_wrong_kernel_does_not_pass(emulated):
    # what test_step would see if the step forgot the last key
    library = emulated("flash_attn_minimal")
    q, k, v = (torch.randn(1, 70, 2, 64).half() for _ in range(3))
    out, _ = ladder.forward(library, q, k[:, :-1].contiguous(), v[:, :-1].contiguous())
    want = check_with_torch.reference(*(x.double() for x in (q, k, v)))[0]
    theirs = check_with_torch.error(check_with_torch.pytorch(q, k, v), want)
    assert not check_with_torch.passes(check_with_torch.error(out, want), theirs)


def test_nan_beyond_the_tensors_does_not_leak(emulated):
    library = emulated("step_09_pipeline")
    whole = [torch.full((1, 128, 1, 64), float("nan")).half() for _ in range(3)]
    for x in whole:
        x[:, :100] = torch.randn(1, 100, 1, 64)
    q, k, v = (x[:, :100] for x in whole)
    assert all(x.is_contiguous() for x in (q, k, v))
    out, lse = ladder.forward(library, q, k, v)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 96}, r"head_dim is 96 but kHeadDim is 64: build again with make HEAD_DIM=96"),
        ({"dtype": torch.bfloat16}, r"no kernel for bf16: see step_13"),
        ({"causal": True}, r"no causal mask: see step_10_causal\.cu"),
        ({"dropout_p": 0.5}, r"no dropout: see step_11_dropout\.cu"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1\.5"),
        ({"scale": -1.0}, r"scale must be positive, got -1"),
    ],
)
def test_what_a_step_cannot_do_is_said(changes, message, emulated):
    changes = dict(changes)
    d, dtype = changes.pop("head_dim", 64), changes.pop("dtype", torch.float16)
    x = torch.zeros(1, 8, 1, d, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        ladder.forward(emulated("flash_attn_minimal"), x, x, x, **changes)


def test_no_backward_is_said(emulated):
    x, lse = torch.zeros(1, 8, 1, 64).half(), torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match=r"no backward: see step_12_backward\.cu"):
        ladder.backward(emulated("step_07_mma"), x, x, x, x, lse, x)


@pytest.mark.parametrize(
    ("edit", "head_dim", "message"),
    [
        (("kBlockM = 64", "kBlockM = 512"), 64, "kNThreads must be a multiple of kBlockM"),
        (("kBlockN = 64", "kBlockN = 1024"), 64, "too much shared memory: make kBlockM or kBlockN smaller"),
        (("", ""), 65, "kHeadDim must be a multiple of"),
    ],
)
def test_a_constant_that_cannot_be_is_named(edit, head_dim, message, emulated, tmp_path):
    for source in ladder.HERE.glob("*.*h"):
        shutil.copy(source, tmp_path)
    text = (ladder.HERE / "flash_attn_minimal.cu").read_text()
    assert edit[0] in text
    (tmp_path / "flash_attn_minimal.cu").write_text(text.replace(*edit))
    words = ladder.compile_command("flash_attn_minimal", tmp_path / "x.so", head_dim, None)
    words = [str(tmp_path / "flash_attn_minimal.cu") if word.endswith(".cu") else word for word in words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode and message in done.stderr


def test_build_and_run_without_nvcc_says_what_is_left(tmp_path):
    for name in ("bash", "dirname", "head", "ls"):
        (tmp_path / name).symlink_to(shutil.which(name))
    text = (ladder.HERE / "build_and_run.sh").read_text()
    script = tmp_path / "build_and_run.sh"
    # not even where a toolkit usually lies
    script.write_text(re.sub(r"/usr/local/cuda/bin/nvcc", "/nonexistent/nvcc", text))
    for options in ([], ["--quick"]):
        env = {"PATH": str(tmp_path), "PYTHON": "no-python"}
        done = subprocess.run(["bash", script, *options], env=env, capture_output=True, text=True)
        assert done.returncode == 1
        assert (
            "Missing: nvcc" in done.stdout and "flash-attn learn" in done.stdout and "No torch" in done.stdout
        )


def test_the_rows_of_a_measurement(emulated, monkeypatch):
    """Everything of `measure` but the clock: what is timed beside what, and how a row reads."""
    from learn.cuda import measure

    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "TOKENS", 64)
    monkeypatch.setattr(measure, "WIDTH", 128)
    monkeypatch.setattr(
        measure, "race", lambda runs, rounds, least: {n: 1e-3 * (i + 1) for i, n in enumerate(runs)}
    )
    names = [step for step in ladder.steps() if step.startswith(("step_09", "step_11", "step_12", "step_13"))]
    words = SimpleNamespace(rounds=1, least=0.0)
    rows = measure.measure_cell({name: emulated(name) for name in names}, 64, 32, words)
    full = {row["step"]: row for row in rows if row["peer"] == "FA2" and row["direction"] == "forward"}
    assert set(full) == {"FA2", *names}
    backward = next(
        row for row in rows if row["direction"] == "backward" and row["step"] == "step_12_backward"
    )
    # 2.5 times 4 B M N H D over 2 ms, half the speed of the peer's 1 ms
    assert backward["tflops"] == pytest.approx(2.5 * 4 * 64 * 32 * 128 / 2e-3 / 1e12)
    assert backward["of_peer"] == 0.5
    assert {row["dtype"] for row in rows if row["step"].startswith("step_13")} == {
        "float16",
        "bfloat16",
        "float32",
    }
    assert "0.50 of FA2" in measure.describe(backward)


def test_a_time_line_reads_as_a_table():
    """What the profiler writes becomes one line for equal launches, the longest first, and the share of busy time."""
    from learn.cuda import timeline

    args = {"grid": [64, 16, 2], "block": [128, 1, 1], "registers per thread": 170, "shared memory": 50176}
    trace = {
        "traceEvents": [
            {"cat": "cpu_op", "name": "aten::fill_", "ts": 0.0, "dur": 5.0},
            {
                "cat": "kernel",
                "name": "void small(float)",
                "ts": 90.0,
                "dur": 10.0,
                "args": {"grid": [1, 1, 1]},
            },
            {"cat": "kernel", "name": "dq_kernel<false>(FlashArgs)", "ts": 10.0, "dur": 40.0, "args": args},
            {"cat": "kernel", "name": "dq_kernel<false>(FlashArgs)", "ts": 50.0, "dur": 20.0, "args": args},
        ]
    }
    head, first, second, busy = timeline.table_of(timeline.events_of(trace))
    assert first.split() == ["2", "30.0", "64x16x2", "128x1x1", "170", "50176", "dq_kernel<false>"]
    assert second.split() == ["1", "10.0", "1x1x1", "small"]
    assert head.split()[:3] == ["calls", "us", "a"] and busy == "busy 70 us of 90 us: 78%"


def test_learn_lists_the_ladder():
    typer, testing = pytest.importorskip("typer"), pytest.importorskip("typer.testing")
    from flash_attn.cli import learn

    app = typer.Typer()
    learn.register(app)
    app.command("other")(lambda: None)
    listed = testing.CliRunner().invoke(app, ["learn"]).output
    assert all(ladder.first_line(step) in listed for step in ladder.steps())


def nvcc_or_skip() -> str:
    nvcc = ladder.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not here: the CUDA steps are not compiled (the emulator tests still ran)")
    return nvcc


@pytest.mark.compile
@pytest.mark.parametrize("step", ladder.steps())
def test_step_compiles(step, tmp_path):
    nvcc_or_skip()
    words = ladder.compile_command(step, tmp_path / "x.so", 64, "sm_90", "--Werror=all-warnings")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.compile
def test_the_driver_compiles_and_asks_for_a_gpu(tmp_path):
    nvcc = nvcc_or_skip()
    binary = tmp_path / "test_flash_attn"
    source = ladder.HERE / "test_flash_attn.cu"
    subprocess.run([nvcc, "-std=c++17", "-arch=sm_90", str(source), "-o", str(binary), "-ldl"], check=True)
    done = subprocess.run([binary], env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU here" in done.stderr


@pytest.mark.compile
def test_an_old_gpu_is_named(tmp_path):
    nvcc_or_skip()
    words = ladder.compile_command("step_09_pipeline", tmp_path / "x.so", 64, "sm_75")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode and "make CUDA_ARCH=sm_80" in done.stderr


def test_the_module_runs_as_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "learn.cuda.check_with_torch", "--help"],
        cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--emulate" in done.stdout
