"""Forward and backward of dense attention as plain functions: no autograd, the gradients are the result."""

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.attention import run_forward
from flash_attn.validate import describe


@torch.no_grad()
def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """softmax(softmax_scale * q k^T) v: q (B, M, H, D), k and v (B, N, Hk, D) -> (B, M, H, D)."""
    return run_forward(*describe(q, k, v, 0.0, softmax_scale, causal))[0]


@torch.no_grad()
def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor | None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), shaped like q, k and v.

    With P = exp(softmax_scale * q k^T - lse) and delta = rowsum(dout * out):
    dv = P^T dout, dS = P * (dout v^T - delta), dq = softmax_scale * dS k, dk = softmax_scale * dS^T q.

    Args:
        dout, out: (B, M, H, Dv); `out` is used as it is.
        softmax_lse: fp32 (B, H, M), natural log; None: computed again from q and k.
        causal: row i of M sees keys up to i + N - M of N (bottom-right aligned).
        softmax_scale: None: 1 / sqrt(head_dim). 0.0 is a scale.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule.
    """
    problem, ops = describe(q, k, v, 0.0, softmax_scale, causal)
    if softmax_lse is None:
        softmax_lse = run_forward(problem, ops)[1]
    return _legacy.backward(problem, ops, out, softmax_lse, dout, None, (None, None, None), None)
