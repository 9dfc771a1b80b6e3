"""Shapes of transformer models: a few known ones and any transformers `config.json`. No weights, no download."""

import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from flash_attn.cost.counts import positive
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError


class ModelShape(NamedTuple):
    """A decoder-only transformer, as far as cost is concerned."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the dense feed-forward; of one expert in a mixture
    vocab: int
    gated: bool = True  # SwiGLU and relatives: two up projections
    experts: int = 1
    top_k: int = 1
    moe_layers: int = (
        0  # layers whose feed-forward is a mixture; the others are dense with `dense_intermediate`
    )
    dense_intermediate: int = 0
    shared_intermediate: int = 0  # expert that every token visits
    tied: bool = False  # classifier shares the embedding
    positions: int = 0  # learned position embeddings
    window: int = 0  # keys a windowed layer sees, itself included; 0: no such layer
    windowed_layers: int = 0
    max_length: int = 0  # 0: not stated

    @property
    def up_projections(self) -> int:
        return 2 if self.gated else 1

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    def ffn_parameters(self, mixture: bool, active: bool = False) -> int:
        """Of one layer; `active`: only what one token visits."""
        matrices = (self.up_projections + 1) * self.hidden
        if not mixture:
            return matrices * (self.dense_intermediate or self.intermediate)
        experts = self.top_k if active else self.experts
        return (
            matrices * (experts * self.intermediate + self.shared_intermediate) + self.hidden * self.experts
        )

    def parameters(self, active: bool = False) -> int:
        """All weights; `active`: those that one token visits. Biases are left out (under 0.1 %)."""
        per_layer = self.attention_parameters + 2 * self.hidden
        ffn = self.moe_layers * self.ffn_parameters(True, active)
        ffn += (self.layers - self.moe_layers) * self.ffn_parameters(False)
        embedding = self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden
        return self.layers * per_layer + ffn + embedding + self.hidden

    def kv_bytes_per_token(self, itemsize: float = 2) -> float:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any
) -> ModelShape:
    more = {"head_dim": hidden // heads} | more
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv,
        intermediate=ffn,
        vocab=vocab,
        **more,
    )


# From each model's published config.json on huggingface.co/<name>; gpt3-175b from arXiv:2005.14165 table 2.1.
KNOWN = {
    shape.name.lower().split("/")[-1]: shape
    for shape in (
        _llama("meta-llama/Llama-2-7B", 32, 4096, 32, 32, 11008, 32000, max_length=4096),
        _llama("meta-llama/Llama-2-13B", 40, 5120, 40, 40, 13824, 32000, max_length=4096),
        _llama("meta-llama/Llama-2-70B", 80, 8192, 64, 8, 28672, 32000, max_length=4096),
        _llama("meta-llama/Llama-3-8B", 32, 4096, 32, 8, 14336, 128256, max_length=8192),
        _llama("meta-llama/Llama-3-70B", 80, 8192, 64, 8, 28672, 128256, max_length=8192),
        _llama("meta-llama/Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, max_length=131072),
        _llama("meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 28672, 128256, max_length=131072),
        _llama("meta-llama/Llama-3.1-405B", 126, 16384, 128, 8, 53248, 128256, max_length=131072),
        _llama("meta-llama/Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128256, tied=True, max_length=131072),
        _llama("meta-llama/Llama-3.2-3B", 28, 3072, 24, 8, 8192, 128256, tied=True, max_length=131072),
        _llama("Qwen/Qwen3-0.6B", 28, 1024, 16, 8, 3072, 151936, head_dim=128, tied=True, max_length=40960),
        _llama("Qwen/Qwen3-1.7B", 28, 2048, 16, 8, 6144, 151936, head_dim=128, tied=True, max_length=40960),
        _llama("Qwen/Qwen3-4B", 36, 2560, 32, 8, 9728, 151936, head_dim=128, tied=True, max_length=40960),
        _llama("Qwen/Qwen3-8B", 36, 4096, 32, 8, 12288, 151936, head_dim=128, max_length=40960),
        _llama("Qwen/Qwen3-14B", 40, 5120, 40, 8, 17408, 151936, head_dim=128, max_length=40960),
        _llama("Qwen/Qwen3-32B", 64, 5120, 64, 8, 25600, 151936, head_dim=128, max_length=40960),
        _llama(
            "Qwen/Qwen3-30B-A3B", 48, 2048, 32, 4, 768, 151936,
            head_dim=128, experts=128, top_k=8, moe_layers=48, max_length=40960,
        ),
        _llama(
            "Qwen/Qwen3-235B-A22B", 94, 4096, 64, 4, 1536, 151936,
            head_dim=128, experts=128, top_k=8, moe_layers=94, max_length=40960,
        ),
        _llama(
            "mistralai/Mixtral-8x7B", 32, 4096, 32, 8, 14336, 32000,
            experts=8, top_k=2, moe_layers=32, max_length=32768,
        ),
        _llama(
            "mistralai/Mixtral-8x22B", 56, 6144, 48, 8, 16384, 32768,
            experts=8, top_k=2, moe_layers=56, max_length=65536,
        ),
        _llama(
            "openai/GPT3-175B", 96, 12288, 96, 96, 49152, 50257,
            gated=False, tied=True, positions=2048, max_length=2048,
        ),
        # GenZ's "gpt-3": OPT-175B's vocabulary.
        _llama("facebook/OPT-175B", 96, 12288, 96, 96, 49152, 50272, gated=False, max_length=2048),
    )
}  # fmt: skip
ALIASES = {
    "llama2_7b": "llama-2-7b", "llama2_13b": "llama-2-13b", "llama2_70b": "llama-2-70b",
    "llama3_8b": "llama-3.1-8b", "llama3_70b": "llama-3.1-70b", "llama3_405b": "llama-3.1-405b",
    "mixtral_8x7b": "mixtral-8x7b", "mixtral_8x22b": "mixtral-8x22b", "gpt3": "gpt3-175b",
    "gpt-3": "opt-175b", "openai/gpt-3": "opt-175b",
}  # fmt: skip

_UNGATED = {
    "gpt2",
    "opt",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "bloom",
    "falcon",
    "phi",
    "gpt_bigcode",
    "starcoder2",
    "mpt",
}
# Spellings of the same fact in transformers configs, in order of preference.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
}
_OPTIONAL = {
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token"),
    "max_length": ("max_position_embeddings", "n_positions", "max_sequence_length"),
}
_OTHER_MECHANISMS = {
    "kv_lora_rank": "multi-head latent attention",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "linear_num_key_heads": "linear attention layers",
}


def get_model(model: "str | PathLike | dict | ModelShape") -> ModelShape:
    """A known model by name, a path to a transformers config.json (or its folder), its dict, or a ModelShape.

    Raises:
        ArgumentValueError: unknown name; the message lists the known ones.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, dict):
        return from_config(model)
    if not isinstance(model, (str, PathLike)):
        raise ArgumentTypeError(f"model must be a name, a path or a config dict, got {type(model).__name__}")
    path = Path(model)
    if isinstance(model, str) and not path.exists():
        name = ALIASES.get(model.lower(), model.lower())
        short = name.split("/")[-1]
        for key in (short, ALIASES.get(short, short), short.replace("meta-llama-", "llama-")):
            if key in KNOWN:
                return KNOWN[key]
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".json":
        if not path.is_file():
            raise ArgumentValueError(f"model config {path} does not exist")
        try:
            return from_config(json.loads(path.read_text()), name=path.parent.name or path.stem)
        except json.JSONDecodeError as error:
            raise ArgumentValueError(f"model config {path} is not JSON: {error}") from None
    raise ArgumentValueError(
        f"model must be a config.json or one of {', '.join([*KNOWN, *ALIASES])}, got {str(model)!r}"
    )


