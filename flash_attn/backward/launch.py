"""Launches of the backward: Problem + Operands + what the forward gave -> Gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.backward.kernel import PAD, Features, Tiling, attn_bwd_dkdv, attn_bwd_dq
from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference.dropout import threshold
from flash_attn.tile.dropout import by_halves
from flash_attn.tile.score import factors
from flash_attn.tuning.backward import backward_config, cut, smaller
from flash_attn.tuning.config import BwdConfig, compiler_options
from flash_attn.tuning.precision import precision
from flash_attn.utils.launcher import SharedMemoryError, launch


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
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype must be float16, bfloat16 or float32, got {problem.dtype}"
    if problem.paged:
        return "the backward does not read a paged KV cache"
    if problem.batch_idx:
        return "the backward does not go through cache_batch_idx: two sequences may share a cache row"
    if max(problem.head_dim, problem.head_dim_v) > 512:
        return f"head_dim is at most 512, got {max(problem.head_dim, problem.head_dim_v)}"
    return None


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; a packed tensor has batch stride 0."""
    s = x.stride()
    return (s[0], s[1], s[2]) if x.dim() == 4 else (0, s[0], s[1])


def row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides of per-row statistics, (B, H, M) or packed (H, total)."""
    if x is None:
        return (0, 0, 0)
    s = x.stride()
    return (s[0], s[1], s[2]) if x.dim() == 3 else (0, s[0], s[1])


def readable(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not contiguous or a tile of rows would span 2^31 elements."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**24 else x.contiguous()


def targets(ops: Operands, into: tuple[Tensor | None, Tensor | None, Tensor | None]) -> list[Tensor]:
    """dq, dk and dv: those given, others new."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) if y is None else y
            for x, y in zip(ops[:3], into, strict=True)]  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Statistics(NamedTuple):
    """What attn_bwd_dq finds out about rows: (B, H, rows) or packed (H, rows) fp32, rows padded to whole blocks."""

    lse2: Tensor  # base-2 lse, +inf where a row sees no key
    delta: Tensor  # (1 - dropout_p) * (rowsum(dout * out) - dlse)


def statistics(problem: Problem, lse: Tensor) -> Statistics:
    pad = PAD.value
    rows = lse.shape[-1] + (pad * problem.batch if problem.varlen_q else 0)
    shape = (2, *lse.shape[:-1], cdiv(rows, pad) * pad)
    return Statistics(*torch.empty(shape, dtype=torch.float32, device=lse.device).unbind())


def grid(packed: bool, total: int, longest: int, block: int, heads: int, batch: int) -> tuple[int, int]:
    """(blocks of a head, programs); `total` is the number of rows of a packed tensor, see `rows.packed_tile`."""
    if packed:
        blocks = total // block + batch + 1
        return blocks, blocks * heads
    blocks = cdiv(longest, block)
    return blocks, blocks * heads * batch


def _statistics_at(stats: Statistics) -> tuple:
    """As arguments of the kernels."""
    return (stats.lse2, stats.delta), row_strides(stats.lse2)[:2]


def common(
    problem: Problem, ops: Operands, sizes: tuple, tile: BwdConfig, direction: str = "dkdv"
) -> tuple[tuple, dict]:
    """(the last run-time arguments, constants) of all kernels."""
    slopes = ops.alibi_slopes
    rescale = 1.0 / (1.0 - problem.dropout_p)
    args = (
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, ops.leftpad_k),
        (problem.max_q, problem.max_k, problem.group, problem.heads, problem.batch, *sizes),
        (problem.left or 0, problem.right or 0),
        (*factors(problem.scale, problem.softcap), problem.scale * rescale, rescale),
        (slopes, 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)),
        (ops.rng_state if problem.dropout_p else None, threshold(problem.dropout_p)),
    )  # fmt: skip
    features = Features(
        left=problem.left is not None, right=problem.right is not None, softcap=problem.softcap > 0,
        alibi=problem.alibi, dropout=threshold(problem.dropout_p) > 0, halves=by_halves(problem),
    )  # fmt: skip
    (d1, d2), (v1, v2) = cut(problem.head_dim, direction), cut(problem.head_dim_v, direction)
    tiling = Tiling(
        block_m=tile.block_m, block_n=tile.block_n, D=problem.head_dim, DV=problem.head_dim_v,
        d1=d1, d2=d2, v1=v1, v2=v2,
        rows_first=tile.rows_first or features.dropout > 0,  # the keys of a Philox call must lie side by side in a row
        precision=precision(problem),
        pipelined=tile.num_stages > 1,
        one_loop=tile.one_loop or problem.left is not None,  # two loops do not know the left edge
    )  # fmt: skip
    return args, dict(F=features, T=tiling)


