"""Problems that PyTorch's own CPU flash kernel computes as well as we would, handed to it because it is compiled.

Its backward is given 16-bit inputs in float32. In 16 bits it rounds every partial sum of dk and dv, which costs more
than twice the error of a plain PyTorch attention (float16, causal, 1024 keys: 2.06 times), and takes about ten times
as long on a CPU without 16-bit matrix products.

Its forward takes a row of scores that are all NaN for one without keys, and gives 0 and lse 0 (torch 2.13, fewer than
16 keys): such a problem is left to our own tiles, so that a NaN stays one.
"""

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem


def computes(p: Problem) -> bool:
    """Whether the kernel computes exactly this: dense, one head dim, no mask or the square causal one."""
    plain = not (p.softcap or p.dropout_p or p.alibi or p.sink)
    dense = not (
        p.varlen_q or p.varlen_k or p.seqused_q or p.seqused_k or p.leftpad or p.paged or p.batch_idx
    )
    mask = (p.left is None and p.right is None) or (p.causal and p.max_q == p.max_k)
    sizes = p.head_dim == p.head_dim_v and p.batch and p.max_q and p.max_k
    return bool(plain and dense and mask and sizes)


def _fold(p: Problem, x: Tensor) -> Tensor:
    """(B, H, M, ...) -> (B, Hk, G * M, ...): unmasked rows are alike, so a group's heads are more rows."""
    return x.unflatten(1, (p.kv_heads, p.group)).flatten(2, 3)


def _unfold(p: Problem, x: Tensor) -> Tensor:
    return x.unflatten(2, (p.group, p.max_q)).flatten(1, 2)


@torch.no_grad()
def forward(p: Problem, ops: Operands) -> tuple[Tensor, Tensor] | None:
    """(out, lse); None where the kernel may have hidden a NaN."""
    q, k, v = (x.transpose(1, 2) for x in ops[:3])
    fold = p.group > 1 and not p.causal
    if fold:
        q = _fold(p, q)
    elif p.group > 1:
        k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, p.causal, scale=p.scale
    )
    # one look at the lse, and at the inputs only where a row's is 0
    if lse.count_nonzero() < lse.numel() and not (ops.q.isfinite().all() and ops.k.isfinite().all()):
        return None
    if fold:
        out, lse = _unfold(p, out), _unfold(p, lse)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@torch.no_grad()
def backward(
    p: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:
    wide = torch.promote_types(torch.float32, p.dtype)
    q, k, v, out, dout = (x.transpose(1, 2).to(wide) for x in (*ops[:3], out, dout))
    fold = p.group > 1 and not p.causal
    if fold:
        q, out, dout, lse = (_fold(p, x) for x in (q, out, dout, lse))
    elif p.group > 1:
        k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse.contiguous(), 0.0, p.causal, scale=p.scale
    )
    if fold:
        dq = _unfold(p, dq)
    elif p.group > 1:
        dk, dv = (x.unflatten(1, (p.kv_heads, p.group)).sum(2) for x in (dk, dv))
    grads = (x.transpose(1, 2) for x in (dq, dk, dv))
    return Gradients(*(g.to(p.dtype) if y is None else y.copy_(g) for g, y in zip(grads, into, strict=True)))
