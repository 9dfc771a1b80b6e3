"""The command line: every command answers, errors are one line, and the demo's parts check what they claim."""

import json

import pytest
import torch

typer = pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from flash_attn.cli import bench, cost, demo, env, explain, learn  # noqa: E402
from flash_attn.cli.gpt import GPT, Shape, flash_attention, naive_attention  # noqa: E402


def run(module, *words: str):
    app = typer.Typer()
    app.callback()(lambda: None)
    module.register(app)
    return CliRunner().invoke(app, list(words))


def test_env_says_what_is_here():
    result = run(env, "env")
    assert result.exit_code == 0, result.output
    for word in ("flash-attn", "python", torch.__version__, "FLASH_ATTN_BACKEND"):
        assert word in result.output


def test_explain_plans_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton")
    result = run(explain, "explain", "--device", "h200", "--causal", "--head-dim", "128")
    assert result.exit_code == 0, result.output
    assert "runs it" in result.output and "hopper" in result.output
    plain = run(explain, "explain", "--device", "cpu")
    assert "cpu" in plain.output and "runs it" in plain.output


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "abacus"], "must be one of"),
        (["--dtype", "int3"], "must be one of"),
        (["--window", "nine"], "LEFT,RIGHT"),
        (["--heads", "6", "--kv-heads", "4"], "must divide"),
    ],
)
def test_explain_names_what_is_wrong(words, message):
    result = run(explain, "explain", *words)
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "module, words, message",
    [
        (bench, ["bench", "--device", "cpu", "--seqlens", "16,many"], "--seqlens must be positive integers"),
        (bench, ["bench", "--device", "cpu", "--seqlens", "0"], "--seqlens must be positive integers"),
        (bench, ["bench", "--device", "cpu", "--head-dims", ""], "--head-dims must be positive integers"),
        (bench, ["bench", "--device", "abacus"], "--device must be one of cpu, cuda"),
        (cost, ["cost", "--device", "h100"], "--device is what --calibrate measures"),
        (cost, ["cost", "--phase", "decode", "--tensor", "8"], "--phase, --tensor: of a whole model"),
    ],
    ids=["not a number", "zero", "nothing", "device", "ignored", "ignored without a model"],
)
def test_options_that_cannot_be_followed_are_errors(module, words, message):
    """The first three were tracebacks; the last two were ignored, so that --device h100 gave figures of an H200."""
    result = run(module, *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_says_that_there_is_no_gpu():
    result = run(bench, "bench", "--device", "cuda")
    assert result.exit_code == 2 and "no GPU" in result.output


def test_bench_writes_rows_table_and_plot(tmp_path):
    result = run(
        bench, "bench", "--seqlens", "32,64", "--head-dims", "16", "--dtypes", "fp32", "--heads", "2",
        "--seconds", "0.01", "--device", "cpu", "--memory", "512", "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert {row["backend"] for row in saved["rows"]} == {"cpu", "torch-sdpa"}
    assert {row["kind"] for row in saved["rows"]} == {"forward", "backward"}
    assert all(row["time_us"] > 0 for row in saved["rows"]) and saved["meta"]["torch"] == torch.__version__
    assert (tmp_path / "rows.csv").read_text().count("\n") == len(saved["rows"]) + 1
    extra = json.loads((tmp_path / "host.json").read_text())
    assert {row["kind"] for row in extra} == {"host", "memory"}
    assert 0 < extra[-1]["peak_extra_mb"] < extra[-1]["score_matrix_mb"]
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_learn_lists_the_lessons():
    result = run(learn, "learn")
    assert result.exit_code == 0 and "Lesson 15." in result.output
    assert run(learn, "learn", "run", "99").exit_code != 0


def test_demo_finds_ours_as_exact_as_torch():
    assert demo.check_exactness("cpu")


def test_demo_refuses_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(demo, "demo", "--device", "cuda").exit_code != 0


def test_gpt_trains_alike_and_generates_alike():
    text = demo.library_text(20_000)
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([index[c] for c in text])
    curves = {}
    for name, attention in (("flash", flash_attention), ("naive", naive_attention)):
        torch.manual_seed(0)
        model = GPT(Shape(len(index), context=64, layers=2, heads=2, width=32))
        curves[name] = demo.train(model, data, 6, attention, name, batch=2)
    assert curves["flash"] == pytest.approx(curves["naive"], abs=1e-4)
    assert curves["flash"][-1] < curves["flash"][0]
    prompt = data[None, :5]
    assert torch.equal(model.generate(prompt, 20), model.generate_uncached(prompt, 20))
