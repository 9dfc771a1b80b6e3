"""GenZ re-implemented: 37 golden runs of genz-llm 0.0.16, seed 000's switch and constant, both memory views."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn.cost as cost
from flash_attn.cost.genz.flash_attention_config import using_mode
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError

GOLDEN = json.loads((Path(__file__).parent / "data" / "genz_golden.json").read_text())
RUN = {"prefill": cost.prefill_moddeling, "decode": cost.decode_moddeling, "chunked": cost.chunked_moddeling}
LLAMA = {"model": "llama2_7b", "system_name": "A100_80GB_GPU"}


@pytest.fixture(autouse=True)
def corrected_by_default():
    yield
    cost.set_flash_attention_mode(use_corrected=True)


def same(ours, golden):
    """Equal, numbers to 1e-9 relative."""
    if isinstance(golden, list):
        return len(ours) == len(golden) and all(map(same, ours, golden))
    if isinstance(golden, (int, float)):
        return abs(ours - golden) <= 1e-9 * abs(golden)
    return ours == golden


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_golden_run(name):
    golden = GOLDEN["runs"][name]
    got = RUN[name.split("/")[0]](**golden["args"], mode="genz-original")
    assert got.mode == "genz-original"
    assert same(got.Latency, golden["latency_ms"]) and same(got.Throughput, golden["throughput"])
    breakdown = got.Runtime_breakdown.to_dict()
    assert list(breakdown) == GOLDEN["breakdown_columns"] and same(
        list(breakdown.values()), golden["breakdown"]
    )
    summary = got.summary_table[0]
    assert set(summary) == set(GOLDEN["summary_columns"])
    assert same([summary[key] for key in GOLDEN["summary_columns"]], golden["summary"])
    assert len(got.model_df) == len(golden["rows"]) and got.model_df.columns == GOLDEN["row_columns"]
    for line, row in zip(got.model_df, golden["rows"], strict=True):
        for (key, ours), theirs in zip(line.items(), row, strict=True):
            assert same(ours, theirs), (line["Layer Name"], key, ours, theirs)


def test_there_are_37_golden_runs():
    assert len(GOLDEN["runs"]) == 37


def test_the_switch_is_read_at_call_time_and_drives_the_constant():
    assert cost.USE_CORRECTED_FLASH_ATTENTION is True
    logit = cost.Logit(["Logit", 2, 4, 8, 16, 32, 4, 0, cost.OpType.Logit])
    assert logit.get_num_ops() == 3.0 * 2 * 4 * 8 * 16 * 32
    corrected = cost.prefill_moddeling(**LLAMA)
    assert corrected.Latency == pytest.approx(261.4974, abs=1e-4)
    cost.set_flash_attention_mode(use_corrected=False)
    assert cost.USE_CORRECTED_FLASH_ATTENTION is False and not cost.flash_attention_config.is_corrected()
    assert logit.get_num_ops() == 2 * 4 * 8 * 16 * 32
    names = [f.__name__ for f in cost.get_flash_attention_implementation()]
    assert names == ["mha_flash_attention_prefill", "mha_flash_attention_decode"]
    original = cost.prefill_moddeling(**LLAMA)
    assert original.Latency == pytest.approx(205.11222022564104, rel=1e-12)
    ratio = corrected.Runtime_breakdown.LA_layers / original.Runtime_breakdown.LA_layers
    assert ratio == pytest.approx(3.0, rel=1e-12)
    cost.USE_CORRECTED_FLASH_ATTENTION = True  # assignment through the package reaches the same switch
    names = [f.__name__ for f in cost.get_flash_attention_implementation()]
    assert names == ["mha_flash_attention_corrected_prefill", "mha_flash_attention_corrected_decode"]
    assert cost.prefill_moddeling(**LLAMA).Latency == corrected.Latency


@pytest.mark.parametrize("constant", [1.0, 3.0, 4.5])
@pytest.mark.parametrize("phase", RUN)
def test_operations_scale_by_exactly_the_constant(phase, constant):
    def ops(**mode):
        rows = RUN[phase](**LLAMA, **mode).model_df
        return [round(row["Num ops (MFLOP)"] * 1e6) for row in rows if row["Op Type"] in ("Logit", "Attend")]

    corrected, original = ops(mode="genz-corrected", softmax_constant=constant), ops(mode="genz-original")
    assert len(original) >= 2 and corrected == [constant * n for n in original]


def test_identity_of_seed_003():
    rows = cost.prefill_moddeling(**LLAMA, mode="genz-original").model_df
    total = sum(row["Num ops (MFLOP)"] for row in rows if row["Op Type"] in ("Logit", "Attend")) * 1e6
    assert total == 4 * 4096**2 * 128 * 1 * 32


def test_sequence_parallelism_is_what_the_correction_ignores():
    model, four = cost.get_configs("llama2_7b"), cost.ParallelismConfig(sequence_parallel=4)
    original = cost.mha_flash_attention_prefill(model, four, 4096)
    corrected = cost.mha_flash_attention_corrected_prefill(model, four, 4096)
    assert [row[3] for row in original if row[0] == "Logit"] == [1024]
    assert [row[3] for row in corrected if row[0] == "Logit"] == [4096]
    one = cost.ParallelismConfig()
    assert cost.mha_flash_attention_prefill(model, one, 4096) == cost.mha_flash_attention_corrected_prefill(
        model, one, 4096
    )
    decode = cost.mha_flash_attention_corrected_decode(model, four, 4096, 256)
    assert [row[3] for row in decode if row[0].endswith("Pre")] == [4096, 4096]
    assert [row[3] for row in decode if row[0].endswith("Suf")] == [256, 256]
    chunk = (model, four, 8, [(4, 4)], [9, 10, 11, 12])
    assert cost.mha_flash_attention_chunked(*chunk) == cost.mha_flash_attention_corrected_chunked(*chunk)


@pytest.mark.parametrize("phase", RUN)
def test_residency_and_coefficient_agree_when_on_chip_memory_is_free(phase):
    def attention_ms(onchip, memory):
        system = cost.System(flops=312e9, onchip_mem_bw=onchip, offchip_mem_bw=2039, frequency=1000)
        got = RUN[phase](model="llama2_7b", system_name=system, mode="genz-original", memory=memory)
        assert got.memory == memory
        return got.Runtime_breakdown.LA_layers

    assert attention_ms(1e30, "coefficient") == pytest.approx(attention_ms(1e30, "residency"), rel=1e-12)
    # With GenZ's finite on-chip bandwidth residency charges for S and P, the coefficient does not.
    assert attention_ms(18000, "coefficient") < attention_ms(18000, "residency")


def test_mode_can_be_chosen_for_one_block():
    with using_mode("genz-original"):
        assert cost.prefill_moddeling(**LLAMA).mode == "genz-original"
        with using_mode("genz-corrected", 2.0):
            assert cost.flash_attention_config.softmax_constant() == 2.0
    assert cost.prefill_moddeling(**LLAMA).mode == "genz-corrected"


def test_models_are_rows_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = cost.create_full_prefill_model("llama2_7b", 128, pipeline_parallel=4, tensor_parallel=2)
    df = cost.get_model_df(rows, cost.System())
    simple = cost.simplify_df(df)
    assert not any("Repeat" in row["Op Type"] for row in simple)
    assert sum(row["Latency (msec)"] for row in simple) == pytest.approx(
        cost.get_summary_table(df)[0]["Latency (msec)"]
    )
    assert cost.get_runtime_breakdown(df).Send_Recv_time > 0
    assert df.to_csv().count("\n") == len(df) + 1 and json.loads(df.to_json())[0]["Op Type"] == "GEMM"
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_or_offloaded():
    big = {"model": "llama2_70b", "system_name": "A100_80GB_GPU"}
    with pytest.raises(ArgumentValueError, match="must fit"):
        cost.prefill_moddeling(**big)
    with pytest.warns(UserWarning, match="host memory"):
        assert cost.prefill_moddeling(**big, model_offload=True).is_offload is True


def test_bad_input_lists_what_is_known():
    with pytest.raises(ArgumentValueError, match="qwen3-8b"):
        cost.prefill_moddeling("llama9")
    with pytest.raises(ArgumentValueError, match="H100_GPU"):
        cost.prefill_moddeling(system_name="H900")
    with pytest.raises(ArgumentValueError, match="Memory_BW, ICN"):
        cost.prefill_moddeling(system_name={"Flops": 1, "Memory_size": 1})
    with pytest.raises(ArgumentTypeError, match="system_name"):
        cost.prefill_moddeling(system_name=3)
    with pytest.raises(ArgumentValueError, match="int8, bf16"):
        cost.prefill_moddeling(bits="bf17")
    with pytest.raises(ArgumentValueError, match="genz-original, genz-corrected"):
        cost.decode_moddeling(mode="exact")
    with pytest.raises(ArgumentValueError, match="residency, coefficient"):
        cost.prefill_moddeling(memory="both")
    with pytest.raises(ArgumentValueError, match="unit_mem"):
        cost.Unit(unit_mem="XB")
    with pytest.raises(ArgumentValueError, match="flops must be positive"):
        cost.System(flops=0)
    for name in ("batch_size", "input_tokens", "tensor_parallel", "pipeline_parallel"):
        with pytest.raises(ArgumentValueError, match=name.replace("input_tokens", "input_sequence_length")):
            cost.prefill_moddeling(**{name: 0})
    with pytest.raises(ArgumentValueError, match="expert_parallel"):
        cost.prefill_moddeling(expert_parallel=2)
    with pytest.raises(ArgumentValueError, match="tensor_parallel, pipeline"):
        cost.create_full_prefill_model("llama2_7b", 128, tensor_paralel=2)
    with pytest.raises(ArgumentValueError, match="Hkv must divide"):
        cost.Logit(["Logit", 1, 6, 8, 8, 8, 4, 0, cost.OpType.Logit])


FAKE_GENZ = {
    "__init__.py": "",
    "operators.py": """
