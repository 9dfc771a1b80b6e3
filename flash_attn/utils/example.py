"""Inputs made up for a described problem, and running it once ahead of time."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flash_attn import attention
from flash_attn.errors import ArgumentTypeError
from flash_attn.problem import Operands, Problem


def operands(problem: Problem, device: torch.device | str | None = None) -> Operands:
    """Random normal inputs for `problem` in which every sequence has its full length."""
    p, device = problem, device or problem.device
    B, M, N = p.batch, p.max_q, p.max_k

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(p.dtype)

    def ints(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    pages = -(-N // p.page_size) if p.paged else 0
    if p.paged:
        k_rows: tuple[int, ...] = (B * pages, p.page_size)
    else:
        k_rows = (B * N,) if p.varlen_k else (B, N)
    return Operands(
        q=normal(*((B * M,) if p.varlen_q else (B, M)), p.heads, p.head_dim),
        k=normal(*k_rows, p.kv_heads, p.head_dim),
        v=normal(*k_rows, p.kv_heads, p.head_dim_v),
        cu_seqlens_q=ints(range(0, B * M + 1, M)) if p.varlen_q else None,
        cu_seqlens_k=ints(range(0, B * N + 1, N)) if p.varlen_k else None,
        seqused_q=ints([M] * B) if p.seqused_q else None,
        seqused_k=ints([N] * B) if p.seqused_k else None,
        leftpad_k=ints([0] * B) if p.leftpad else None,
        block_table=ints(range(B * pages)).view(B, pages) if p.paged else None,
        cache_batch_idx=ints(range(B)) if p.batch_idx else None,
        alibi_slopes=torch.rand(p.heads, device=device) if p.alibi else None,
        sink=torch.randn(p.heads, device=device) if p.sink else None,
        rng_state=torch.tensor([0, 0], device=device) if p.dropout_p else None,
    )


def warmup(problems: Problem | Iterable[Problem], backward: bool = False) -> None:
    """Run each problem once on made-up inputs, so that its kernels are compiled before the first real call.

    A kernel depends on head dims, dtype, features and tiles, not on lengths or strides: one problem of each kind
    will do. Few query rows have a forward of their own, and short problems (a few hundred rows) a backward. What is
    compiled stays on disk, and a later process only loads it.

    Args:
        problems: as `flash_attn.explain` takes them.
        backward: run the backward too.

    Raises:
        UnsupportedError: no backend can run a problem. ArgumentTypeError: something else than a Problem.
    """
    for problem in [problems] if isinstance(problems, Problem) else problems:
        if not isinstance(problem, Problem):
            raise ArgumentTypeError(f"problems must hold Problem, got {type(problem).__name__}")
        ops = operands(problem)
        out, lse = attention.run_forward(problem, ops)
        if backward:
            attention.run_backward(problem, ops, out, lse, torch.ones_like(out), None, (None, None, None))
