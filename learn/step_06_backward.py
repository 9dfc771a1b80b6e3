"""Lesson 6. The backward pass: recompute P, do not store it.

Given dO, the derivative of the loss by O, and with P = exp(S - lse), S = scale Q K^T:

    dV    = P^T dO
    dP    = dO V^T
    delta = rowsum(dO * O)                  one number a query
    dS    = P * (dP - delta)                the derivative of softmax, row by row
    dQ    = scale dS K        dK = scale dS^T Q

Why delta: the softmax derivative is dS_i = P_i (dP_i - sum_j P_j dP_j), and sum_j P_j dP_j = sum_j P_j dO.V_j = dO.O.
So the sum over all keys, which a tile does not see, is known before the first tile.

P is recomputed tile by tile from Q, K and lse: one product more, five instead of four (the forward has two), and no
N * N numbers are kept. Where a row sees no key, lse = -inf and P must be 0:
exp(-inf - -inf) is NaN, so lse = -inf is read as +inf.

dK and dV of a key tile sum over queries, dQ of a query tile sums over keys. One program can own a key tile and keep
its dK and dV on the chip; then the dQ contributions of several programs meet. They are added atomically (fast, but
the order, hence the rounding, changes from run to run) or in a second pass (deterministic).
"""

import torch
from torch import Tensor

from learn.step_05_forward import flash_forward


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_m: int = 16,
    block_n: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (M, D), k and v (N, D), from the saved out (M, D) and lse (M,)."""
    scale = q.shape[-1] ** -0.5
    delta = (dout * out).sum(-1)
    lse = torch.where(lse == float("-inf"), float("inf"), lse)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for j in range(0, k.shape[0], block_n):
        keys = slice(j, j + block_n)
        dk_tile, dv_tile = torch.zeros_like(k[keys]), torch.zeros_like(v[keys])
        for i in range(0, q.shape[0], block_m):
            rows = slice(i, i + block_m)
            p = torch.exp(q[rows] @ k[keys].T * scale - lse[rows, None])
            dv_tile += p.T @ dout[rows]
            ds = p * (dout[rows] @ v[keys].T - delta[rows, None])
            dk_tile += scale * ds.T @ q[rows]
            dq[rows] += scale * ds @ k[keys]
        dk[keys], dv[keys] = dk_tile, dv_tile
    return dq, dk, dv


def main() -> None:
    torch.manual_seed(0)
    for M, N in ((40, 40), (17, 50), (64, 9)):
        q, dout = (torch.randn(M, 16, dtype=torch.float64) for _ in range(2))
        k, v = (torch.randn(N, 16, dtype=torch.float64) for _ in range(2))
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        reference = torch.softmax(leaves[0] @ leaves[1].T * 16**-0.5, -1) @ leaves[2]
        want = torch.autograd.grad(reference, leaves, dout)
        out, lse = flash_forward(q, k, v)
        for got, expected in zip(flash_backward(dout, q, k, v, out, lse), want, strict=True):
            torch.testing.assert_close(got, expected)
    print("dQ, dK and dV equal autograd's through standard attention")

    # delta is the sum over keys that softmax's derivative asks for
    s = q @ k.T * 16**-0.5
    p, dp = torch.softmax(s, -1), dout @ v.T
    torch.testing.assert_close((p * dp).sum(-1), (dout * out).sum(-1))
    print("rowsum(dO * O) = rowsum(P * dP)")


if __name__ == "__main__":
    main()