def plan_dq(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, stats: Statistics,
    dq: Tensor, dsink: Tensor | None, tile: BwdConfig,
) -> Launch:  # fmt: skip
    blocks, programs = dq_grid(problem, ops, tile)
    args, constants = common(problem, ops, (blocks, ops.q.shape[0]), tile, "dq")
    tensors = (ops.q, ops.k, ops.v, out, dout, dq)
    rows = (lse, dlse, (row_strides(lse), row_strides(dlse)), ops.sink, dsink, 1.0 - problem.dropout_p)
    return Launch(
        attn_bwd_dq,
        (programs, 1, 1),
        (*tensors, *map(strides, tensors), *rows, *_statistics_at(stats), *args),
        constants,
        *tile[2:4],
    )


def dq_grid(problem: Problem, ops: Operands, tile: BwdConfig) -> tuple[int, int]:
    return grid(problem.varlen_q, ops.q.shape[0], problem.max_q, tile.block_m, problem.heads, problem.batch)


def dkdv_grid(problem: Problem, ops: Operands, tile: BwdConfig) -> tuple[int, int]:
    return grid(
        problem.varlen_k, ops.k.shape[0], problem.max_k, tile.block_n, problem.kv_heads, problem.batch
    )


def plan_dkdv(
    problem: Problem, ops: Operands, dout: Tensor, stats: Statistics, dk: Tensor, dv: Tensor, tile: BwdConfig
) -> Launch:
    blocks, programs = dkdv_grid(problem, ops, tile)
    args, constants = common(problem, ops, (blocks, ops.k.shape[0]), tile)
    tensors = (ops.q, ops.k, ops.v, dout, dk, dv)
    args = (*tensors, *map(strides, tensors), *_statistics_at(stats), None, *args)
    return Launch(attn_bwd_dkdv, (programs, 1, 1), args, constants, *tile[2:4])


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
    out, dout = readable(out), readable(dout)
    ops = ops._replace(q=readable(ops.q), k=readable(ops.k), v=readable(ops.v))
    dq, dk, dv = targets(ops, into)
    if problem.leftpad:
        for x in (dk, dv):
            x.zero_()  # nobody owns the rows before the first key
    stats = statistics(problem, lse)
    tile_dkdv, tile_dq = backward_config(problem)
    partial = None
    if problem.sink:
        _, programs = dq_grid(problem, ops, tile_dq._replace(block_m=16))  # as many as there can be
        partial = torch.zeros(programs, device=lse.device)
    tile_dq = run(
        lambda tile: plan_dq(problem, ops, out, lse, dout, dlse, stats, dq, partial, tile),
        tile_dq,
        problem,
    )
    # attn_bwd_dkdv reads the statistics of whole blocks of rows, which attn_bwd_dq must have written
    tile_dkdv = tile_dkdv._replace(block_m=min(tile_dkdv.block_m, tile_dq.block_m))
    run(lambda tile: plan_dkdv(problem, ops, dout, stats, dk, dv, tile), tile_dkdv, problem)
    dsink = None
    if partial is not None and ops.sink is not None:
        blocks, programs = dq_grid(problem, ops, tile_dq)
        dsink = partial[:programs].view(-1, problem.heads, blocks).sum((0, 2)).to(ops.sink.dtype)
    return Gradients(dq, dk, dv, dsink)


def run(plan: Callable[[BwdConfig], Launch], tile: BwdConfig, problem: Problem) -> BwdConfig:
    """Launch what `plan` says, with smaller tiles where they do not fit the device; the tile that did."""
    while True:
        step = plan(tile)
        try:
            launch(
                step.kernel, step.grid, step.args, step.constants, step.num_warps, step.num_stages, problem,
                **compiler_options(tile),
            )  # fmt: skip
            return tile
        except SharedMemoryError:
            less = smaller(tile)
            if less is None:
                raise
            tile = less
