"""One solution of each exercise; look here last."""

import torch
from torch import Tensor


def safe_softmax(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def score_bytes(tokens: int, heads: int) -> int:
    return 2 * 4 * heads * tokens * tokens


def online_update(m: Tensor, l: Tensor, o: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m_new = torch.maximum(m, s.amax(-1))
    correction, p = torch.exp(m - m_new), torch.exp(s - m_new[:, None])
    return m_new, correction * l + p.sum(-1), correction[:, None] * o + p @ v


def tiled_reads(m: int, n: int, block_m: int) -> int:
    return -(-m // block_m) * n


def forward(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    M = q.shape[0]
    m, l, o = q.new_full((M,), float("-inf")), q.new_zeros(M), q.new_zeros(M, v.shape[1])
    for j in range(0, k.shape[0], block):
        s = q @ k[j : j + block].T * q.shape[1] ** -0.5
        m, l, o = online_update(m, l, o, s, v[j : j + block])
    return o / torch.where(l == 0, 1.0, l)[:, None], m + torch.log(l)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[1] ** -0.5
    p = torch.exp(scale * q @ k.T - torch.where(lse == float("-inf"), float("inf"), lse)[:, None])
    ds = p * (dout @ v.T - (dout * out).sum(-1, keepdim=True))
    return scale * ds @ k, scale * ds.T @ q, p.T @ dout


def causal_mask(M: int, N: int) -> Tensor:
    return torch.arange(N)[None, :] <= torch.arange(M)[:, None] + N - M


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[2] ** -0.5
    return torch.einsum("hmn,nhd->mhd", safe_softmax(s), v)


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    pivot = torch.where(lse == float("-inf"), 0.0, lse)
    return torch.exp(lse1 - pivot)[:, None] * out1 + torch.exp(lse2 - pivot)[:, None] * out2, lse


def read_page(pool: Tensor, table: Tensor, j: int) -> Tensor:
    return pool[table[j // pool.shape[1]], j % pool.shape[1]]


def window_tokens(tokens: int, window: int) -> int:
    short = min(tokens, window)
    return short * (short + 1) // 2 + (tokens - short) * window


def expected_output(p: Tensor, v: Tensor, keep: float) -> Tensor:
    return p @ v  # keep * (1 / keep) = 1: dropout does not change the mean


def folded_exponent(s: Tensor, m: Tensor, scale: float) -> Tensor:
    c = scale * 1.4426950408889634
    return torch.exp2(s * c - (m * c)[:, None])
