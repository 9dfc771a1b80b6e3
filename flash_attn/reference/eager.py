"""What plain PyTorch makes of a problem in a given precision, gradients by autograd: the yardstick of the tests.

Every intermediate is rounded to `dtype`, as in a model that writes attention out with torch operations.
It shares no arithmetic with the oracle: in fp64 the two check each other.
"""

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference.dropout import keep_mask
from flash_attn.reference.layout import distance, flat, sequences, visible


def _one(p: Problem, ops: Operands, b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out (H, M, Dv), lse (H, M)) of one sequence from q (H, M, D), k (Hk, N, D), v (Hk, N, Dv)."""
    M, N = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(p.group, 0) for x in (k, v))
    scores = (q * p.scale) @ k.transpose(1, 2)
    if p.softcap:
        scores = (scores / p.softcap).tanh() * p.softcap
    offset = distance(M, N, q.device)
    if ops.alibi_slopes is not None:
        slopes = ops.alibi_slopes if ops.alibi_slopes.dim() == 1 else ops.alibi_slopes[b]
        wide = torch.promote_types(slopes.dtype, scores.dtype)
        scores = scores - (slopes.to(wide)[:, None, None] * offset.abs()).to(scores.dtype)
    keep = visible(p, offset)
    scores = scores.masked_fill(~keep, -torch.inf)
    if ops.sink is not None:
        scores = torch.cat([scores, ops.sink.to(scores.dtype)[:, None, None].expand(-1, M, 1)], -1)
    lse = torch.logsumexp(scores.to(torch.promote_types(torch.float32, scores.dtype)), -1)
    probabilities = scores.softmax(-1)[..., :N].masked_fill(~keep.any(-1)[:, None], 0.0)
    if p.dropout_p:
        assert ops.rng_state is not None
        heads = torch.arange(p.heads, device=q.device)
        kept = keep_mask(ops.rng_state, p.dropout_p, b, heads, range(M), range(N), p.heads)
        probabilities = probabilities * kept / (1 - p.dropout_p)
    return probabilities @ v, lse


def forward(p: Problem, ops: Operands, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) in the shapes of `reference.attention.forward`; out in `dtype` (default: that of the problem)."""
    dtype = dtype or p.dtype
    q, (k, v) = flat(ops.q, p.varlen_q), (flat(x, p.varlen_k and not p.paged) for x in (ops.k, ops.v))
    # A result row that no sequence owns is taken from one row of zeros (-inf) behind all the others.
    outs, lses, owner = [], [], torch.full((q.shape[0],), -1, device=q.device)
    done = 0
    for seq in sequences(p, ops):
        q_b, k_b, v_b = (
            x[i].to(dtype).transpose(0, 1) for x, i in ((q, seq.q_rows), (k, seq.k_rows), (v, seq.k_rows))
        )
        out, lse = _one(p, ops, seq.b, q_b, k_b, v_b)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
        owner[seq.q_rows] = torch.arange(done, done + len(seq.q_rows), device=q.device)
        done += len(seq.q_rows)
    outs.append(outs[0].new_zeros(1, p.heads, p.head_dim_v))
    lses.append(lses[0].new_full((p.heads, 1), -torch.inf))
    out, lse = torch.cat(outs)[owner], torch.cat(lses, 1)[:, owner]
    if p.varlen_q:
        return out, lse
    return out.unflatten(0, (p.batch, p.max_q)), lse.unflatten(1, (p.batch, p.max_q)).transpose(0, 1)


def backward(
    p: Problem, ops: Operands, dout: Tensor, dlse: Tensor | None = None, dtype: torch.dtype | None = None
) -> Gradients:
    """Gradients by autograd through `forward`, in `dtype`, sink's in fp32 or better."""
    dtype = dtype or p.dtype
    leaves = [x.detach().to(dtype).requires_grad_() for x in (ops.q, ops.k, ops.v)]
    if ops.sink is not None:
        leaves.append(ops.sink.detach().to(torch.promote_types(torch.float32, dtype)).requires_grad_())
    with torch.enable_grad():
        out, lse = forward(p, ops._replace(**dict(zip(("q", "k", "v", "sink"), leaves, strict=False))), dtype)
    results, weights = [out], [dout.to(out.dtype)]
    if dlse is not None:
        results.append(lse)
        weights.append(dlse.to(lse.dtype))
    grads = torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)
    return Gradients(*grads)
