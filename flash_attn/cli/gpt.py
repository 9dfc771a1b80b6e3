"""A small character-level GPT that trains with `flash_attn_func` and generates with `flash_attn_with_kvcache`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn import flash_attn_func, flash_attn_with_kvcache


class Shape(NamedTuple):
    vocabulary: int
    context: int = 256
    layers: int = 3
    heads: int = 4
    width: int = 128


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on (B, S, H, D) that stores the whole score matrix."""
    s = torch.einsum("bmhd,bnhd->bhmn", q, k).float() * q.shape[-1] ** -0.5
    M, N = s.shape[-2:]
    hidden = torch.ones(M, N, dtype=torch.bool, device=s.device).triu(1 + N - M)
    p = s.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("bhmn,bnhd->bmhd", p, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


class Cache(NamedTuple):
    """Keys and values of every layer, (layers, B, context, H, D), and how many are filled, int32 (B,)."""

    k: Tensor
    v: Tensor
    lengths: Tensor


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm_attn(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend(q, k, v).flatten(2).to(x.dtype))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """`attention_dtype`: what q, k and v are rounded to before attention; None leaves them alone."""

    def __init__(self, shape: Shape, attention_dtype: torch.dtype | None = None):
        super().__init__()
        self.shape, self.attention_dtype = shape, attention_dtype
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)

    def _round(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors if self.attention_dtype is None else tuple(t.to(self.attention_dtype) for t in tensors)

    def forward(self, tokens: Tensor, attention=flash_attention) -> Tensor:
        """Logits (B, S, vocabulary) of tokens (B, S)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, lambda q, k, v: attention(*self._round(q, k, v)))
        return self.head(self.norm(x))

    def new_cache(self, batch: int) -> Cache:
        s, weight = self.shape, self.head.weight
        dtype = self.attention_dtype or weight.dtype
        shape = (s.layers, batch, s.context, s.heads, s.width // s.heads)
        k, v = (torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(2))
        return Cache(k, v, torch.zeros(batch, dtype=torch.int32, device=weight.device))

    def step(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits of the last of `tokens` (B, new), appended to `cache` in place; returns the longer cache."""
        new = tokens.shape[1]
        where = cache.lengths[:, None].long() + torch.arange(new, device=tokens.device)
        x = self.token(tokens) + self.position(where)
        for layer, block in enumerate(self.blocks):

            def cached(q, k, v, layer=layer):
                q, k, v = self._round(q, k, v)
                return flash_attn_with_kvcache(
                    q, cache.k[layer], cache.v[layer], k, v, cache_seqlens=cache.lengths, causal=True
                )

            x = block(x, cached)
        return self.head(self.norm(x[:, -1])), cache._replace(lengths=cache.lengths + new)

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int) -> Tensor:
        """`count` most likely tokens after `prompt` (B, S), one cached step each."""
        logits, cache = self.step(prompt, self.new_cache(prompt.shape[0]))
        tokens = [logits.argmax(-1, keepdim=True)]
        for _ in range(count - 1):
            logits, cache = self.step(tokens[-1], cache)
            tokens.append(logits.argmax(-1, keepdim=True))
        return torch.cat(tokens, 1)

    @torch.no_grad()
    def generate_uncached(self, prompt: Tensor, count: int) -> Tensor:
        """The same, computing the whole sequence anew for every token."""
        tokens = prompt
        for _ in range(count):
            tokens = torch.cat([tokens, self(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens[:, prompt.shape[1] :]
