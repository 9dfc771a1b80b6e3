"""Backward of packed attention as a plain function: no autograd, the gradients are the result."""

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.attention import run_forward
from flash_attn.validate import describe_varlen


@torch.no_grad()
def flash_attention_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of sequences packed behind one another, shaped like q, k and v.

    Args:
        dout, q, out: (total_q, H, D); k, v: (total_k, Hk, D).
        softmax_lse: fp32 (H, total_q), natural log; None: computed again from q and k.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where each sequence starts, and the end of the last.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        causal, softmax_scale: as in `flash_backward.flash_attention_backward`, in each sequence.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule.
    """
    problem, ops = describe_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal
    )
    if softmax_lse is None:
        softmax_lse = run_forward(problem, ops)[1]
    return _legacy.backward(problem, ops, out, softmax_lse, dout, None, (None, None, None), None)
