"""The oracle: attention and its gradients written the slow, obvious way, one sequence at a time, in fp64 by default.

Never tuned, never fast; every backend is tested against it. M queries, N keys, H query heads, Hk heads of
keys and values, D and Dv their dimensions; a tensor carries its shape as a suffix. Derivations are in
docs/numerics.md. It runs on the device of its operands.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference.dropout import keep_mask
from flash_attn.reference.layout import Sequence, distance, flat, sequences, visible


class Scores(NamedTuple):
    s_HMN: Tensor  # logits; -inf where the row does not see the key
    slope_HMN: Tensor | float  # d(logit) / d(scale * q.k): 1 without soft cap


def _scores(p: Problem, ops: Operands, b: int, q_MHD: Tensor, k_NHD: Tensor) -> Scores:
    s_HMN = torch.einsum("mhd,nhd->hmn", q_MHD, k_NHD) * p.scale
    slope_HMN: Tensor | float = 1.0
    if p.softcap:
        tanh_HMN = torch.tanh(s_HMN / p.softcap)
        s_HMN, slope_HMN = p.softcap * tanh_HMN, 1 - tanh_HMN**2
    distance_MN = distance(q_MHD.shape[0], k_NHD.shape[0], q_MHD.device)
    if ops.alibi_slopes is not None:
        slopes_H = ops.alibi_slopes if ops.alibi_slopes.dim() == 1 else ops.alibi_slopes[b]
        s_HMN = s_HMN - slopes_H.to(s_HMN.dtype)[:, None, None] * distance_MN.abs()
    return Scores(s_HMN.masked_fill(~visible(p, distance_MN), -torch.inf), slope_HMN)


def _gather(p: Problem, ops: Operands, seq: Sequence, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one sequence, the heads of k and v repeated for the query heads that share them."""
    q_MHD = flat(ops.q, p.varlen_q)[seq.q_rows].to(dtype)
    k_packed = p.varlen_k and not p.paged
    k_NHD, v_NHD = (
        flat(x, k_packed)[seq.k_rows].to(dtype).repeat_interleave(p.group, 1) for x in (ops.k, ops.v)
    )
    return q_MHD, k_NHD, v_NHD


def _survivors(p: Problem, ops: Operands, b: int, M: int, N: int, dtype: torch.dtype) -> Tensor | float:
    """What dropout multiplies the probabilities with: 0 or 1 / (1 - p); (H, M, N), or 1 without dropout."""
    if not p.dropout_p:
        return 1.0
    assert ops.rng_state is not None
    heads = torch.arange(p.heads, device=ops.q.device)
    keep_HMN = keep_mask(ops.rng_state, p.dropout_p, b, heads, range(M), range(N), p.heads)
    return keep_HMN.to(dtype) / (1 - p.dropout_p)


