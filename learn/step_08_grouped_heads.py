"""Lesson 8. Heads, and grouped-query attention: fewer keys and values than queries.

Attention runs H times side by side on slices of size D: heads. Nothing is shared between heads, so (batch, head)
pairs are simply more programs. What limits a server is the cache of keys and values: 2 * N * H * D elements a
sequence. Grouped-query attention keeps Hk < H key/value heads and lets G = H / Hk query heads share one:

    query head h uses key/value head h // G            (Hk = H: multi-head; Hk = 1: multi-query)

Forward: repeat nothing in memory, just read head h // G. Backward: dK and dV of a key/value head sum over its G query
heads; in fp32, and rounded once, or the rounding of G partial sums adds up. Decode: the G heads of a group read the
same keys, so one program takes all of them as rows of one tile and reads K and V once.

Source: Ainslie and others 2023, arXiv:2305.13245.
"""

import torch

from flash_attn import flash_attn_func


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, M, H, D), k and v (B, N, Hk, D) -> (B, M, H, D), without repeating k or v in memory."""
    B, M, H, D = q.shape
    Hk = k.shape[2]
    q = q.reshape(B, M, Hk, H // Hk, D)  # heads of a group are neighbours
    s = torch.einsum("bmkgd,bnkd->bkgmn", q, k) * D**-0.5
    return torch.einsum("bkgmn,bnkd->bmkgd", s.softmax(-1), v).reshape(B, M, H, D)


def cache_bytes(tokens: int, layers: int, kv_heads: int, d: int, element: int = 2) -> int:
    return 2 * tokens * layers * kv_heads * d * element


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 5, 8, 16)
    for kv_heads in (8, 2, 1):
        k, v = (torch.randn(2, 7, kv_heads, 16, requires_grad=True) for _ in range(2))
        repeated = [t.repeat_interleave(8 // kv_heads, 2) for t in (k, v)]
        want = grouped_attention(q, *repeated)
        got = grouped_attention(q, k, v)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(flash_attn_func(q, k, v), want)
        # the gradient of a shared head is the sum over its group
        per_query_head = torch.autograd.grad(want.square().sum(), repeated, retain_graph=True)
        shared = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), (k, v))
        for whole, part in zip(shared, per_query_head, strict=True):
            torch.testing.assert_close(whole, part.unflatten(2, (kv_heads, -1)).sum(3), rtol=1e-4, atol=1e-4)
    print("grouped heads equal repeated keys and values; their gradients sum over the group")

    many, few = (cache_bytes(32768, 32, heads, 128) / 2**30 for heads in (32, 8))
    print(
        f"cache of 32k tokens, 32 layers, D = 128: {many:.0f} GiB with 32 key/value heads, {few:.0f} GiB with 8"
    )
    assert many == 4 * few


if __name__ == "__main__":
    main()
