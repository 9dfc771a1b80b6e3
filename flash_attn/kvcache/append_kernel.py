"""The Triton kernel that stores new keys and values in a dense or paged cache and rotates queries and keys."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_attn.forward import launch
from flash_attn.ops.triton.rotary import rotate
from flash_attn.problem import Append, Operands, Problem
from flash_attn.tile import rows
from flash_attn.utils import launcher

row_offsets = rows.row_offsets


@triton.jit
def _rotated(x, offsets, in_rows, position, cos, sin, positions, D: tl.constexpr, HALF: tl.constexpr,
             INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of x, the first 2 * HALF dims rotated to `position`: [rows, BLOCK_D] fp32.

    Every element reads its partner of the pair again, from the first-level cache: one code for both styles and any
    fraction of the head. x must not be what is written.
    """
    dims = tl.arange(0, BLOCK_D)
    in_tile = in_rows[:, None] & (dims < D)[None, :]
    tile = tl.load(x + offsets[:, None] + dims[None, :], mask=in_tile, other=0.0).to(tl.float32)
    if INTERLEAVED:
        first, partner, pair = dims % 2 == 0, dims ^ 1, dims // 2
    else:
        first, pair = dims < HALF, dims % HALF
        partner = tl.where(first, dims + HALF, dims - HALF)
    turns = (dims < 2 * HALF)[None, :]
    other = tl.load(x + offsets[:, None] + partner[None, :], mask=in_rows[:, None] & turns, other=0.0).to(
        tl.float32
    )
    known = ((position >= 0) & (position < positions))[:, None] & turns
    angle = position[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=known, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
    return rotate(tile, other, c, tl.where(first[None, :], s, -s))


@triton.jit
def kv_append(
    q, k, v, q_out, k_cache, v_cache,
    q_strides, k_strides, v_strides, q_out_strides, k_cache_strides, v_cache_strides,
    cache_seqlens, seqused, cos, sin, batch_idx, paging,
    sizes,  # (queries, new keys, query heads, kv heads, capacity, cache rows or pages, rows of cos, q blocks, k blocks)
    EACH_Q: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program does BLOCK_R (row, head) pairs of q, of k or of v. Grid: (q blocks + 2 * k blocks) x sequences.

    Rows go to [cache_seqlens, cache_seqlens + new keys) of the cache; those that a bad length, index or page would
    put outside it are dropped. Strides are (batch, row, head).
    """
    M, new, heads, kv_heads, capacity, cache_rows, positions, q_blocks, k_blocks = sizes
    blocks = tl.maximum(q_blocks + 2 * k_blocks, 1)  # one at least: it writes the length
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    length = tl.load(cache_seqlens + b)
    if block == 0:
        tl.store(seqused + b, tl.minimum(tl.maximum(length, 0) + new, capacity))
    if block < q_blocks:
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        i, head = r // heads, r % heads
        in_rows = i < M
        if HALF:
            dims = tl.arange(0, BLOCK_D)
            position = length + (i if EACH_Q else i * 0)
            q_off = row_offsets(i, 0, b, q_strides) + head * q_strides[2]
            tile = _rotated(q, q_off, in_rows, position, cos, sin, positions, D, HALF, INTERLEAVED, BLOCK_D)
            out_off = row_offsets(i, 0, b, q_out_strides) + head * q_out_strides[2]
            tl.store(q_out + out_off[:, None] + dims[None, :], tile.to(q_out.dtype.element_ty),
                     mask=in_rows[:, None] & (dims < D)[None, :])  # fmt: skip
    else:
        is_v = block >= q_blocks + k_blocks
        r = (block - q_blocks - tl.where(is_v, k_blocks, 0)) * BLOCK_R + tl.arange(0, BLOCK_R)
        i, head = r // kv_heads, r % kv_heads
        position = length + i
        in_rows = (i < new) & (position >= 0) & (position < capacity)
        if PAGE:
            at = tl.load(paging[0] + b.to(tl.int64) * paging[1] + position // PAGE, mask=in_rows, other=0)
            row = position % PAGE
        else:
            at = position * 0 + (tl.load(batch_idx + b) if batch_idx is not None else b)
            row = position
        into = in_rows & (at >= 0) & (at < cache_rows)
        # names differ between the branches: Triton wants one type for each, and D and DV may pad to different sizes
        if is_v:
            dims_v = tl.arange(0, BLOCK_DV)
            v_off = row_offsets(i, 0, b, v_strides) + head * v_strides[2]
            in_v = into[:, None] & (dims_v < DV)[None, :]
            v_tile = tl.load(v + v_off[:, None] + dims_v[None, :], mask=in_v, other=0.0)
            v_to = at.to(tl.int64) * v_cache_strides[0] + row.to(tl.int64) * v_cache_strides[1]
            v_to += head * v_cache_strides[2]
            tl.store(v_cache + v_to[:, None] + dims_v[None, :], v_tile, mask=in_v)
        else:
            dims = tl.arange(0, BLOCK_D)
            k_off = row_offsets(i, 0, b, k_strides) + head * k_strides[2]
            in_k = into[:, None] & (dims < D)[None, :]
            if HALF:
                k_tile = _rotated(
                    k, k_off, into, position, cos, sin, positions, D, HALF, INTERLEAVED, BLOCK_D
                )
            else:
                k_tile = tl.load(k + k_off[:, None] + dims[None, :], mask=in_k, other=0.0)
            k_to = at.to(tl.int64) * k_cache_strides[0] + row.to(tl.int64) * k_cache_strides[1]
            k_to += head * k_cache_strides[2]
            tl.store(k_cache + k_to[:, None] + dims[None, :], k_tile.to(k_cache.dtype.element_ty), mask=in_k)


class Fixed(NamedTuple):
    """What a launch needs beside addresses."""

    grid: tuple[int, int, int]
    strides: tuple  # of q, k, v, q_out and the caches
    table_stride: int
    sizes: tuple
    constants: dict[str, Any]


class Prepared(NamedTuple):
    """A compiled launch that only wants tensors."""

    binary: launcher.Binary
    fixed: Fixed


_prepared: dict[Any, Prepared] = {}


def append(problem: Problem, ops: Operands, new: Append, q_out: Tensor, seqused: Tensor) -> None:
    """Append `new`, write the rotated q to `q_out` and the lengths behind the append to `seqused`."""
    if not launcher.direct(kv_append):
        launcher.launch(*plan(problem, ops, new, q_out, seqused), problem=problem)
        return
    assert new.k is not None and new.v is not None
    tensors = (ops.q, new.k, new.v, q_out, ops.k, ops.v)
    low = 0
    for x in tensors:
        low |= x.data_ptr()
    cos, table = new.rotary_cos, ops.block_table
    key = (
        problem, new.interleaved, *(x.stride() for x in tensors), new.k.shape[1], ops.k.shape, low & 15,
        cos if cos is None else cos.shape, table if table is None else (table.shape, table.stride()),
        ops.q.device.index,
    )  # fmt: skip
    ready = _prepared.get(key)
    if ready is None:
        if len(_prepared) >= launch.PREPARED_MAX:
            _prepared.clear()
        step = plan(problem, ops, new, q_out, seqused)
        binary = launcher.prepare(
            step.kernel, step.args, step.constants, step.num_warps, step.num_stages, problem
        )
        ready = _prepared[key] = Prepared(binary, fix(problem, ops, new, q_out))
    fixed = ready.fixed
    rest = (new.cache_seqlens, seqused, cos, new.rotary_sin, ops.cache_batch_idx, table)
    args = arguments(tensors, rest, fixed)
    ready.binary.launch(fixed.grid, (*args, *fixed.constants.values()))


def plan(problem: Problem, ops: Operands, new: Append, q_out: Tensor, seqused: Tensor) -> launch.Launch:
    """The launch of `kv_append` with tensors."""
    fixed = fix(problem, ops, new, q_out)
    rest = (new.cache_seqlens, seqused, new.rotary_cos, new.rotary_sin, ops.cache_batch_idx, ops.block_table)
    args = arguments((ops.q, new.k, new.v, q_out, ops.k, ops.v), rest, fixed)
    return launch.Launch(kv_append, fixed.grid, args, fixed.constants, 4, 1)


def arguments(tensors: Sequence[Tensor | None], rest: Sequence[Tensor | None], fixed: Fixed) -> tuple:
    """The run-time arguments of `kv_append`."""
    *indices, table = rest
    return (*tensors, *fixed.strides, *indices, (table, fixed.table_stride), fixed.sizes)


def fix(problem: Problem, ops: Operands, new: Append, q_out: Tensor) -> Fixed:
    """Everything about the launch that the addresses of the tensors do not change."""
    assert new.k is not None and new.v is not None
    fresh, cos, table, page = new.k.shape[1], new.rotary_cos, ops.block_table, problem.page_size
    half, positions = (0, 0) if cos is None else (cos.shape[1], cos.shape[0])
    capacity = ops.k.shape[1] if table is None else table.shape[1] * page
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (problem.head_dim, problem.head_dim_v))
    block_r = max(1, 2048 // max(block_d, block_dv))
    q_blocks = triton.cdiv(problem.max_q * problem.heads, block_r) if half else 0
    k_blocks = triton.cdiv(fresh * problem.kv_heads, block_r)
    return Fixed(
        grid=(max(q_blocks + 2 * k_blocks, 1) * problem.batch, 1, 1),
        strides=tuple(launch.strides(x) for x in (ops.q, new.k, new.v, q_out, ops.k, ops.v)),
        table_stride=0 if table is None else table.stride(0),
        sizes=(
            problem.max_q, fresh, problem.heads, problem.kv_heads, capacity, ops.k.shape[0], positions,
            q_blocks, k_blocks,
        ),
        constants=dict(
            EACH_Q=problem.left is not None or problem.right is not None, PAGE=page,
            D=problem.head_dim, DV=problem.head_dim_v, HALF=half, INTERLEAVED=new.interleaved,
            BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_R=block_r,
        ),
    )  # fmt: skip
