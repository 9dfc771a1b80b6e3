"""Tiny random Transformers models on this package, on the CPU, against their own eager attention."""

import pytest
import tiny_models
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the warnings of another package are not ours

from tiny_models import NAMES, build, padding, tokens  # noqa: E402

from flash_attn.errors import ArgumentValueError  # noqa: E402
from flash_attn.integrations.transformers import register  # noqa: E402


def pair(name: str):
    """(ours, eager) with the same random weights."""
    config = tiny_models.configs()[name]
    return [build(config, implementation) for implementation in (register(), "eager")]


@pytest.mark.parametrize("name", NAMES)
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
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padded_batches_equal_eager(name, side):
    x = tokens(3, 15)
    mask = padding(x, (0, 4, 9), side)
    logits = [model(x, attention_mask=mask).logits[mask.bool()] for model in pair(name)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def flash_attention_2(monkeypatch):
    """Transformers' own path to a flash-attn package, which it opens only where there is CUDA."""
    from transformers import modeling_flash_attention_utils as used
    from transformers import modeling_utils

    monkeypatch.setattr(used, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(used, "_loaded_implementation", None)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setitem(
        modeling_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda *_: True
    )
    return "flash_attention_2"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt-oss-sinks"])
@torch.no_grad()
def test_flash_attention_2_generates_as_the_registered_attention(flash_attention_2, name):
    """In bfloat16, with a padded prompt and a cache: both are the same calls of this package."""
    config = tiny_models.configs()[name]
    x = tokens(2, 9)
    mask = padding(x, (0, 3), "left")
    results = []
    for implementation in (flash_attention_2, register()):
        model = build(config, implementation, torch.bfloat16)
        text = model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        results.append((text, model(x, attention_mask=mask).logits[mask.bool()]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name):
    ours, _ = pair(name)
    x = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = ours(x, position_ids=positions).logits
    apart = torch.cat([ours(x[:, :8]).logits, ours(x[:, 8:]).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_with_a_cache_equals_eager(name):
    x = tokens(2, 9)
    mask = padding(x, (0, 3), "left")
    texts = [
        model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        for model in pair(name)
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


def test_training_under_autocast():
    """Autocast used to reach the matrix products inside the CPU backend, and broke them."""
    losses = []
    for model in pair("gemma2-softcap"):
        x = tokens(2, 16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, labels=x).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2 * torch.finfo(torch.bfloat16).eps)


def test_a_name_that_transformers_would_look_up_elsewhere_is_refused():
    with pytest.raises(ArgumentValueError, match="must not contain"):
        register("my_flash")
