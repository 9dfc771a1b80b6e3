"""Host side of the Hopper backward: what it can run, how it is cut, and the three launches.

Before: row statistics and a zeroed fp32 dQ (`hopper_pre.bwd_before`). Main: `hopper.attn_bwd_hopper`. After: dQ from
its accumulator's order to the caller's tensor (`hopper_pre.bwd_after`), unless the main kernel does that itself.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem

LOG2E = 1.4426950408889634


class Features(NamedTuple):
    """What the mask, the score and the storage ask of the code; compile time."""

    left: bool  # a bound on the keys left of the diagonal
    right: bool  # a bound on the keys right of it (causal: 0)
    softcap: bool
    ragged: bool  # lengths are read from the device: TMA does not know where a sequence ends


class Schedule(NamedTuple):
    """How the work is cut; compile time. `schedule` below says which and why."""

    D: int  # head dimension of q and k, padded to 64, 128 or 256
    DV: int  # head dimension of v, padded likewise, at most D
    BLOCK_M: int  # queries a step
    BLOCK_N: int  # keys of a program
    STAGES: int  # ring of Q and dO tiles
    DS_STAGES: int  # dS buffers
    PREFETCH: bool  # load the initial S accumulator one step ahead
    FINISH: bool  # the last program of a (batch, kv head) converts dQ; else a kernel after this one


def supports(problem: Problem) -> str | None:
    """Why the Hopper backward cannot run `problem`; None when it can."""
    checks = (
        (
            problem.dtype not in (torch.bfloat16, torch.float16),
            f"needs float16 or bfloat16, got {problem.dtype}",
        ),
        (problem.head_dim > 256 or problem.head_dim_v > 256, "head dimension above 256"),
        (problem.head_dim % 8 or problem.head_dim_v % 8, "head dimension not a multiple of 8 (TMA rows)"),
        (
            max(problem.head_dim, problem.head_dim_v) <= 32,
            "head dimension of at most 32 wastes half of a 64-wide tile",
        ),
        (problem.max_q == 0 or problem.max_k == 0, "no queries or no keys"),
        (problem.scale <= 0, "softmax scale not positive (masking multiplies -inf by it)"),
        (problem.dropout_p > 0, "dropout"),
        (problem.alibi, "ALiBi"),
        (problem.paged, "paged keys have no backward"),
        (problem.leftpad, "left-padded keys"),
        (problem.batch_idx, "cache_batch_idx"),
    )
    return next((reason for refused, reason in checks if refused), None)


def _padded(dim: int) -> int:
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


@lru_cache(maxsize=1024)
def features(problem: Problem) -> Features:
    ragged = problem.varlen_q or problem.varlen_k or problem.seqused_q or problem.seqused_k
    return Features(problem.left is not None, problem.right is not None, problem.softcap > 0, ragged)


@lru_cache(maxsize=1024)
def schedule(problem: Problem) -> Schedule:
    """How to cut `problem`, by head dimension, mask and length."""
    D = _padded(max(problem.head_dim, problem.head_dim_v))
    DV = _padded(problem.head_dim_v)
    finish = problem.max_q <= 4096
    if D == 256:
        return Schedule(D, DV, 64, 64, 2, 1, False, finish)
    if D == 128:
        return Schedule(D, DV, 64, 128, 2, 2, False, finish)
    bounded = problem.left is not None or problem.right is not None
    prefetch = not bounded and problem.max_q > 2048 and problem.softcap == 0
    return Schedule(D, DV, 128, 128, 2, 2, prefetch, finish)


def group_width(problem: Problem) -> int:
    """(batch, kv head) pairs whose key tiles alternate: as many as keep their Q and dO in 16 MiB of L2."""
    if problem.right is None:
        return 1
    bytes_of_pair = problem.max_q * (problem.head_dim + problem.head_dim_v) * 2 * problem.group
    width, fit = 1, max(1, (16 << 20) // bytes_of_pair)
    while width * 2 <= min(fit, problem.batch * problem.kv_heads):
        width *= 2
    return width


def for_tma(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy of it if TMA cannot address its strides (as FlashAttention-2 copies such inputs)."""
    unit = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        fits = fits and (size == 1 or (stride % unit == 0 and stride > 0))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=256)
def _layout(box: tuple[int, ...], dtype: torch.dtype):
    from triton.experimental.gluon import language as gl

    if dtype == torch.float32:
        return gl.NVMMASharedLayout(0, 32, rank=len(box))
    return gl.NVMMASharedLayout.get_default_for(
        list(box), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def _descriptor(x: Tensor, shape: list[int], strides: list[int], box: tuple[int, ...]):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, shape, strides, list(box), _layout(box, x.dtype))