def from_config(config: dict, name: str = "") -> ModelShape:
    """The shape that a transformers config describes.

    Raises:
        ArgumentValueError: keys are missing (all are named) or a value cannot be meant.
        UnsupportedError: the model attends by another mechanism than softmax attention with K and V heads.
    """
    if not isinstance(config, dict):
        raise ArgumentTypeError(f"a model config must be a JSON object, got {type(config).__name__}")
    config = config.get("text_config", config)
    for key, mechanism in _OTHER_MECHANISMS.items():
        if config.get(key):
            raise UnsupportedError(f"the config has {key}: {mechanism} is not modelled")
    found = {field: _first(config, keys) for field, keys in (_KEYS | _OPTIONAL).items()}
    missing = [" or ".join(keys) for field, keys in _KEYS.items() if found[field] is None]
    if missing:
        raise ArgumentValueError(f"the model config lacks {'; '.join(missing)}")
    kind = config.get("model_type", "")
    heads, hidden, layers = found["heads"], found["hidden"], found["layers"]
    experts = found["experts"] or 1
    dense: Any = found["intermediate"] or (4 * hidden if kind in _UNGATED else None)
    expert: Any = config.get("moe_intermediate_size") or dense
    if (dense if experts == 1 else expert) is None:
        raise ArgumentValueError("the model config lacks intermediate_size or moe_intermediate_size")
    if experts > 1 and found["top_k"] is None:
        raise ArgumentValueError("the model config lacks num_experts_per_tok")
    window, windowed = _windows(config, layers)
    shape = ModelShape(
        name=name or config.get("_name_or_path") or kind or "config",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=1 if config.get("multi_query") else found["kv_heads"] or heads,
        head_dim=found["head_dim"] or hidden // heads,
        intermediate=expert if experts > 1 else dense,
        vocab=found["vocab"],
        gated=kind not in _UNGATED,
        experts=experts,
        top_k=found["top_k"] if experts > 1 else 1,
        moe_layers=_moe_layers(config, layers) if experts > 1 else 0,
        dense_intermediate=(dense or 0) if experts > 1 else 0,
        shared_intermediate=config.get("shared_expert_intermediate_size") or 0,
        tied=bool(config.get("tie_word_embeddings", kind in ("gpt2", "opt"))),
        positions=(found["max_length"] or 0) if kind in ("gpt2", "opt") else 0,
        window=window,
        windowed_layers=windowed,
        max_length=found["max_length"] or 0,
    )
    return check(shape)


def check(shape: ModelShape) -> ModelShape:
    """`shape`, or an error that names the field that cannot be meant."""
    for field in (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate",
        "vocab",
        "experts",
        "top_k",
    ):
        positive(field, getattr(shape, field))
    if shape.heads % shape.kv_heads:
        raise ArgumentValueError(f"kv_heads must divide heads, got {shape.kv_heads} and {shape.heads}")
    if shape.top_k > shape.experts:
        raise ArgumentValueError(f"top_k must be at most experts, got {shape.top_k} and {shape.experts}")
    return shape


def _first(config: dict, keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _windows(config: dict, layers: int) -> tuple[int, int]:
    """(window, layers that have it)."""
    window = config.get("sliding_window") or 0
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    kinds = config.get("layer_types")
    return window, layers if kinds is None else sum(kind == "sliding_attention" for kind in kinds)


def _moe_layers(config: dict, layers: int) -> int:
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return sum((i + 1) % step == 0 and i not in dense for i in range(layers))
