"""Serve several requests with a paged KV cache: prompts, tokens one at a time, requests that end and free their pages.

    python examples/serve_paged_cache.py [--device cuda]

The cache is one pool of small pages. A request owns a list of pages, so memory is used as tokens come instead of being
reserved for the longest possible answer. One attention layer with random weights stands for the model.
"""

import argparse

import torch
from torch import Tensor

from flash_attn import flash_attn_func
from flash_attn.kvcache.cache_manager import CacheManager

HEADS, KV_HEADS, DIM = 8, 2, 32  # four query heads share a key head


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)

    def tokens(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of `count` new tokens for each of `batch` requests."""
        heads = (HEADS, KV_HEADS, KV_HEADS)
        q, k, v = (torch.randn(batch, count, h, DIM, device=device, dtype=dtype) for h in heads)
        return q, k, v

    cache = CacheManager(pages=16, page_size=16, kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, device=device)
    exact = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}  # keys and values of each request, to check against

    def attend(requests: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cache.attend(q, k, v, requests, causal=True)
        for row, request in enumerate(requests):
            this = slice(row, row + 1)
            seen.setdefault(request, []).append((k[this], v[this]))
            keys, values = (torch.cat(parts, 1) for parts in zip(*seen[request], strict=True))
            want = flash_attn_func(q[this], keys, values, causal=True)  # without a cache
            torch.testing.assert_close(out[this], want, **exact)
        return out

    requests = []
    for prompt in (20, 50, 7):  # prompts differ in length: one call each
        requests.append(cache.add())
        attend(requests[-1:], *tokens(1, prompt))
    print(f"three prompts of 20, 50 and 7 tokens: {16 - cache.pool.free} of 16 pages in use")
    for _ in range(10):  # one token for every request in one call
        attend(requests, *tokens(3, 1))
    print(f"ten tokens later: {16 - cache.pool.free} pages; lengths {[cache.length(r) for r in requests]}")
    cache.free(requests.pop(1))  # the long one ends; its pages are free at once
    print(f"one request ended: {16 - cache.pool.free} pages")
    requests.append(cache.add())
    attend(requests[-1:], *tokens(1, 100))
    attend(requests, *tokens(3, 1))
    print(
        f"a new one of 100 tokens took its place: {16 - cache.pool.free} pages; every result equals the uncached one"
    )


if __name__ == "__main__":
    main()
