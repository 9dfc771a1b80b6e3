"""Lesson 14. From forty lines to a kernel for everything: what flash_attn/forward/kernel.py adds.

The portable kernel is lesson 13 with each idea in a file of its own under flash_attn/tile/, used by the forward, the
backward and the decode kernels:

    rows.py      where a row lives: dense, packed (cu_seqlens), paged (block table)       lesson 10
    mask.py      which keys a tile sees, and which tiles need no mask                     lesson 7
    score.py     scale, soft cap, ALiBi, and their derivatives
    softmax.py   the online softmax                                                       lessons 3, 5
    dropout.py   the mask by counter                                                      lesson 11

Packed and dense are the same kernel: a packed tensor has batch stride 0, and its sequences start at cu_seqlens[b].
What is absent (no slopes, no block table) is None, and the compiler removes the code. Lengths and strides stay
run-time values: a new length compiles nothing.

This lesson shows the claim: one call after another, all variants, and the same numbers from the packed, the paged and
the dense form.
"""

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def main() -> None:
    torch.manual_seed(0)
    lengths = [5, 12, 9]
    q = [torch.randn(n, 4, 32) for n in lengths]
    k, v = ([torch.randn(n, 2, 32) for n in lengths] for _ in range(2))
    dense = [flash_attn_func(*(t[None] for t in x), causal=True)[0] for x in zip(q, k, v, strict=True)]

    # packed: all tokens in one tensor, the sequences told apart by where they begin
    cu_seqlens = torch.tensor([0, 5, 17, 26], dtype=torch.int32)
    packed = flash_attn_varlen_func(
        torch.cat(q), torch.cat(k), torch.cat(v), cu_seqlens, cu_seqlens, 12, 12, causal=True
    )
    torch.testing.assert_close(packed, torch.cat(dense))
    print("packed equals dense")

    # padded in a cache, lengths given; the padding is never read
    caches = [torch.full((3, 16, 2, 32), float("nan")) for _ in range(2)]
    for b, n in enumerate(lengths):
        caches[0][b, :n], caches[1][b, :n] = k[b], v[b]
    last = torch.stack([x[-1:] for x in q])
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    cached = flash_attn_with_kvcache(last, *caches, cache_seqlens=seqlens, causal=True)
    torch.testing.assert_close(cached, torch.stack([x[-1:] for x in dense]))
    print("the last token from a padded cache equals dense")

    # paged: the same cache as pages of 4 tokens, shuffled
    order = torch.randperm(12)
    pages = [torch.empty(12, 4, 2, 32) for _ in range(2)]
    for pool, cache in zip(pages, caches, strict=True):
        pool[order] = cache.reshape(12, 4, 2, 32)
    table = order.int().view(3, 4)
    paged = flash_attn_with_kvcache(last, *pages, cache_seqlens=seqlens, block_table=table, causal=True)
    torch.testing.assert_close(paged, cached)
    print("shuffled pages equal the contiguous cache")

    # scores: each variant is a switch of the same kernel, and has its gradient
    x = [torch.randn(1, 24, 4, 32, requires_grad=True) for _ in range(3)]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    for options in ({"window_size": (6, 2)}, {"softcap": 10.0}, {"alibi_slopes": slopes}, {"dropout_p": 0.1}):
        torch.autograd.grad(flash_attn_func(*x, causal="window_size" not in options, **options).sum(), x)
        print("gradients through", *options)


if __name__ == "__main__":
    main()
