"""Launch of the forward kernel: Problem + Operands -> (out, lse)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.forward.kernel import Features, attn_fwd
from flash_attn.problem import Operands, Problem
from flash_attn.reference.dropout import threshold
from flash_attn.tile.dropout import by_halves
from flash_attn.tile.score import bounded, factors
from flash_attn.tuning import table
from flash_attn.tuning.config import FwdConfig, compiler_options, pieces, smaller
from flash_attn.tuning.precision import precision
from flash_attn.utils import launcher

L2_BYTES = 16 * 2**20  # keys and values that a section of heads may occupy: well below any data-centre L2


class Launch(NamedTuple):
    """One kernel launch, so that it can also be printed, timed or compiled without a GPU."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple  # run-time arguments, in the kernel's order
    constants: dict[str, Any]  # compile-time arguments
    num_warps: int
    num_stages: int


class Fixed(NamedTuple):
    """What a launch needs beside addresses: it depends on shapes, strides and tiles, not on the tensors' memory."""

    grid: tuple[int, int, int]
    strides: tuple  # of q, k, v, out, lse
    paging: tuple[int, int]  # row stride of the block table, page size
    numbers: tuple  # sizes, band, factors
    slope_stride: int
    dropout: tuple[int, float]
    constants: dict[str, Any]
    config: FwdConfig


class Prepared(NamedTuple):
    """A compiled launch that only wants tensors; without a binary, they must be copied first."""

    binary: launcher.Binary | None
    fixed: Fixed
    plain: tuple | None  # the arguments behind lse, constants included, when there are no tensors among them


_prepared: dict[Any, Prepared] = {}
PREPARED_MAX = 4096  # plans kept; all are dropped when there are more


def supports(problem: Problem) -> str | None:
    """None, or why this kernel cannot run the forward of `problem`."""
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype must be float16, bfloat16 or float32, got {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > 512:
        return f"head_dim is at most 512, got {max(problem.head_dim, problem.head_dim_v)}"
    return None


def empty_outputs(problem: Problem, q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse), not initialised. As in FlashAttention-2, out has the memory layout of q where their shapes agree."""
    if problem.head_dim == problem.head_dim_v:
        out = torch.empty_like(q)
    else:
        out = q.new_empty((*q.shape[:-1], problem.head_dim_v))
    lse_shape = (
        (problem.heads, q.shape[0]) if problem.varlen_q else (problem.batch, problem.heads, problem.max_q)
    )
    return out, q.new_empty(lse_shape, dtype=torch.float32)


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """out like q with the head dim of v, and lse in fp32: (B, H, M) or (H, total_q). See `attn_fwd`."""
    q, k, v = ops.q, ops.k, ops.v
    out, lse = empty_outputs(problem, q)
    if not launcher.direct(attn_fwd):
        if problem.device != "cpu" and not aligned(ops):
            return realigned(problem, ops)
        launcher.launch(*plan(problem, ops, out, lse, table.forward_config(problem)))
        return out, lse
    slopes, pages, sink = ops.alibi_slopes, ops.block_table, ops.sink
    key = (
        problem, q.stride(), k.stride(), v.stride(), q.shape[0], q.get_device(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        slopes is not None and slopes.stride(), pages is not None and pages.stride(), sink is not None and sink.dtype,
        precision(problem), table.overridden(),
    )  # fmt: skip
    ready = _prepared.get(key)
    if ready is None:
        if len(_prepared) >= PREPARED_MAX:
            _prepared.clear()
        ready = _prepared[key] = prepare(problem, ops, out, lse)
    fixed = ready.fixed
    if ready.binary is None:
        return realigned(problem, ops)
    if ready.plain is not None:
        args = (q, k, v, out, lse, *ready.plain)
    else:
        args = (*arguments(ops, out, lse, fixed), *fixed.constants.values())
    ready.binary.launch(fixed.grid, args)
    return out, lse


def aligned(ops: Operands) -> bool:
    """Whether every row of q, k and v starts at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        for x in ops[:3]
    )


