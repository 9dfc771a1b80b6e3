"""Tiny random Transformers models, the same on the CPU and on a GPU. Import it only where transformers is installed."""

import copy
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import torch

_site = tempfile.TemporaryDirectory(prefix="flash-attn-metadata-")


def advertise() -> None:
    """Metadata of a distribution flash-attn where there is a GPU and the package is only on PYTHONPATH.

    Transformers believes in an installed distribution, not in a module that can be imported, and looks once: when it
    is imported itself.
    """
    known = importlib.metadata.packages_distributions().get("flash_attn", [])
    if "flash-attn" in known or not torch.cuda.is_available():
        return
    write_metadata(Path(_site.name))
    sys.path.append(_site.name)


def write_metadata(directory: Path) -> None:
    """Make `directory`, on sys.path, tell of an installed distribution flash-attn."""
    info = directory / "flash_attn-2.8.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.4\n")
    (info / "top_level.txt").write_text("flash_attn\n")


def configs(head_dim: int = 16, window: int = 6) -> dict:
    """One configuration for each feature that a model asks of attention."""
    from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

    sizes = dict(
        vocab_size=97, hidden_size=4 * head_dim, intermediate_size=6 * head_dim, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return {
        "llama": LlamaConfig(**sizes),
        "mistral-window": MistralConfig(**sizes, sliding_window=window),
        "gemma2-softcap": Gemma2Config(
            **sizes, sliding_window=window, attn_logit_softcapping=5.0, query_pre_attn_scalar=head_dim
        ),
        "qwen3-gqa": Qwen3Config(**sizes),
        # every token goes to every expert: which one is chosen would be decided by rounding
        "gpt-oss-sinks": GptOssConfig(
            **sizes, sliding_window=window, num_local_experts=2, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }  # fmt: skip


NAMES = ("llama", "mistral-window", "gemma2-softcap", "qwen3-gqa", "gpt-oss-sinks")


def build(config, implementation: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A model with the random weights of seed 0, rounded to `dtype`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    for name, x in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(x)  # theirs are of size 0.02, and would hardly be seen
    return model.to(device, dtype).eval()


def tokens(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def padding(x: torch.Tensor, amounts: tuple[int, ...], side: str) -> torch.Tensor:
    """(batch, length) of ones, with so many zeros on one side of each row."""
    mask = torch.ones_like(x)
    for row, amount in enumerate(amounts):
        mask[row, slice(0, amount) if side == "left" else slice(x.shape[1] - amount, None)] = 0
    return mask