def forward(p: Problem, ops: Operands, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out, lse) computed and returned in `dtype`.

    out is (B, M, H, Dv) or (total_q, H, Dv); lse (natural log, sink included, before dropout) is (B, H, M) or
    (H, total_q). A row that sees no key, or that no sequence owns, has out 0; its lse is -inf (the sink, if the
    row belongs to a sequence and there is one).
    """
    rows = flat(ops.q, p.varlen_q).shape[0]
    out_RHD = torch.zeros(rows, p.heads, p.head_dim_v, dtype=dtype, device=ops.q.device)
    lse_HR = torch.full((p.heads, rows), -torch.inf, dtype=dtype, device=ops.q.device)
    for seq in sequences(p, ops):
        q_MHD, k_NHD, v_NHD = _gather(p, ops, seq, dtype)
        s_HMN = _scores(p, ops, seq.b, q_MHD, k_NHD).s_HMN
        lse_HM = torch.logsumexp(s_HMN, -1)
        if ops.sink is not None:
            lse_HM = torch.logaddexp(lse_HM, ops.sink.to(dtype)[:, None])
        p_HMN = _probabilities(s_HMN, lse_HM)
        p_HMN = p_HMN * _survivors(p, ops, seq.b, len(seq.q_rows), len(seq.k_rows), dtype)
        out_RHD[seq.q_rows] = torch.einsum("hmn,nhd->mhd", p_HMN, v_NHD)
        lse_HR[:, seq.q_rows] = lse_HM
    if p.varlen_q:
        return out_RHD, lse_HR
    return out_RHD.unflatten(0, (p.batch, p.max_q)), lse_HR.unflatten(1, (p.batch, p.max_q)).transpose(0, 1)


def _probabilities(s_HMN: Tensor, lse_HM: Tensor) -> Tensor:
    # A row without keys may carry either infinity; exp(-inf - inf) = 0 is what it means, -inf - -inf is NaN.
    return torch.exp(s_HMN - lse_HM.masked_fill(lse_HM == -torch.inf, torch.inf)[..., None])


def backward(
    p: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """Gradients by formula, in `dtype` and the shapes of q, k, v (and sink); 0 in rows that no sequence uses.

    `out` and `lse` are used as passed, so they may be those of a larger problem that this call is a part of
    (ring attention). dlse, shaped like lse, is the gradient that reaches the returned lse.
    """
    assert not p.paged or ops.block_table is not None
    dq_RHD = torch.zeros(flat(ops.q, p.varlen_q).shape, dtype=dtype, device=ops.q.device)
    k_packed = p.varlen_k and not p.paged
    dk_RHD, dv_RHD = (
        torch.zeros(flat(x, k_packed).shape, dtype=dtype, device=x.device) for x in (ops.k, ops.v)
    )
    dsink_H = None if ops.sink is None else torch.zeros(p.heads, dtype=dtype, device=ops.q.device)
    out_RHD, dout_RHD = flat(out, p.varlen_q), flat(dout, p.varlen_q)
    lse_HR = lse if p.varlen_q else lse.transpose(0, 1).flatten(1)
    if dlse is not None:
        dlse = dlse if p.varlen_q else dlse.transpose(0, 1).flatten(1)
    for seq in sequences(p, ops):
        q_MHD, k_NHD, v_NHD = _gather(p, ops, seq, dtype)
        do_MHD, o_MHD = dout_RHD[seq.q_rows].to(dtype), out_RHD[seq.q_rows].to(dtype)
        lse_HM = lse_HR[:, seq.q_rows].to(dtype)
        delta_HM = torch.einsum("mhd,mhd->hm", do_MHD, o_MHD)
        if dlse is not None:
            delta_HM = delta_HM - dlse[:, seq.q_rows].to(dtype)
        s_HMN, slope_HMN = _scores(p, ops, seq.b, q_MHD, k_NHD)
        p_HMN = _probabilities(s_HMN, lse_HM)
        z_HMN = _survivors(p, ops, seq.b, len(seq.q_rows), len(seq.k_rows), dtype)
        dp_HMN = torch.einsum("mhd,nhd->hmn", do_MHD, v_NHD) * z_HMN
        ds_HMN = p_HMN * (dp_HMN - delta_HM[..., None]) * slope_HMN * p.scale
        dq_RHD[seq.q_rows] = torch.einsum("hmn,nhd->mhd", ds_HMN, k_NHD)
        dk_NHD = torch.einsum("hmn,mhd->nhd", ds_HMN, q_MHD)
        dv_NHD = torch.einsum("hmn,mhd->nhd", p_HMN * z_HMN, do_MHD)
        # added, not stored: two sequences may read the same cache row
        dk_RHD.index_add_(0, seq.k_rows, dk_NHD.unflatten(1, (p.kv_heads, p.group)).sum(2))
        dv_RHD.index_add_(0, seq.k_rows, dv_NHD.unflatten(1, (p.kv_heads, p.group)).sum(2))
        if dsink_H is not None and ops.sink is not None:
            share_HM = _probabilities(ops.sink.to(dtype)[:, None, None], lse_HM)[..., 0]
            dsink_H -= (share_HM * delta_HM).sum(-1)
    return Gradients(dq_RHD.view(ops.q.shape), dk_RHD.view(ops.k.shape), dv_RHD.view(ops.v.shape), dsink_H)