def realigned(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """`forward` on copies of q, k and v whose rows are padded with zeros to a multiple of 16 bytes.

    As FlashAttention-2 does. The kernel can read rows that start anywhere, and compiles, but for head dim 33 in
    bfloat16 its result was wrong on an H200 (Triton 3.6, tiles 128 x 64, 2026-11-21; right in the interpreter).
    """

    def padded(x: Tensor) -> Tensor:
        D = x.shape[-1]
        copy = x.new_zeros((*x.shape[:-1], D + -D % (16 // x.element_size())))
        copy[..., :D] = x
        return copy

    q, k, v = (padded(x) for x in ops[:3])
    wide = problem._replace(head_dim=q.shape[-1], head_dim_v=v.shape[-1])
    out, lse = forward(wide, ops._replace(q=q, k=k, v=v))
    return out[..., : problem.head_dim_v].contiguous(), lse


def prepare(problem: Problem, ops: Operands, out: Tensor, lse: Tensor) -> Prepared:
    """The compiled kernel for `problem`, with smaller tiles where the first choice does not fit the device."""
    config = table.forward_config(problem)
    if not aligned(ops):
        return Prepared(None, fix(problem, ops, out, lse, config), None)
    while True:
        step = plan(problem, ops, out, lse, config)
        try:
            binary = launcher.prepare(
                step.kernel, step.args, step.constants, step.num_warps, step.num_stages, problem,
                **compiler_options(config),
            )  # fmt: skip
            bare = all(x is None for x in ops[3:])
            rest = (*step.args[5:], *step.constants.values()) if bare else None
            return Prepared(binary, fix(problem, ops, out, lse, config), rest)
        except launcher.SharedMemoryError:
            less = smaller(config)
            if less is None:
                raise
            config = less


def plan(problem: Problem, ops: Operands, out: Tensor, lse: Tensor, config: FwdConfig) -> Launch:
    """The launch that computes `problem` with the tiles of `config`."""
    fixed = fix(problem, ops, out, lse, config)
    args = arguments(ops, out, lse, fixed)
    return Launch(attn_fwd, fixed.grid, args, fixed.constants, config.num_warps, config.num_stages)


def arguments(ops: Operands, out: Tensor, lse: Tensor, fixed: Fixed) -> tuple:
    """The kernel's run-time arguments."""
    return (
        ops.q, ops.k, ops.v, out, lse, *fixed.strides,
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, ops.leftpad_k, ops.cache_batch_idx),
        (ops.block_table, *fixed.paging), *fixed.numbers,
        ops.alibi_slopes, fixed.slope_stride, ops.sink, ops.rng_state, *fixed.dropout,
    )  # fmt: skip


def fix(problem: Problem, ops: Operands, out: Tensor, lse: Tensor, config: FwdConfig) -> Fixed:
    """Everything about the launch that the addresses of the tensors do not change."""
    blocks, programs = grid(problem, ops.q.shape[0], config.block_m)
    slopes, pages = ops.alibi_slopes, ops.block_table
    sizes = (
        problem.max_q, problem.max_k, problem.group, problem.heads, problem.batch, blocks, section(problem),
        ops.q.shape[0],
    )  # fmt: skip
    return Fixed(
        grid=(programs, 1, 1),
        strides=(
            strides(ops.q), strides(ops.k), strides(ops.v), strides(out),
            (0, lse.stride(0)) if problem.varlen_q else lse.stride()[:2],
        ),
        paging=(0 if pages is None else pages.stride(0), max(problem.page_size, 1)),
        numbers=(sizes, (problem.left or 0, problem.right or 0), factors(problem.scale, problem.softcap)),
        slope_stride=0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
        dropout=(threshold(problem.dropout_p), 1.0 / (1.0 - problem.dropout_p)),
        constants=dict(
            F=features(problem, config), BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=config.split
        )
        | head_dims(problem),
        config=config,
    )  # fmt: skip


def features(problem: Problem, config: FwdConfig) -> Features:
    return Features(
        left=problem.left is not None,
        right=problem.right is not None,
        softcap=problem.softcap > 0,
        alibi=problem.alibi,
        dropout=threshold(problem.dropout_p) > 0,
        halves=by_halves(problem),
        bounded=bounded(problem),
        positive=problem.scale > 0 or problem.softcap > 0,
        fast_tanh=problem.dtype.itemsize == 2 and problem.device == "cuda" and not torch.version.hip,
        page_tiles=problem.paged and not problem.leftpad and problem.page_size % config.block_n == 0,
        precision=precision(problem),
    )


def head_dims(problem: Problem) -> dict[str, int]:
    """The constants that say how tiles cover the head dimensions; a second tile that is not needed is 16 wide."""
    (d, d2), (dv, dv2) = pieces(problem.head_dim), pieces(problem.head_dim_v)
    return dict(
        D=problem.head_dim, DV=problem.head_dim_v, BLOCK_D=d, BLOCK_D2=d2 or 16, BLOCK_DV=dv, BLOCK_DV2=dv2 or 16
    )  # fmt: skip


def grid(problem: Problem, rows: int, block_m: int) -> tuple[int, int]:
    """(blocks of rows that a head has, programs); `rows` is the length of a packed q, see `rows.packed_tile`."""
    if problem.varlen_q:
        blocks = rows // block_m + problem.batch + 1
        return blocks, blocks * problem.heads
    blocks = -(-problem.max_q // block_m)
    return blocks, blocks * problem.heads * problem.batch


def section(problem: Problem) -> int:
    """Query heads whose keys and values together fit the L2 cache."""
    head = problem.max_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize // problem.group
    return max(1, L2_BYTES // max(head, 1))


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head); a packed tensor has batch stride 0. Pages are a batch of page_size rows."""
    batch, row, head = x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
    return batch, row, head
