"""Lesson 12. Numerics: what is kept in fp32, why exp2, and what -inf does.

Inputs are 16-bit: fp16 has 11 significant bits, bf16 has 8. The rules of every good kernel:

* Products accumulate in fp32. A sum of thousands of terms in fp16 loses its small terms; tensor cores accumulate in
  fp32 for free.
* S, m, l and O stay in fp32. P is rounded to 16 bit for the second product only: it lies in [0, 1], and its relative
  error of one rounding averages out.
* exp(x) = exp2(x log2(e)). GPUs have an instruction for exp2, not for exp. The factor log2(e) joins the scale:
  exp2(s * c - m * c) with c = scale * log2(e) is one multiply-add and one exp2 for each element.
* -inf is a good mask: exp2(-inf) = 0 exactly. But -inf - (-inf) is NaN: a row without keys needs m replaced by 0.

An error of 5 % is not "normal for fp16": it means an fp16 accumulator, or a bug. The test that this project uses
everywhere: the error against fp64 is at most twice that of plain PyTorch in the same type.
"""

import torch

from flash_attn import flash_attn_func


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max())


def main() -> None:
    torch.manual_seed(0)
    # accumulation: 4096 terms of about 1, in fp16 and in fp32
    terms = torch.rand(4096, dtype=torch.float64) + 0.5
    total = torch.tensor(0.0, dtype=torch.float16)
    for term in terms.half():
        total = total + term
    in_half, in_single = error(total, terms.sum()), error(terms.half().float().sum(), terms.sum())
    print(
        f"sum of 4096 terms near 1: error {in_half:.1f} with an fp16 accumulator, {in_single:.3f} with fp32"
    )
    assert in_half > 100 * in_single

    # exp2 with a folded scale equals exp
    s, scale = torch.randn(1000, dtype=torch.float64), 0.125
    c = scale * 1.4426950408889634
    torch.testing.assert_close(torch.exp2(s * c - 1.0 * c), torch.exp((s - 1.0) * scale))

    # -inf as a mask, and the one place where it bites
    inf = float("inf")
    assert torch.exp2(torch.tensor(-inf)) == 0
    assert torch.tensor(-inf).sub(torch.tensor(-inf)).isnan()

    # the yardstick: twice the error of plain PyTorch in the same type
    q, k, v = (torch.randn(2, 128, 4, 64, dtype=torch.float64) for _ in range(3))
    for dtype in (torch.float16, torch.bfloat16):
        x = [t.to(dtype) for t in (q, k, v)]
        exact = torch.einsum("bmhd,bnhd->bhmn", x[0].double(), x[1].double()) / 8
        want = torch.einsum("bhmn,bnhd->bmhd", exact.softmax(-1), x[2].double())
        plain_scores = torch.einsum("bmhd,bnhd->bhmn", x[0], x[1]) / 8
        plain = torch.einsum("bhmn,bnhd->bmhd", plain_scores.softmax(-1), x[2])
        ours = flash_attn_func(*x)
        errors = f"{error(plain, want):.1e}, of flash_attn_func {error(ours, want):.1e}"
        print(f"{str(dtype)[6:]:>9}: error of plain torch {errors}")
        assert error(ours, want) <= 2 * error(plain, want)


if __name__ == "__main__":
    main()
