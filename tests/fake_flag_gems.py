"""What `import flag_gems` gives in tests on a CPU: attention with the defects of FlagGems 5.0.2, from the formulas.

`flash_attn_varlen_func` has the defects that an adapter can meet (docs/flaggems.md has the list); every other entry
point that an adapter must not use raises.
"""

import torch
from torch import Tensor

__version__ = "5.0.2"


def enable(*_, **__):
    raise AssertionError("enable() replaces operators of torch for the whole process")


use_gems = only_enable = enable


def flash_attention_forward(*_, **__):
    raise AssertionError("the dense kernels are wrong: D1, D2, D3, D6, D10, D15")


def scaled_dot_product_attention(*_, **__):
    raise AssertionError("masks and gradients are wrong: D13, D14")


def flash_attn_varlen_opt_func(*_, **__):
    raise AttributeError("module 'torch' has no attribute 'emtpty' (D12)")


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
    q_descale=None, k_descale=None, v_descale=None, s_aux=None, num_splits=0, cp_world_size=1, cp_rank=0,
    cp_tot_seqused_k=None, fa_version=2,
):  # fmt: skip
    """out, or (out, lse (H, total_q)), as 5.0.2 computes it: D4, D5, D6, D7, D8, D9, D11, D18 and its assertions."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert k.size() == v.size() and k.stride() == v.stride(), "strides of K and V (D6)"
    total, H, D = q.shape
    B, Hk = cu_seqlens_q.numel() - 1, k.shape[-2]
    assert D % 8 == 0 and D <= 256 and num_splits == 0
    assert (cu_seqlens_k is None) != (seqused_k is None)
    if seqused_k is not None and block_table is None:
        raise NameError("k_bos is not defined (D11)")
    if block_table is None and D & (D - 1):
        raise AssertionError("reads K past the head dim (D18)")
    if max_seqlen_q == 1 and alibi_slopes is None:
        causal = False
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    left, right = (-1 if w >= max_seqlen_k else w for w in (left, right))
    swapped = (
        max_seqlen_q == 1 and alibi_slopes is None and Hk < H and left < 0 and right < 0 and not dropout_p
    )
    if swapped:
        q.reshape(B, Hk, H // Hk, D)  # needs one query in every sequence
    result = torch.full_like(q, torch.nan) if out is None else out
    lse = torch.full((H, total), torch.nan)  # torch.empty there
    starts_q = cu_seqlens_q.tolist()
    for b in range(B):
        rows = slice(starts_q[b], starts_q[b + 1])
        k_b, v_b = _keys(k, v, b, cu_seqlens_k, seqused_k, block_table)
        slopes = None if alibi_slopes is None else alibi_slopes[b] if alibi_slopes.ndim == 2 else alibi_slopes
        mask = dict(causal=causal, left=left, right=right, slopes=slopes)
        result[rows], lse[:, rows] = _attend(q[rows], k_b, v_b, softmax_scale, softcap, dropout_p, **mask)
    if swapped:
        lse = lse.reshape(Hk, H // Hk, B).transpose(1, 2).reshape(H, B)  # D8
    return (result, lse) if return_softmax_lse else result


def _keys(k: Tensor, v: Tensor, b: int, cu_seqlens_k, seqused_k, block_table) -> tuple[Tensor, Tensor]:
    """(N, Hk, D) of one sequence."""
    if block_table is None:
        rows = slice(*cu_seqlens_k[b : b + 2].tolist())
        return k[rows], v[rows]
    size = k.shape[1]
    where = torch.arange(int(seqused_k[b]))
    where = block_table[b].long()[where // size] * size + where % size
    # row r of the pages lies at r times the stride of a row, wherever the pages lie
    flat = [
        x.as_strided((where.max() + 1 if len(where) else 0, *x.shape[2:]), x.stride()[1:]) for x in (k, v)
    ]
    return flat[0][where], flat[1][where]


def _attend(q, k, v, scale, softcap, dropout_p, *, causal, left, right, slopes) -> tuple[Tensor, Tensor]:
    """(out (M, H, D), lse (H, M)) of one sequence."""
    M, N, G = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)))
    scores = (q.float() @ k.float().transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    row, col = torch.arange(M)[:, None], torch.arange(N)[None, :]
    distance = col - row - N + M
    if slopes is not None:
        # D9: with causal, the bias of the last row in every row
        bias = (col - N + 1).expand(M, N) if causal else -distance.abs()
        scores = scores + slopes[:, None, None] * bias
    keep = torch.ones(M, N, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if left >= 0:  # D4: only the left bound switches windows on, and the right one is taken literally
        keep &= (distance >= -left) & (distance <= right)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1) if N else torch.full(scores.shape[:2], -torch.inf)
    p = (scores - lse.clamp(min=-1e30)[..., None]).exp()
    if dropout_p:
        p = p * (torch.rand_like(p) >= dropout_p)  # D7: not divided by 1 - p
    out = p.to(v.dtype).float() @ v.float()
    return out.transpose(0, 1).to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)
