"""Launches of the backward: Problem + Operands + what the forward gave -> Gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.backward.kernel import Features, attn_bwd_dkdv, attn_bwd_dq
from flash_attn.backward.preprocess import PAD, attn_bwd_preprocess, zero_tail
from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference.dropout import threshold
from flash_attn.tile.score import factors
from flash_attn.tuning.backward import backward_config
from flash_attn.tuning.config import BwdConfig
from flash_attn.utils.launcher import launch


class Launch(NamedTuple):
    """One kernel launch, so that it can also be printed, timed or compiled without a GPU."""

    kernel: object
    grid: tuple[int, int, int]
    args: tuple  # run-time arguments, in the kernel's order
    constants: dict  # compile-time arguments
    num_warps: int
    num_stages: int


def supports(problem: Problem) -> str | None:
    """None, or why these kernels cannot run the backward of `problem`."""
    if problem.paged:
        return "the backward does not read a paged KV cache"
    if problem.batch_idx:
        return "the backward does not go through cache_batch_idx: two sequences may share a cache row"
    if max(problem.head_dim, problem.head_dim_v) > 512:
        return f"head_dim is at most 512, got {max(problem.head_dim, problem.head_dim_v)}"
    return None


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; a packed tensor has batch stride 0."""
    s = x.stride()
    return (s[0], s[1], s[2]) if x.dim() == 4 else (0, s[0], s[1])