class Logit:
    def __init__(self, *dim): self.dim = dim
    def get_num_ops(self):
        total = 1
        for size in self.dim: total *= size
        return total
class Attend(Logit):
    def get_num_ops(self): return super().get_num_ops()
""",
    "Models/__init__.py": "",
    "Models/attention.py": """
def mha_flash_attention_prefill(model, par, length):
    return [["Logit", 1, length, length // par, 1, 1, 0, 4]]
def mha_flash_attention_decode(model, par, length, generated):
    return [["Logit Pre", 1, 1, length // par, 1, 1, 0, 4], ["Logit Suf", 1, 1, generated, 1, 1, 0, 4]]
""",
    "Models/get_language_model.py": "from GenZ.Models.attention import *",
}


def test_patch_genz_applies_and_undoes_the_correction(tmp_path):
    """Against a stand-in with GenZ's module layout; docs/cost-model.md tells how it was run on genz-llm itself."""
    for name, text in FAKE_GENZ.items():
        path = tmp_path / "GenZ" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = """
import sys; sys.path.insert(0, sys.argv[1])
from flash_attn.cost import patch_genz
from flash_attn.errors import UnsupportedError
from GenZ import operators
from GenZ.Models import get_language_model as builders
def state():
    rows = builders.mha_flash_attention_prefill(0, 4, 64) + builders.mha_flash_attention_decode(0, 4, 64, 5)
    return operators.Logit(2, 3).get_num_ops(), operators.Attend(2, 3).get_num_ops(), [row[3] for row in rows]
assert state() == (6, 6, [16, 16, 5]), state()
with patch_genz(2.0):
    assert operators.Logit(2, 3).get_num_ops() == 12 and state()[2] == [64, 64, 5], state()
    try: patch_genz()
    except UnsupportedError: pass
    else: raise AssertionError("patched twice")
assert state() == (6, 6, [16, 16, 5]), state()
patch = patch_genz(); patch.undo(); patch.undo()
assert state() == (6, 6, [16, 16, 5])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_patch_genz_says_what_is_missing():
    try:
        import GenZ  # noqa: F401
    except ImportError:
        with pytest.raises(UnsupportedError, match="genz-llm"):
            cost.patch_genz()
