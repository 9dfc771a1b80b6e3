"""Whole models: shapes, config files, parallelism, memory, and what bounds a step."""

import json

import pytest

from flash_attn.cost.hardware import get_hardware
from flash_attn.cost.models import KNOWN, from_config, get_model
from flash_attn.cost.whole import Parallel, estimate_model, largest
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError

# Published parameter counts, billions (model cards; for mixtures total and active).
PARAMETERS = {
    "llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977, "llama-3-8b": 8.030, "llama-3.1-70b": 70.554,
    "llama-3.1-405b": 405.853, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213, "qwen3-8b": 8.191, "qwen3-14b": 14.768,
    "qwen3-32b": 32.762, "qwen3-30b-a3b": 30.532, "qwen3-235b-a22b": 235.094, "mixtral-8x7b": 46.703,
    "mixtral-8x22b": 140.630, "gpt3-175b": 174.6,
}  # fmt: skip
ACTIVE = {"qwen3-30b-a3b": 3.35, "qwen3-235b-a22b": 22.2, "mixtral-8x7b": 12.88, "mixtral-8x22b": 39.2}
LLAMA_CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    shape = get_model(name)
    assert shape.parameters() / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)
    if name in ACTIVE:
        assert shape.parameters(active=True) / 1e9 == pytest.approx(ACTIVE[name], rel=0.01)


def test_names_are_found_however_they_are_written():
    assert get_model("meta-llama/Llama-3.1-70B") is get_model("llama3_70b") is KNOWN["llama-3.1-70b"]
    assert get_model("Qwen/Qwen3-8B") is KNOWN["qwen3-8b"]


def test_config_file_gives_the_known_model(tmp_path):
    path = tmp_path / "Llama-3.1-8B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_CONFIG))
    from_file = get_model(path)
    assert from_file == get_model(path.parent) == get_model(str(path))
    assert from_file._replace(name="") == KNOWN["llama-3.1-8b"]._replace(name="")
    assert from_file.parameters() == KNOWN["llama-3.1-8b"].parameters()


def test_config_dialects():
    gpt2 = from_config(
        {
            "model_type": "gpt2",
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "vocab_size": 50257,
            "n_positions": 1024,
        }
    )
    assert gpt2.intermediate == 3072 and not gpt2.gated and gpt2.tied and gpt2.positions == 1024
    assert gpt2.parameters() / 1e6 == pytest.approx(124.4, rel=2e-3)
    moe = from_config(
        LLAMA_CONFIG | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 768, "mlp_only_layers": [0, 1], "head_dim": 64}
    )  # fmt: skip
    assert (moe.experts, moe.top_k, moe.intermediate, moe.moe_layers, moe.head_dim) == (8, 2, 768, 30, 64)
    assert moe.dense_intermediate == 14336
    windowed = from_config(
        LLAMA_CONFIG | {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}
    )
    assert (windowed.window, windowed.windowed_layers) == (128, 16)
    nested = from_config({"text_config": LLAMA_CONFIG, "vision_config": {}})
    assert nested.hidden == 4096


def test_missing_keys_are_named():
    short = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("hidden_size", "vocab_size")}
    with pytest.raises(ArgumentValueError, match="hidden_size.*vocab_size"):
        from_config(short)
    with pytest.raises(ArgumentValueError, match="intermediate_size"):
        from_config({k: v for k, v in LLAMA_CONFIG.items() if k != "intermediate_size"})
    with pytest.raises(ArgumentValueError, match="num_experts_per_tok"):
        from_config(LLAMA_CONFIG | {"num_experts": 4})
    with pytest.raises(UnsupportedError, match="kv_lora_rank"):
        from_config(LLAMA_CONFIG | {"kv_lora_rank": 512})
    with pytest.raises(ArgumentValueError, match="kv_heads must divide"):
        from_config(LLAMA_CONFIG | {"num_key_value_heads": 5})
    with pytest.raises(ArgumentValueError, match="layers must be an integer"):
        from_config(LLAMA_CONFIG | {"num_hidden_layers": -1})
    with pytest.raises(ArgumentTypeError, match="JSON object"):
        from_config([1])


