"""How the kernels multiply numbers of fp32."""

import torch

from flash_attn.problem import Problem
from flash_attn.utils import device as devices

SPLIT_FROM = 32  # head dim from which sums of split factors err no more than fp32 ones


def precision(problem: Problem) -> str:
    """What `tl.dot` is told: "ieee", "tf32" or "tf32x3"; 16-bit inputs have one way only, called "ieee".

    `torch.backends.cuda.matmul.fp32_precision` decides: "tf32" allows 11 bits of each factor, "ieee" (which
    `torch.set_float32_matmul_precision("highest")` sets) means fp32 multiplications. Torch starts with neither: then
    matrix units with tf32 multiply the high and low halves of both factors, which is no less accurate than fp32
    (docs/perf/triton-forward.md) and what PyTorch's own fp32 attention does. Head dims below `SPLIT_FROM` multiply in
    fp32: so few terms round less than the halves of a factor do.
    """
    if problem.dtype is not torch.float32:
        return "ieee"
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked in ("tf32", "ieee"):
        return asked
    found = devices.info()
    if found is None or found.hip or found.capability < (8, 0):
        return "ieee"
    return "tf32x3" if min(problem.head_dim, problem.head_dim_v) >= SPLIT_FROM else "ieee"
