"""Lesson 5. The whole forward pass: tiles outside, online softmax inside.

State of a query tile: m (running maximum), l (running sum), o (un-normalised output). It is born with the tile and
dies with it: m, l and o of one tile must not leak into the next. After the last key tile

    O = o / l          lse = m + log(l)

lse is the only thing kept for the backward pass besides O: N numbers a head instead of N * N.

A row may see no key at all (later: masks, empty sequences). Then m = -inf, and exp(m - m) would be exp(NaN). The rule
everywhere in this project: such a row gives O = 0 and lse = -inf.
"""

import torch
from torch import Tensor


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, block_m: int = 16, block_n: int = 16, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q (M, D), k and v (N, D) -> O (M, D) and lse (M,)."""
    M, N = q.shape[0], k.shape[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.empty(M, v.shape[1], dtype=q.dtype), torch.empty(M, dtype=q.dtype)
    for i in range(0, M, block_m):
        q_tile = q[i : i + block_m]  # the last tile may be short
        rows = q_tile.shape[0]
        m = torch.full((rows,), float("-inf"), dtype=q.dtype)
        l = torch.zeros(rows, dtype=q.dtype)
        o = torch.zeros(rows, v.shape[1], dtype=q.dtype)
        for j in range(0, N, block_n):
            s = q_tile @ k[j : j + block_n].T * scale
            m_new = torch.maximum(m, s.amax(-1))
            correction = torch.exp(m - m_new)
            p = torch.exp(s - m_new[:, None])
            l = correction * l + p.sum(-1)
            o = correction[:, None] * o + p @ v[j : j + block_n]
            m = m_new
        empty = l == 0
        out[i : i + rows] = torch.where(empty[:, None], 0.0, o / torch.where(empty, 1.0, l)[:, None])
        lse[i : i + rows] = torch.where(empty, float("-inf"), m + torch.log(l))
    return out, lse


def main() -> None:
    torch.manual_seed(0)
    for M, N in ((64, 64), (50, 37), (1, 200), (33, 1)):
        q = torch.randn(M, 32, dtype=torch.float64)
        k, v = (torch.randn(N, 32, dtype=torch.float64) for _ in range(2))
        s = q @ k.T * 32**-0.5
        for block_m, block_n in ((16, 16), (64, 8), (7, 64)):
            out, lse = flash_forward(q, k, v, block_m, block_n)
            torch.testing.assert_close(out, torch.softmax(s, -1) @ v)
            torch.testing.assert_close(lse, torch.logsumexp(s, -1))
    out, lse = flash_forward(q, k[:0], v[:0])
    assert out.abs().max() == 0 and (lse == float("-inf")).all()
    print("equal to standard attention for every shape and every tile size; no key gives O = 0, lse = -inf")

    from flash_attn import flash_attn_func

    q, k, v = (torch.randn(50, 32) for _ in range(3))
    library = flash_attn_func(*(t[None, :, None] for t in (q, k, v)))[
        0, :, 0
    ]  # (batch, seqlen, heads, head_dim)
    torch.testing.assert_close(library, flash_forward(q, k, v)[0])
    print("equal to flash_attn_func")


if __name__ == "__main__":
    main()