def _tiles_of(x: Tensor, rows: int, dim: int, ragged: bool):
    """Descriptor of a (B, S, H, D) or packed (S, H, D) tensor, in tiles of rows by dim of one head.

    Dense: (B, H, S, D). Ragged, so that TMA clips at the end of any sequence: see `tile/hopper.py`; the end of the
    sequence counts in 16 bytes, 8 elements.
    """
    seq, head = x.stride(-3), x.stride(-2)
    heads, dims = x.shape[-2:]
    if ragged:
        shape = [2**31 - 1, 2**31 - 1, heads, 2**30, dims]
        return _descriptor(x, shape, [2**34 - seq, 8, head, seq, 1], (1, 1, 1, rows, dim))
    # the stride of a dimension of size 1 is free, and may be one that TMA refuses
    sizes = (x.shape[0], heads, x.shape[1])
    strides = [8 if n == 1 else s for n, s in zip(sizes, (x.stride(0), head, seq), strict=True)]
    return _descriptor(x, [*sizes, dims], [*strides, 1], (1, 1, rows, dim))


def _unit(x: Tensor, packed: bool) -> tuple[int, int]:
    """(batch stride, row stride) in 16 bytes."""
    return (0, x.stride(0) // 8) if packed else (x.stride(0) // 8, x.stride(1) // 8)


def _strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """(batch, seq, head); the batch stride of a packed tensor is 0."""
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _row_strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """(batch, head, row) of lse or dlse."""
    if x is None:
        return (0, 0, 0)
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _target(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if given is None else given


def query_tiles(problem: Problem, total_q: int, block: int) -> int:
    """Padded query tiles a head; sequence b of a packed tensor starts at tile cu_seqlens_q[b] // block + b."""
    if problem.varlen_q:
        return total_q // block + problem.batch
    return problem.batch * -(-problem.max_q // block)


def backward(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:  # fmt: skip
    """Gradients of `problem` from the passed out and lse.

    Args:
        out, dout: like q with the head dimension of v. lse, dlse: fp32 (B, H, M), packed (H, total_q).
        into: where to write dq, dk, dv; strided views allowed, last dimension contiguous; None: allocated here.
    """
    dq, dk, dv = (_target(given, like) for given, like in zip(into, (ops.q, ops.k, ops.v), strict=True))
    dsink_parts = None
    if ops.q.numel() == 0 or ops.k.numel() == 0:
        for x in (dq, dk, dv):
            x.zero_()
        return Gradients(dq, dk, dv, None if ops.sink is None else torch.zeros_like(ops.sink))
    T = schedule(problem)
    tiles = query_tiles(problem, ops.q.shape[0], T.BLOCK_M)
    device = ops.q.device
    dq_acc = torch.empty(problem.heads * tiles * T.BLOCK_M * T.D, dtype=torch.float32, device=device)
    stats = torch.empty(problem.heads * tiles * T.BLOCK_M * 2, dtype=torch.float32, device=device)
    arrivals = torch.empty(problem.batch * problem.kv_heads * 2, dtype=torch.int32, device=device)
    dsink_parts = _before(problem, T, ops, out, lse, dout, dlse, stats, dq_acc, arrivals, tiles)
    _main(problem, T, ops, dout, stats, dq_acc, arrivals, dq, dk, dv, tiles)
    if not T.FINISH:
        _after(problem, T, ops, dq_acc, dq, tiles)
    if problem.varlen_q or problem.varlen_k:
        _zero_rest(problem, ops, dq, dk, dv)
    dsink = None if dsink_parts is None else dsink_parts.sum(1).to(ops.sink.dtype)  # type: ignore[union-attr]
    return Gradients(dq, dk, dv, dsink)


def _launch(kernel, grid, args, constants, problem, **options: Any) -> None:
    from flash_attn.utils.launcher import launch

    launch(kernel, grid, args, constants, problem=problem, **options)


def _before(problem, T, ops, out, lse, dout, dlse, stats, dq_acc, arrivals, tiles) -> Tensor | None:
    from flash_attn.backward.hopper_pre import bwd_before

    packed = problem.varlen_q
    rows = 64 if T.D <= 128 else 32
    blocks = -(-(-(-problem.max_q // T.BLOCK_M) * T.BLOCK_M) // rows)
    parts = None
    if ops.sink is not None:
        parts = torch.empty(problem.heads, problem.batch * blocks, dtype=torch.float32, device=dout.device)
    # the main kernel adds scale * log2 e * (q.k + initial value), or with a softcap or at 256 uses base-2 lse itself
    lse_scale = LOG2E if T.D == 256 or problem.softcap > 0 else 1.0 / problem.scale
    args = (
        out, dout, lse, dlse, ops.sink, stats, dq_acc, arrivals, parts, _strides(out, packed), _strides(dout, packed),
        _row_strides(lse, packed), _row_strides(dlse, packed), (ops.cu_seqlens_q, ops.seqused_q),
        (problem.max_q, problem.heads, problem.kv_heads, tiles), problem.head_dim_v, lse_scale,
    )  # fmt: skip
    constants = dict(BLOCK_M=T.BLOCK_M, ROWS=rows, D=T.D, DV=T.DV)
    _launch(bwd_before, (blocks, problem.heads, problem.batch), args, constants, problem)
    return parts


def main_arguments(problem, T, ops, dout, stats, dq_acc, arrivals, dq, dk, dv, tiles):
    """(grid, arguments, constants) of the main kernel."""
    F = features(problem)
    keys = 64 if T.D <= 128 else T.BLOCK_N
    columns = T.D if T.BLOCK_M == 128 else T.D // 2
    key_tiles = -(-problem.max_k // T.BLOCK_N)
    pairs = problem.batch * problem.kv_heads
    q, dout, k, v = (for_tma(x) for x in (ops.q, dout, ops.k, ops.v))
    boxes = [
        _tiles_of(x, rows, dim, F.ragged)
        for x, rows, dim in (
            (q, T.BLOCK_M, T.D), (dout, T.BLOCK_M, T.DV), (k, keys, T.D), (v, keys, T.DV), (dk, keys, T.D),
            (dv, keys, T.DV),
        )
    ]  # fmt: skip
    units: tuple = (None,) * 6
    if F.ragged:
        units = tuple(_unit(x, problem.varlen_q) for x in (q, dout))
        units += tuple(_unit(x, problem.varlen_k) for x in (k, v, dk, dv))
    sums = None
    if T.D <= 128:
        # a piece of dQ (64 rows, `columns` columns) in the order of the accumulator, seen as rows of 256
        sums = _descriptor(dq_acc, [dq_acc.numel() // 256, 256], [256, 1], (64 * columns // 256, 256))
    args = (
        *boxes[:4], _descriptor(stats, [stats.numel()], [1], (T.BLOCK_M,)), sums, *boxes[4:], units,
        dq, dq_acc, arrivals, _strides(dq, problem.varlen_q),
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k),
        (problem.max_q, problem.max_k, problem.heads, problem.kv_heads, pairs, group_width(problem), key_tiles, tiles),
        (problem.left or 0, problem.right or 0), problem.head_dim,
        (problem.scale * LOG2E, problem.scale / (problem.softcap or 1.0), problem.softcap * LOG2E), problem.scale,
    )  # fmt: skip
    return (key_tiles * pairs, 1, 1), args, dict(F=F, T=T)


def _main(problem, T, ops, dout, stats, dq_acc, arrivals, dq, dk, dv, tiles) -> None:
    from flash_attn.backward.hopper import attn_bwd_hopper

    # TMA writes dk and dv: into tensors it can address, copied where the caller's are not
    dk_to, dv_to = for_tma(dk), for_tma(dv)
    grid, args, constants = main_arguments(
        problem, T, ops, dout, stats, dq_acc, arrivals, dq, dk_to, dv_to, tiles
    )
    _launch(attn_bwd_hopper, grid, args, constants, problem, num_warps=4)
    if dk_to is not dk:
        dk.copy_(dk_to)
    if dv_to is not dv:
        dv.copy_(dv_to)


def _after(problem, T, ops, dq_acc, dq, tiles) -> None:
    from flash_attn.backward.hopper_pre import bwd_after

    pieces = -(-problem.max_q // T.BLOCK_M) * 2
    args = (
        dq_acc, dq, _strides(dq, problem.varlen_q), ops.cu_seqlens_q, (problem.max_q, tiles), problem.head_dim,
        problem.scale,
    )  # fmt: skip
    constants = dict(BLOCK_M=T.BLOCK_M, D=T.D)
    _launch(bwd_after, (pieces, problem.heads, problem.batch), args, constants, problem)


def _zero_rest(problem, ops, dq, dk, dv) -> None:
    from flash_attn.backward.hopper_pre import zero_after_end

    args = (
        dq, dk, dv, _strides(dq, problem.varlen_q), _strides(dk, problem.varlen_k), _strides(dv, problem.varlen_k),
        ops.cu_seqlens_q, ops.cu_seqlens_k, (dq.shape[0], dk.shape[0]), problem.batch,
    )  # fmt: skip
    D, DV = problem.head_dim, problem.head_dim_v
    constants = dict(
        HEADS=problem.heads, KV_HEADS=problem.kv_heads, D=D, DV=DV, PD=_padded(D), PDV=_padded(DV)
    )  # fmt: skip
    _launch(zero_after_end, (64, 1, 1), args, constants, problem)
