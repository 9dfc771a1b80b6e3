"""Problems that PyTorch's own CPU flash kernel computes as well as we would, handed to it because it is compiled.

Its forward only: its backward rounds every partial sum of dk and dv to 16 bits, which costs more than twice the
error of a plain PyTorch attention (float16, causal, 1024 keys), and is several times slower than ours there.
"""

import torch
from torch import Tensor

from flash_attn.problem import Operands, Problem


def computes(p: Problem) -> bool:
    """Whether the kernel computes exactly this: dense, one head dim, no mask or the square causal one."""
    plain = not (p.softcap or p.dropout_p or p.alibi or p.sink)
    dense = not (
        p.varlen_q or p.varlen_k or p.seqused_q or p.seqused_k or p.leftpad or p.paged or p.batch_idx
    )
    mask = (p.left is None and p.right is None) or (p.causal and p.max_q == p.max_k)
    sizes = p.head_dim == p.head_dim_v and p.batch and p.max_q and p.max_k
    return bool(plain and dense and mask and sizes)


def forward(p: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in ops[:3])
    fold = p.group > 1 and not p.causal
    if fold:  # unmasked rows are alike: the heads of a group become more rows of their key head
        q = q.unflatten(1, (p.kv_heads, p.group)).flatten(2, 3)
    elif p.group > 1:
        k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, p.causal, scale=p.scale
    )
    if fold:
        out, lse = (x.unflatten(2, (p.group, p.max_q)).flatten(1, 2) for x in (out, lse))
    return out.transpose(1, 2).contiguous(), lse.contiguous()
