"""Tiny random Transformers models on this package, on the CPU, against their own eager attention."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the warnings of another package are not ours

from transformers import (  # noqa: E402
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: E402

from flash_attn.errors import ArgumentValueError  # noqa: E402
from flash_attn.integrations.transformers import register  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral-window": MistralConfig(**SIZES, sliding_window=6),
    "gemma2-softcap": Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "qwen3-gqa": Qwen3Config(**SIZES),
    "gpt-oss-sinks": GptOssConfig(
        **SIZES, sliding_window=6, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def pair(name: str):
    """(ours, eager) with the same random weights."""
    models = []
    for implementation in (register(), "eager"):
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS[name])
        models.append(
            AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().eval()
        )
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].config._attn_implementation == "faplus"
    return models


def tokens(batch: int, length: int):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_eager(name):
    ours, eager = pair(name)
    x = tokens(2, 19)
    results = [model(x, labels=x) for model in (ours, eager)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-4)
    for result in results:
        result.loss.backward()
    for (key, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(
                a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padded_batches_equal_eager(name, side):
    ours, eager = pair(name)
    x = tokens(3, 15)
    mask = torch.ones_like(x)
    for row, padding in enumerate((0, 4, 9)):
        mask[row, slice(0, padding) if side == "left" else slice(15 - padding, 15)] = 0
    logits = [model(x, attention_mask=mask).logits[mask.bool()] for model in (ours, eager)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name):
    ours, _ = pair(name)
    x = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = ours(x, position_ids=positions).logits
    apart = torch.cat([ours(x[:, :8]).logits, ours(x[:, 8:]).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_generation_with_a_cache_equals_eager(name):
    ours, eager = pair(name)
    x = tokens(2, 9)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    texts = [
        model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        for model in (ours, eager)
    ]
    assert torch.equal(*texts)


def test_twenty_training_steps_have_equal_losses():
    curves = []
    for model in pair("llama"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for step in range(20):
            x = tokens(2, 16 + step % 3)
            loss = model(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][-1] < curves[0][0]


def test_a_name_that_transformers_would_look_up_elsewhere_is_refused():
    with pytest.raises(ArgumentValueError, match="must not contain"):
        register("my_flash")
