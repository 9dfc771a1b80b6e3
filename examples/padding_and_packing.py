"""A batch of sentences of different lengths: padded, packed, and what packing saves.

    python examples/padding_and_packing.py [--device cuda]

Packed means: the tokens of all sentences one behind the other, and `cu_seqlens` says where each begins. No token
attends to another sentence, and nothing is computed for padding.
"""

import argparse

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    lengths = torch.tensor([37, 128, 5, 0, 64], device=device)  # an empty one is fine
    B, S, H, D = len(lengths), 128, 4, 32
    mask = torch.arange(S, device=device) < lengths[:, None]  # (B, S), True for real tokens
    qkv = torch.randn(B, S, 3, H, D, device=device, dtype=dtype)

    # pack: (B, S, ...) -> (total, ...); cu_seqlens = [0, 37, 165, 170, 170, 234]
    packed, indices, cu_seqlens, longest, _ = unpad_input(qkv, mask)
    q, k, v = packed.unbind(1)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    padded = pad_input(out, indices, B, S)  # back to (B, S, H, D), zeros where there was padding

    worst = 0.0
    for b, length in enumerate(lengths.tolist()):
        if length:
            alone = flash_attn_func(*qkv[b : b + 1, :length].unbind(2), causal=True)
            worst = max(worst, float((padded[b, :length] - alone[0]).abs().max()))
    assert worst < (1e-5 if dtype == torch.float32 else 2e-2)
    total = int(lengths.sum())
    print(f"packed equals one sentence at a time, largest difference {worst:.1e}")
    print(f"{total} tokens instead of {B * S}: {1 - total / (B * S):.0%} of the padded batch was padding")


if __name__ == "__main__":
    main()