def test_bad_config_files(tmp_path):
    with pytest.raises(ArgumentValueError, match="does not exist"):
        get_model(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArgumentValueError, match="not JSON"):
        get_model(tmp_path)
    with pytest.raises(ArgumentValueError, match="llama-2-7b, .*mixtral"):
        get_model("llama-99")
    with pytest.raises(ArgumentTypeError, match="model must be"):
        get_model(7)


def test_decode_is_bound_by_reading_weights_and_cache():
    e = estimate_model("llama-3.1-8b", "decode", "h100", batch=1, seqlen=1024)
    floor = get_model("llama-3.1-8b").parameters() * 2 / 3.35e12
    assert floor < e.time_s < 2 * floor
    assert e.bound.endswith("(memory)") and e.tokens == 1
    long = estimate_model("llama-3.1-8b", "decode", "h100", batch=32, seqlen=16384)
    assert long.bound == "attention (memory)"


def test_prefill_of_a_long_prompt_is_bound_by_attention_and_of_a_short_one_by_the_feed_forward():
    short, long = (estimate_model("llama-3.1-8b", "prefill", "h100", seqlen=s) for s in (2048, 131072))
    assert short.bound.startswith("ffn") and long.bound.startswith("attention")
    assert 0.4 < short.utilisation < 0.75
    assert sum(part.time_s for part in long.parts) == pytest.approx(long.time_s)


def test_training_costs_three_forwards_and_the_optimizer():
    # The prefill's classifier sees one token of each sequence, the training step's all of them.
    model = get_model("llama-3.1-8b")._replace(vocab=1)
    forward = estimate_model(model, "prefill", "h200", seqlen=4096)
    train = estimate_model(model, "train", "h200", seqlen=4096)
    recomputed = estimate_model(model, "train", "h200", seqlen=4096, recompute=True)
    flops = [sum(part.flops for part in e.parts) for e in (forward, train, recomputed)]
    products = sum(p.flops for p in forward.parts if p.name != "attention")
    attention = flops[0] - products
    assert flops[1] == pytest.approx(3 * products + 3.5 * attention, rel=1e-3)
    assert flops[2] == pytest.approx(4 * products + 4.5 * attention, rel=1e-3)
    assert recomputed.memory["activations"] < train.memory["activations"] / 5
    assert train.memory["weights, gradients, optimizer"] == model.parameters() * 16
    assert any(part.name == "optimizer" for part in train.parts)


def test_memory_is_weights_and_cache_to_the_byte():
    e = estimate_model("llama-3.1-70b", "decode", "h100", batch=16, seqlen=8192, parallel=Parallel(tensor=8))
    assert e.memory["weights"] == get_model("llama-3.1-70b").parameters() * 2 / 8
    assert e.memory["KV cache"] == 16 * 8192 * get_model("llama-3.1-70b").kv_bytes_per_token() / 8
    assert e.fits and not estimate_model("llama-3.1-70b", "decode", "h100").fits
    half = estimate_model("llama-3.1-70b", "decode", "h100", 16, 8192, Parallel(tensor=8), kv_dtype="fp8")
    assert half.memory["KV cache"] == e.memory["KV cache"] / 2


def test_windowed_layers_keep_and_read_their_window_only():
    full = from_config(LLAMA_CONFIG)
    windowed = full._replace(window=1024, windowed_layers=full.layers)
    a, b = (estimate_model(m, "decode", "h100", batch=8, seqlen=65536) for m in (full, windowed))
    assert b.memory["KV cache"] == a.memory["KV cache"] / 64
    attention = [next(p.time_s for p in e.parts if p.name == "attention") for e in (a, b)]
    assert attention[1] < attention[0] / 10


