"""The sketches that this project began with, errors included, for tests that must reject them. Do not use."""

import math

import torch
import torch.nn.functional as F


def flash_attention_backward(dout, q, k, v, out, softmax_lse, causal=False, softmax_scale=None):
    """E1, E3: contracts heads with heads on (B, L, H, D); ignores out and lse; 0.0 is no scale."""
    B, L, H, D = q.shape
    scale = softmax_scale or (D**-0.5)
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if causal:
        mask = torch.tril(torch.ones(L, L))
        scores = scores.masked_fill(mask == 0, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    dv = torch.matmul(weights.transpose(-2, -1), dout)
    dattn = torch.matmul(dout, v.transpose(-2, -1))
    dattn = weights * (dattn - (weights * dattn).sum(dim=-1, keepdim=True))
    return torch.matmul(dattn, k) * scale, torch.matmul(dattn.transpose(-2, -1), q) * scale, dv


def docstring_gradients(dout, q, k, v):
    """E2, on (B, H, L, D): the docstring's dQ takes a dV that it has not computed; its own dV stands in."""
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
    dv = weights.transpose(-2, -1) @ dout
    lse = torch.logsumexp(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1, keepdim=True)
    return weights @ dv + lse * dout, q.transpose(-2, -1) @ (weights @ dout), dv


class FlashAttnFunction(torch.autograd.Function):
    """E3: returns three gradients for five inputs."""

    @staticmethod
    def forward(ctx, q, k, v, causal, softmax_scale):
        ctx.save_for_backward(q, k, v)
        return q * 1

    @staticmethod
    def backward(ctx, dout):
        return dout, dout, dout


def tutorial_flash_attention(Q, K, V, block_m, block_n):
    """E6: m and l are as long as the sequence, then overwritten by those of a tile."""
    N = Q.shape[0]
    O = torch.zeros_like(Q)
    m = torch.full((N,), -math.inf, dtype=Q.dtype)
    l = torch.zeros(N, dtype=Q.dtype)
    for i in range(N // block_m):
        q = Q[i * block_m : (i + 1) * block_m]
        o = torch.zeros_like(q)
        for j in range(K.shape[0] // block_n):
            k, v = K[j * block_n : (j + 1) * block_n], V[j * block_n : (j + 1) * block_n]
            s = q @ k.T
            m_old = m[i * block_m : (i + 1) * block_m]
            m_ij = torch.maximum(m_old, s.max(1).values)
            p = torch.exp(s - m_ij[:, None])
            alpha = torch.exp(m_old - m_ij)
            o = alpha[:, None] * o + p @ v
            l = alpha * l + p.sum(1)
            m = m_ij
        O[i * block_m : (i + 1) * block_m] = o / l[:, None]
    return O


def key_formula(Q, K, V, block, divide):
    """E12: the boxed formula has no division by l at the end (divide=False)."""
    O = torch.zeros_like(Q)
    m = Q.new_full((Q.shape[0],), -math.inf)
    l = torch.zeros_like(m)
    for j in range(0, K.shape[0], block):
        s = Q @ K[j : j + block].T
        m_new = torch.maximum(m, s.max(1).values)
        p, correction = torch.exp(s - m_new[:, None]), torch.exp(m - m_new)
        l = correction * l + p.sum(1)
        O = correction[:, None] * O + p @ V[j : j + block]
        m = m_new
    return O / l[:, None] if divide else O


def quick_reference(Q, K, V, block, causal=False):
    """E12, E13: the normalised form; its key loop runs over M, its tiles are never partial."""
    M, D = Q.shape
    O = torch.zeros_like(Q)
    for i in range(0, M, block):
        q, o = Q[i : i + block], Q.new_zeros(block, D)
        m, l = Q.new_full((block,), -math.inf), Q.new_zeros(block)
        for j in range(0, M, block):
            k, v = K[j : j + block], V[j : j + block]
            s = q @ k.T
            if causal:
                rows = torch.arange(i, i + block)[:, None] + K.shape[0] - M
                s = s.masked_fill(torch.arange(j, j + k.shape[0]) > rows, -math.inf)
            m_new = torch.maximum(m, s.amax(1)) if s.numel() else m
            p = torch.exp(s - m_new[:, None])
            l_new = torch.exp(m - m_new) * l + p.sum(1)
            correction = torch.exp(m - m_new) * (l / l_new)
            o = correction[:, None] * o + (p @ v) / l_new[:, None]
            m, l = m_new, l_new
        O[i : i + block] = o
    return O


def snippet_causal(Q, K, V):
    """E14: `if (q_idx > k_idx) S = -inf`."""
    s = Q @ K.T
    hidden = torch.arange(Q.shape[0])[:, None] > torch.arange(K.shape[0])
    return s.masked_fill(hidden, -math.inf).softmax(-1) @ V
