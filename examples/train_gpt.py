"""Train a small character-level GPT on the text of this repository's README, then let it write.

    python examples/train_gpt.py [--device cuda] [--steps 1000]

The one line that matters is `flash_attn_func(q, k, v, causal=True)`; everything around it is plain torch.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn import flash_attn_func

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attn(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)  # (B, S, H, D) each
        if x.device.type == "cuda":  # on a GPU attention runs in 16 bits, as under torch.autocast
            q, k, v = (t.bfloat16() for t in (q, k, v))
        x = x + self.out(flash_attn_func(q, k, v, causal=True).flatten(2).to(x.dtype))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        where = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.token(tokens) + self.position(where)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    letters = sorted(set(text))
    data = torch.tensor([letters.index(c) for c in text], device=options.device)
    model = GPT(len(letters)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (4,)).tolist()
        rows = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0], "it must have learnt something"
    tokens = data[None, :10]
    for _ in range(50):
        tokens = torch.cat([tokens, model(tokens[:, -CONTEXT:])[:, -1].argmax(-1, keepdim=True)], 1)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; it writes: {''.join(letters[t] for t in tokens[0])!r}")


if __name__ == "__main__":
    main()
