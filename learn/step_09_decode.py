"""Lesson 9. Decode: one query, many keys; split the keys, merge the parts.

Generating a token is attention of one query on the whole cache. Every key and value is read once and used for one
product: the time is the cache's size over the memory bandwidth, and no faster arithmetic helps. One program for each
(sequence, head) may be fewer programs than the GPU has multiprocessors; then most of the machine, and of its
bandwidth, idles. So the keys are split among several programs. Each returns its own O_i and lse_i, and

    lse = log sum_i exp(lse_i)        O = sum_i exp(lse_i - lse) O_i

is exact: lse_i says what the part's denominator was, so the parts can be put on a common one. The same formula merges
the steps of ring attention, a shared prefix with a private suffix, or an attention sink. A part without keys has
lse_i = -inf and weight 0.
"""

import torch
from torch import Tensor

from learn.step_05_forward import flash_forward


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(O, lse) from parts: outs (splits, M, D), lses (splits, M)."""
    m = lses.amax(0)
    pivot = torch.where(m == float("-inf"), 0.0, m)  # all parts empty: exp(-inf - 0) = 0, not NaN
    weights = torch.exp(lses - pivot)
    total = weights.sum(0)
    lse = pivot + torch.log(total)  # log(0) = -inf: the row saw no key
    shares = weights / torch.where(total == 0, 1.0, total)
    return (shares[..., None] * outs).sum(0), lse


def split_decode(q: Tensor, k: Tensor, v: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Attention of q (M, D) on k, v (N, D), the keys cut into `splits` parts."""
    parts = [
        flash_forward(q, k_part, v_part)
        for k_part, v_part in zip(k.tensor_split(splits), v.tensor_split(splits), strict=True)
    ]
    return merge(torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts]))


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 32, dtype=torch.float64)
    k, v = (torch.randn(100, 32, dtype=torch.float64) for _ in range(2))
    want, want_lse = flash_forward(q, k, v)
    for splits in (1, 2, 7, 150):  # 150: fifty parts have no key
        out, lse = split_decode(q, k, v, splits)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
    out, lse = split_decode(q, k[:0], v[:0], 3)
    assert out.abs().max() == 0 and lse.item() == float("-inf")
    print("the merged parts equal the whole, for any number of parts, empty ones too")

    # a mean of the parts forgets how much each part weighs
    halves = [flash_forward(q, k[:80], v[:80])[0], flash_forward(q, k[80:], v[80:])[0]]
    error = ((halves[0] + halves[1]) / 2 - want).abs().max()
    print(f"averaging the parts instead: error {error:.2f}")
    assert error > 0.05

    programs, splits = 1 * 8, 16
    print(f"batch 1, 8 key/value heads: {programs} programs for 132 multiprocessors;", end=" ")
    print(f"{splits} splits make {programs * splits}")


if __name__ == "__main__":
    main()
