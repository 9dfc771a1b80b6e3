"""Run a Transformers model with this package's attention on a CPU, and compare with the model's own.

    python examples/transformers_on_cpu.py [--device cuda]

The model is tiny and has random weights, so nothing is downloaded. With a real one only `from_pretrained` differs:
AutoModelForCausalLM.from_pretrained(name, attn_implementation=register()). On a GPU plain
attn_implementation="flash_attention_2" finds this package by itself.
"""

import argparse
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_attn.integrations.transformers import register


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    name = register()
    models = {}
    for attention in ("eager", name):
        torch.manual_seed(0)  # the same weights
        own = copy.deepcopy(config)  # a model reads its configuration at every call
        own._attn_implementation = attention
        models[attention] = LlamaForCausalLM(own).to(device).eval()

    tokens = torch.randint(1, 128, (2, 12), device=device)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0  # the second prompt is shorter: padded on the left, as for generation
    with torch.no_grad():
        logits = {n: m(tokens, attention_mask=mask).logits[mask.bool()] for n, m in models.items()}
        texts = {
            n: m.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
            for n, m in models.items()
        }
    difference = float((logits["eager"] - logits[name]).abs().max())
    assert difference < 1e-4 and torch.equal(texts["eager"], texts[name])
    print(f"attn_implementation={name!r}: logits differ by {difference:.1e}, the generated tokens are equal")


if __name__ == "__main__":
    main()
