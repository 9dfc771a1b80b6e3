"""Lesson 1. Softmax, and why every implementation subtracts the maximum.

    softmax(s)_i = exp(s_i) / sum_j exp(s_j)

exp grows so fast that fp32 overflows at s = 89. But for any number m

    exp(s_i) / sum_j exp(s_j) = exp(s_i - m) / sum_j exp(s_j - m)

because exp(-m) cancels. With m = max(s) the largest exponent is 0: no overflow, and the sum is at least 1, so the
division is safe too. Terms far below the maximum underflow to 0, which is what they are worth.

The logarithm of the denominator, lse = log sum_j exp(s_j) = m + log sum_j exp(s_j - m), comes for free. It says all
about the denominator in one number, and later lessons live from it: softmax(s)_i = exp(s_i - lse).
"""

import torch


def naive_softmax(s: torch.Tensor) -> torch.Tensor:
    e = torch.exp(s)
    return e / e.sum(-1, keepdim=True)


def safe_softmax(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax, lse) of the last dimension."""
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    return e / total, (m + torch.log(total)).squeeze(-1)


def main() -> None:
    torch.manual_seed(0)
    s = torch.randn(4, 8)
    p, lse = safe_softmax(s)
    torch.testing.assert_close(p, torch.softmax(s, -1))
    torch.testing.assert_close(lse, torch.logsumexp(s, -1))
    torch.testing.assert_close(p, torch.exp(s - lse[:, None]))
    print("small scores: naive, safe and torch agree")

    large = s + 100.0
    print("scores + 100, naive softmax:", naive_softmax(large)[0, :3].tolist())
    assert naive_softmax(large).isnan().all(), "exp(100) is infinite in fp32, and inf / inf is NaN"
    torch.testing.assert_close(safe_softmax(large)[0], p, atol=1e-5, rtol=1e-4)
    print("scores + 100, safe softmax: ", safe_softmax(large)[0][0, :3].tolist())

    # the two ends: the maximum itself contributes exp(0) = 1, a score far below contributes 0
    ends = torch.tensor([0.0, -200.0])
    assert safe_softmax(ends)[0].tolist() == [1.0, 0.0]


if __name__ == "__main__":
    main()
