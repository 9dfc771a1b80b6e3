"""Lesson 13. A Triton kernel: the forward pass in forty lines.

Triton is Python in which one program computes one tile. Values are tiles; `tl.load` and `tl.store` move them between
memory and the chip; `tl.dot` uses the matrix units. The compiler does the rest: which thread holds what, shared
memory, and overlapping loads with arithmetic. The loop below is lesson 5 line by line; what is new is addressing
(pointer + row * stride + column) and masks for tiles that hang over the edge.

Without a GPU this runs in Triton's interpreter, which executes the same source with NumPy.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    import triton
    import triton.language as tl
except ImportError:
    sys.exit(
        "this lesson needs Triton, which torch brings only for GPUs. Install it, with the NumPy that its interpreter "
        f"wants:\n{sys.executable} -m pip install --constraint constraints.txt triton numpy"
    )


@triton.jit
def flash_forward_kernel(
    q, k, v, out, lse, M, N, scale_log2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_M queries of one head. All tensors are contiguous (heads, length, D)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    dims = tl.arange(0, D)
    q_at = q + head * M * D + rows[:, None] * D + dims[None, :]
    q_tile = tl.load(q_at, mask=rows[:, None] < M, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        at = head * N * D + cols[:, None] * D + dims[None, :]
        k_tile = tl.load(k + at, mask=cols[:, None] < N, other=0.0)
        v_tile = tl.load(v + at, mask=cols[:, None] < N, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile)) * scale_log2
        s = tl.where(cols[None, :] < N, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        correction = tl.exp2(m - m_new)
        l = l * correction + tl.sum(p, 1)
        acc = acc * correction[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
        m = m_new
    at = out + head * M * D + rows[:, None] * D + dims[None, :]
    tl.store(at, (acc / l[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < M)
    tl.store(lse + head * M + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=rows < M)


def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (H, M, D), k and v (H, N, D), contiguous, D a power of two from 16 -> out (H, M, D), lse (H, M)."""
    H, M, D = q.shape
    out, lse = torch.empty_like(q), torch.empty(H, M, dtype=torch.float32, device=q.device)
    block = 64 if q.is_cuda else 16
    grid = (triton.cdiv(M, block), H)
    scale_log2 = D**-0.5 * 1.4426950408889634
    flash_forward_kernel[grid](
        q, k, v, out, lse, M, k.shape[1], scale_log2, D=D, BLOCK_M=block, BLOCK_N=block
    )
    return out, lse


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for H, M, N, D in ((2, 33, 50, 32), (1, 16, 70, 16)):
        q = torch.randn(H, M, D, device=device, dtype=torch.float16)
        k, v = (torch.randn(H, N, D, device=device, dtype=torch.float16) for _ in range(2))
        out, lse = flash_forward(q, k, v)
        s = torch.einsum("hmd,hnd->hmn", q.double(), k.double()) * D**-0.5
        want = s.softmax(-1) @ v.double()
        plain = torch.softmax(q @ k.mT * D**-0.5, -1) @ v
        assert (out - want).abs().max() <= 2 * (plain - want).abs().max()
        torch.testing.assert_close(lse.double(), s.logsumexp(-1), atol=1e-3, rtol=1e-3)
    print(
        f"the kernel is as exact as torch in fp16 ({'on the GPU' if device == 'cuda' else 'in the interpreter'})"
    )


if __name__ == "__main__":
    main()
