"""How near a result must be to the fp64 oracle."""

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


def assert_as_close_as_torch(x: Tensor, want: Tensor, plain: Tensor, lse: Tensor | None = None) -> None:
    """The largest error of x is at most twice that of `plain`, PyTorch in the same precision, and one rounding.

    Where `want` is infinite, x is too. With `lse`, the logits' own rounding counts: kernels hold them in base 2, where
    one of size s has an absolute error of eps s log2(e), which is the relative error of its P. Only fp32 notices.
    """
    finite = want.isfinite()
    assert x.shape == want.shape
    assert torch.equal(x[~finite].double(), want[~finite])
    if not finite.any():
        return
    x, want, plain, rounding = (
        x[finite].double(), want[finite], plain[finite].double(), torch.finfo(x.dtype).eps,
    )  # fmt: skip
    if lse is not None and lse.isfinite().any():
        logit = LOG2E * lse[lse.isfinite()].abs().max().item()
        rounding = max(rounding, torch.finfo(torch.float32).eps * logit)
    error, yardstick = ((t - want).abs().max() for t in (x, plain))
    assert error <= 2 * yardstick + rounding * want.abs().max(), (
        f"error {error:.3g}, PyTorch's {yardstick:.3g}"
    )
