"""The third result of `return_attn_probs`: which probabilities dropout kept, for tests of dropout."""

import torch
from torch import Tensor

from flash_attn.problem import Operands, Problem
from flash_attn.reference.attention import _gather, _scores
from flash_attn.reference.dropout import keep_mask
from flash_attn.reference.layout import sequences


def signed_probabilities(p: Problem, ops: Operands) -> Tensor:
    """exp(score - row maximum), negative where dropped; (B, H, max_q, max_k) in the dtype of q.

    Computed apart from the kernels, in O(M N) memory, on the device of q. A masked key is 0 or -0;
    what lies behind the end of a sequence is 0. Not rescaled by 1 / (1 - p).
    """
    assert ops.rng_state is not None
    dtype = torch.promote_types(torch.float32, p.dtype)
    signed = torch.zeros(p.batch, p.heads, p.max_q, p.max_k, dtype=p.dtype, device=ops.q.device)
    heads = torch.arange(p.heads, device=ops.q.device)
    for seq in sequences(p, ops):
        M, N = len(seq.q_rows), len(seq.k_rows)
        if not M or not N:
            continue
        q_MHD, k_NHD, _ = _gather(p, ops, seq, dtype)
        s_HMN = _scores(p, ops, seq.b, q_MHD, k_NHD).s_HMN
        top_HM1 = s_HMN.amax(-1, keepdim=True)
        e_HMN = torch.exp(s_HMN - top_HM1.masked_fill(top_HM1 == -torch.inf, 0.0))
        keep_HMN = keep_mask(ops.rng_state, p.dropout_p, seq.b, heads, range(M), range(N), p.heads)
        signed[seq.b, :, :M, :N] = torch.where(keep_HMN, e_HMN, -e_HMN)
    return signed
