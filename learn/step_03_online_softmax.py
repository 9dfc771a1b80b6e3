"""Lesson 3. Online softmax: the denominator of numbers that arrive one block at a time.

Keep, for all numbers seen so far, their maximum m and l = sum exp(s - m). A new block s2 arrives:

    m' = max(m, max(s2))
    l' = exp(m - m') l + sum exp(s2 - m')

Lemma 1. exp(s - m') = exp(s - m) exp(m - m'): what was summed under the old maximum is corrected by one factor.
Lemma 2. The same factor corrects the weighted sum o = sum exp(s - m) v, so that after the last block O = o / l.

Two forms are in use. Un-normalised (FlashAttention-2): keep o as above and divide once, at the end. Normalised
(FlashAttention-1): keep O itself and correct it by the ratio of denominators in every step,

    O' = (exp(m - m') l / l') O + (1 / l') sum exp(s2 - m') v2

Both are exact. Mixing them is the classic bug: dividing in every step and again at the end, or correcting O without
l / l'. The second half of this lesson shows what the mixtures give.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import torch
from torch import Tensor


def online_softmax_update(
    m: Tensor, l: Tensor, o: Tensor, s: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold scores s (M, n) and values v (n, D) into the running maximum m (M,), sum l (M,) and output o (M, D)."""
    m_new = torch.maximum(m, s.amax(-1))
    correction = torch.exp(m - m_new)
    p = torch.exp(s - m_new[:, None])
    return m_new, correction * l + p.sum(-1), correction[:, None] * o + p @ v


def normalised_update(m: Tensor, l: Tensor, o: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with an output that is normalised at every step; needs no division at the end."""
    m_new, l_new, added = online_softmax_update(m, l, torch.zeros_like(o), s, v)
    return m_new, l_new, (torch.exp(m - m_new) * l / l_new)[:, None] * o + added / l_new[:, None]


def run(update, scores: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(m, l, o) after all blocks."""
    rows = scores.shape[0]
    m = torch.full((rows,), float("-inf"), dtype=scores.dtype)
    l, o = torch.zeros(rows, dtype=scores.dtype), torch.zeros(rows, values.shape[1], dtype=scores.dtype)
    for j in range(0, scores.shape[1], block):
        m, l, o = update(m, l, o, scores[:, j : j + block], values[j : j + block])
    return m, l, o


def forgets_the_old_sum(m, l, o, s, v):
    """A mixture: normalised output, corrected without l / l'."""
    m_new, l_new, added = online_softmax_update(m, l, torch.zeros_like(o), s, v)
    return m_new, l_new, torch.exp(m - m_new)[:, None] * o + added / l_new[:, None]


def main() -> None:
    torch.manual_seed(0)
    s, v = 3 * torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    want = torch.softmax(s, -1) @ v

    # lemma 1, as an identity
    m1, m = s[:, :20].amax(-1, keepdim=True), s.amax(-1, keepdim=True)
    torch.testing.assert_close(torch.exp(s - m), torch.exp(s - m1) * torch.exp(m1 - m))
    # lemma 2: the corrected halves add up to the whole
    left, right = torch.exp(s[:, :20] - m1), torch.exp(s[:, 20:] - m)
    whole = torch.exp(m1 - m) * (left @ v[:20]) + right @ v[20:]
    torch.testing.assert_close(whole / torch.exp(s - m).sum(-1, keepdim=True), want)

    for block in (1, 7, 16, 40):  # the block size changes the rounding, not the result
        m, l, o = run(online_softmax_update, s, v, block)
        torch.testing.assert_close(o / l[:, None], want)
        torch.testing.assert_close(m + torch.log(l), torch.logsumexp(s, -1))
        torch.testing.assert_close(run(normalised_update, s, v, block)[2], want)
    print("both forms equal the softmax of the whole row, for every block size")

    # the mixtures
    _, l, o = run(online_softmax_update, s, v, 8)
    without = (o - want).abs().max()
    _, l, normalised = run(normalised_update, s, v, 8)
    twice = (normalised / l[:, None] - want).abs().max()
    wrong = (run(forgets_the_old_sum, s, v, 8)[2] - want).abs().max()
    print(f"un-normalised without the final division: error {without:.2f}")
    print(f"normalised, then divided again:           error {twice:.2f}")
    print(f"normalised, corrected without l / l':     error {wrong:.2f}")
    assert min(without, twice, wrong) > 0.05


if __name__ == "__main__":
    main()