def _row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides of per-row statistics, (B, H, M) or packed (H, total)."""
    if x is None:
        return (0, 0, 0)
    s = x.stride()
    return (s[0], s[1], s[2]) if x.dim() == 3 else (0, s[0], s[1])


def _block(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Statistics(NamedTuple):
    lse2: (
        Tensor  # base-2 lse, +inf where a row sees no key; (B, H, rows) or packed (H, rows) fp32, rows padded
    )
    delta: Tensor  # (1 - dropout_p) * (rowsum(dout * out) - dlse), same shape
    dsink: Tensor | None  # partial sums (H, B, row blocks)


PREPROCESS_ROWS = PAD.value


def plan_preprocess(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    stats: Statistics,
) -> Launch:
    blocks = cdiv(problem.max_q, PREPROCESS_ROWS)
    partial = stats.dsink
    args = (
        out, dout, _strides(out), _strides(dout),
        (lse, dlse, stats.lse2, stats.delta), (_row_strides(lse), _row_strides(dlse), _row_strides(stats.lse2)),
        (ops.cu_seqlens_q, ops.seqused_q), problem.max_q, 1.0 - problem.dropout_p,
        ops.sink, partial, (0, 0) if partial is None else partial.stride()[:2],
    )  # fmt: skip
    constants = dict(BLOCK_M=PREPROCESS_ROWS, BLOCK_DV=_block(problem.head_dim_v), DV=problem.head_dim_v)
    return Launch(attn_bwd_preprocess, (blocks, problem.heads, problem.batch), args, constants, 8, 1)


def _common(problem: Problem, ops: Operands, stats: Statistics) -> tuple[tuple, dict]:
    """(arguments after the tensors and their strides, constants but for the tile) of both kernels."""
    slopes = ops.alibi_slopes
    inner, outer = factors(problem.scale, problem.softcap)
    rescale = 1.0 / (1.0 - problem.dropout_p)
    args = (
        (stats.lse2, stats.delta), _row_strides(stats.lse2)[:2],
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, ops.leftpad_k),
        (problem.max_q, problem.max_k, problem.heads, problem.group),
        (problem.left or 0, problem.right or 0),
        (inner, outer, problem.scale * rescale, rescale),
        (slopes, 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)),
        (ops.rng_state if problem.dropout_p else None, threshold(problem.dropout_p)),
    )  # fmt: skip
    exact = problem.dtype is not torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    features = (problem.left is not None, problem.right is not None, problem.softcap > 0, problem.alibi)
    constants = dict(
        F=Features(*features, problem.dropout_p > 0),
        BLOCK_D=_block(problem.head_dim), BLOCK_DV=_block(problem.head_dim_v),
        D=problem.head_dim, DV=problem.head_dim_v, PRECISION="ieee" if exact else "tf32",
    )  # fmt: skip
    return args, constants


def _with_tile(constants: dict, tile: BwdConfig) -> dict:
    return {"F": constants["F"], "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | constants


def plan_dkdv(
    problem: Problem, ops: Operands, dout: Tensor, stats: Statistics, dk: Tensor, dv: Tensor, tile: BwdConfig
) -> Launch:
    args, constants = _common(problem, ops, stats)
    tensors = (ops.q, ops.k, ops.v, dout, dk, dv)
    grid = (cdiv(problem.max_k, tile.block_n), problem.kv_heads, problem.batch)
    return Launch(
        attn_bwd_dkdv,
        grid,
        (*tensors, *map(_strides, tensors), *args),
        _with_tile(constants, tile),
        *tile[2:],
    )


def plan_dq(
    problem: Problem, ops: Operands, dout: Tensor, stats: Statistics, dq: Tensor, tile: BwdConfig
) -> Launch:
    args, constants = _common(problem, ops, stats)
    tensors = (ops.q, ops.k, ops.v, dout, dq)
    grid = (cdiv(problem.max_q, tile.block_m), problem.heads, problem.batch)
    return Launch(
        attn_bwd_dq, grid, (*tensors, *map(_strides, tensors), *args), _with_tile(constants, tile), *tile[2:]
    )


def statistics(problem: Problem, lse: Tensor) -> Statistics:
    """Room for the statistics of all rows."""
    pad = PREPROCESS_ROWS
    rows = lse.shape[-1] + (pad * problem.batch if problem.varlen_q else 0)
    shape = (2, *lse.shape[:-1], cdiv(rows, pad) * pad)
    lse2, delta = torch.empty(shape, dtype=torch.float32, device=lse.device).unbind()
    if not problem.sink:
        return Statistics(lse2, delta, None)
    blocks = cdiv(problem.max_q, PREPROCESS_ROWS)
    partial = torch.zeros((problem.heads, problem.batch, blocks), dtype=torch.float32, device=lse.device)
    return Statistics(lse2, delta, partial)


def _clear_unused(x: Tensor, cu_seqlens: Tensor | None, partly_used: bool, problem: Problem) -> None:
    """Zero the rows of a gradient that the kernels do not write."""
    if partly_used:
        x.zero_()
    elif cu_seqlens is not None:
        constants = dict(BLOCK_M=16, BLOCK_D=_block(x.shape[-1]), D=x.shape[-1])
        args = (x, (0, *x.stride()[:2]), cu_seqlens, problem.batch, x.shape[0])
        launch(zero_tail, (16, x.shape[1], 1), args, constants, 4, 1, problem)


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    """Gradients of q, k, v and sink; dq, dk and dv are written into the tensors of `into` that are given.

    `out` (like q with Dv) and `lse` (natural log, (B, H, M) or packed (H, total_q)) are used as passed, so they may
    belong to a larger softmax than this call's. Every gradient is bitwise reproducible.
    """
    assert supports(problem) is None, supports(problem)
    out, dout = _contiguous_rows(out), _contiguous_rows(dout)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) if y is None else y
                  for x, y in zip((ops.q, ops.k, ops.v), into, strict=True))  # fmt: skip
    stats = statistics(problem, lse)
    _clear_unused(dq, ops.cu_seqlens_q, problem.seqused_q, problem)
    for x in (dk, dv):
        _clear_unused(x, ops.cu_seqlens_k, problem.seqused_k or problem.leftpad, problem)
    tile_dkdv, tile_dq = backward_config(problem)
    for step in (
        plan_preprocess(problem, ops, out, lse, dout, dlse, stats),
        plan_dkdv(problem, ops, dout, stats, dk, dv, tile_dkdv),
        plan_dq(problem, ops, dout, stats, dq, tile_dq),
    ):
        launch(step.kernel, step.grid, step.args, step.constants, step.num_warps, step.num_stages, problem)
    dsink = None
    if stats.dsink is not None and ops.sink is not None:
        dsink = stats.dsink.sum((1, 2)).to(ops.sink.dtype)
    return Gradients(dq, dk, dv, dsink)
