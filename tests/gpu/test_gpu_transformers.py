"""Tiny Transformers models on a GPU in bfloat16: logits, gradients, generation and training against eager attention.

Four run with attn_implementation="flash_attention_2", as a user writes it. gpt-oss does not: Transformers replaces that
name by a kernel from a model hub for it, so it runs through `register()`.

The rule is upstream's: error at most twice (gradients: three times) that of eager attention in bfloat16, both measured
against eager in float32 with the same weights, plus one rounding step.
"""

import copy

import pytest
import tiny_models
import torch

tiny_models.advertise()
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # the warnings of another package are not ours
]

from tiny_models import NAMES, build, padding, tokens  # noqa: E402

from flash_attn.integrations.transformers import register  # noqa: E402
from flash_attn.utils.testing import assert_as_close_as_torch, max_error  # noqa: E402

DEVICE = "cuda"
EPS = torch.finfo(torch.bfloat16).eps


def implementation(name: str) -> str:
    return register() if name == "gpt-oss-sinks" else "flash_attention_2"


def trio(name: str, ours: str | None = None):
    """(ours, eager, eager in float32); the weights are the same bfloat16 numbers."""
    config = tiny_models.configs(head_dim=64, window=33)[name]
    models = [build(config, i, torch.bfloat16, DEVICE) for i in (ours or implementation(name), "eager")]
    return *models, copy.deepcopy(models[1]).float()


def test_transformers_takes_this_package_for_flash_attention_2():
    from transformers.utils import is_flash_attn_2_available

    import flash_attn

    assert is_flash_attn_2_available()
    build(tiny_models.configs()["llama"], "flash_attention_2", torch.bfloat16, DEVICE)
    from transformers import modeling_flash_attention_utils as used

    assert used._flash_varlen_fn is flash_attn.flash_attn_varlen_func


@pytest.mark.parametrize("name", [*NAMES, "llama-registered"])
def test_logits_and_gradients(name):
    ours = register() if name == "llama-registered" else None
    models = trio(name.removesuffix("-registered"), ours)
    x = tokens(2, 200, DEVICE)
    results = [model(x, labels=x) for model in models]
    got, plain, want = (result.logits for result in results)
    assert_as_close_as_torch(got, want, plain, name="logits")
    for result in results:
        result.loss.backward()
    for (key, a), b, c in zip(
        models[0].named_parameters(), *(m.parameters() for m in models[1:]), strict=True
    ):
        assert (a.grad is None) == (c.grad is None), key
        if a.grad is not None:
            assert_as_close_as_torch(a.grad, c.grad, b.grad, factor=3, name=key)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padded_batches(name, side):
    x = tokens(3, 90, DEVICE)
    mask = padding(x, (0, 17, 60), side)
    got, plain, want = (model(x, attention_mask=mask).logits[mask.bool()] for model in trio(name))
    assert_as_close_as_torch(got, want, plain, name="logits")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_sequences(name):
    """Two sequences in a row of one batch, told apart by positions that start again, against each of them alone."""
    models = trio(name)
    x = tokens(1, 150, DEVICE)
    positions = torch.cat([torch.arange(60), torch.arange(90)])[None].to(DEVICE)
    got = models[0](x, position_ids=positions).logits
    plain, want = (torch.cat([m(x[:, :60]).logits, m(x[:, 60:]).logits], 1) for m in models[1:])
    assert_as_close_as_torch(got, want, plain, name="logits")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_with_a_cache(name):
    """Each token that is chosen is, up to the error of the arithmetic, the best one without a cache in float32."""
    ours, eager, exact = trio(name)
    x = tokens(2, 40, DEVICE)
    mask = padding(x, (0, 13), "left")
    text = ours.generate(x, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert text.shape == (2, 70)
    full = torch.cat([mask, torch.ones(2, 30, dtype=mask.dtype, device=DEVICE)], 1)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    plain, want = (
        m(text, attention_mask=full, position_ids=positions).logits[:, 39:-1] for m in (eager, exact)
    )
    regret = want.max(-1).values - want.gather(-1, text[:, 40:, None])[..., 0]
    # two logits are compared, and each may be off by what the rule allows
    allowed = 2 * (2 * max_error(plain, want) + EPS * want.abs().max().item())
    assert regret.max().item() <= allowed


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_twenty_training_steps(name):
    curves = []
    for i, dtype in (
        (implementation(name), torch.bfloat16),
        ("eager", torch.bfloat16),
        ("eager", torch.float32),
    ):
        model = build(tiny_models.configs(head_dim=64, window=33)[name], i, device=DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for step in range(20):
            x = tokens(2, 128 + step % 3, DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        curves.append(torch.stack(losses))
    got, plain, want = curves
    assert want[-1] < want[0], "it does not learn"
    assert max_error(got, want) <= 2 * max_error(plain, want) + EPS * want.abs().max().item()