@pytest.mark.parametrize("name", ["tensor", "sequence", "context", "pipeline"])
@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_parallelism_divides_the_work(name, phase):
    one = estimate_model("llama-3.1-70b", phase, "h100", batch=8, seqlen=16384)
    four = estimate_model("llama-3.1-70b", phase, "h100", 8, 16384, Parallel(**{name: 4}, micro_batches=8))
    assert four.devices == 4 and four.tokens == one.tokens
    work = [sum(part.flops for part in e.parts) for e in (one, four)]
    assert work[1] == pytest.approx(work[0] / 4, rel=0.02)
    assert one.time_s / 4 < four.time_s < one.time_s  # faster, by less than the ideal
    assert four.memory_bytes < one.memory_bytes
    if name == "pipeline":
        assert any(part.name == "pipeline bubble" for part in four.parts)
    elif name != "context":  # whose exchange hides behind attention
        assert any(part.bound == "network" for part in four.parts)


def test_pipelined_decode_is_no_faster_for_one_token():
    one = estimate_model("llama-3.1-70b", "decode", "h100", 8, 4096)
    four = estimate_model("llama-3.1-70b", "decode", "h100", 8, 4096, Parallel(pipeline=4))
    assert four.time_s == pytest.approx(one.time_s, rel=0.05) and four.memory_bytes < one.memory_bytes / 3


def test_mixture_reads_more_experts_with_more_tokens():
    small, large = (estimate_model("mixtral-8x7b", "decode", "h200", batch=b, seqlen=512) for b in (1, 64))
    read = [sum(p.bytes for p in e.parts if p.name.startswith("experts")) for e in (small, large)]
    assert read[0] == pytest.approx(2 / 8 * read[1], rel=0.05)


def test_every_known_model_on_every_device_and_phase():
    for name in KNOWN:
        for hw in ("a100", "h200", "b200", "mi300x", "rtx4090", "l40s", "cpu"):
            for phase in ("prefill", "decode", "train"):
                e = estimate_model(name, phase, hw, 1, 512)
                assert 0 < e.time_s < 1e5 and e.memory_bytes > 0, (name, hw, phase)


@pytest.mark.parametrize(
    "match,change",
    [
        ("phase must be one of prefill, decode, train", {"phase": "chat"}),
        ("hardware must be one of a100", {"hardware": "a101"}),
        ("dtype must be one of bf16", {"dtype": "int3"}),
        ("kv_dtype must be one of", {"kv_dtype": "int3"}),
        ("batch must be", {"batch": 0}),
        ("seqlen must be", {"seqlen": -5}),
        ("tensor parallelism must divide heads", {"parallel": Parallel(tensor=5)}),
        ("pipeline parallelism must divide layers", {"parallel": Parallel(pipeline=5)}),
        ("sequence parallelism must divide heads", {"parallel": Parallel(sequence=5)}),
        ("sequence x context parallelism must divide seqlen", {"parallel": Parallel(context=7)}),
        ("context parallelism must be", {"parallel": Parallel(context=0)}),
        ("micro_batches must divide batch", {"parallel": Parallel(micro_batches=3), "batch": 4}),
    ],
)
def test_bad_input_names_the_field(match, change):
    asked = {
        "model": "llama-3.1-8b",
        "phase": "prefill",
        "hardware": "h100",
        "batch": 2,
        "seqlen": 1024,
    } | change
    with pytest.raises(ArgumentValueError, match=match):
        estimate_model(**asked)


def test_largest():
    assert [largest(lambda n, limit=limit: n <= limit) for limit in (0, 1, 2, 3, 100, 1023, 1024)] == [
        0,
        1,
        2,
        3,
        100,
        1023,
        1024,
    ]


def test_hardware_numbers_have_sources():
    for name in ("a100", "h100", "h200", "b200", "l40s", "rtx4090", "mi300x", "cpu"):
        hw = get_hardware(name)
        derived = {"name", "title", "sources", "wgmma"}
        missing = set(hw._fields) - derived - set(hw.sources)
        assert not missing, (name, missing)
        assert all(hw.sources.values())
