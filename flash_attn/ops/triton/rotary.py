"""Rotary embedding as one Triton kernel: dense or packed rows, any offset, in place or not.

`rotate` is the arithmetic; the KV cache's append kernel uses it too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn.errors import ArgumentValueError
from flash_attn.layers.rotary import check_rotary


@triton.jit
def rotate(x, partner, cos, sin):
    """First element of the pair (x, partner) after the rotation; all fp32."""
    return x * cos - partner * sin


# Not specialised on lengths: a new one compiles nothing. Strides are single numbers because torch.compile, which takes
# this kernel apart, knows no tuples (torch 2.11).
@triton.jit(do_not_specialize=["seqlen", "nheads", "seqlen_ro", "seqlen_offsets", "row_blocks"])
def rotary_kernel(
    out, x, cos, sin, cu_seqlens, seqlen_offsets, seqlen, nheads, seqlen_ro, row_blocks,
    out_batch_stride, out_seq_stride, out_head_stride, x_batch_stride, x_seq_stride, x_head_stride,
    ROTARY_HALF: tl.constexpr, PER_SEQUENCE_OFFSETS: tl.constexpr, INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_M rows of BLOCK_H heads of one sequence. Grid: (row_blocks * batch, head blocks), as only the first
    dimension of a grid may pass 65535.

    A program reads both elements of every pair before it writes them, and no other program touches them, so `out` may
    be `x`.
    """
    b = tl.program_id(0) // row_blocks
    row_block, head_block = tl.program_id(0) - b * row_blocks, tl.program_id(1)
    start = 0
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + b)
        seqlen = tl.load(cu_seqlens + b + 1) - start
    if row_block * BLOCK_M < seqlen:
        offset = seqlen_offsets
        if PER_SEQUENCE_OFFSETS:
            offset = tl.load(seqlen_offsets + b)
        heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        pairs = tl.arange(0, BLOCK_K)
        position = rows + offset
        known = (position >= 0) & (position < seqlen_ro)
        angle = position[:, None] * ROTARY_HALF + pairs[None, :]
        in_table = known[:, None] & (pairs[None, :] < ROTARY_HALF)
        c = tl.load(cos + angle, mask=in_table, other=1.0).to(tl.float32)[None, :, :]
        s = tl.load(sin + angle, mask=in_table, other=0.0).to(tl.float32)[None, :, :]
        if CONJUGATE:
            s = -s
        # 64-bit: batch stride times batch passes 2^31 for long packed tensors
        row = (start + rows).to(tl.int64)[None, :, None]
        batch, head = b.to(tl.int64), heads[:, None, None]
        x_row = x + batch * x_batch_stride + row * x_seq_stride + head * x_head_stride
        out_row = out + batch * out_batch_stride + row * out_seq_stride + head * out_head_stride
        in_rows = (heads < nheads)[:, None, None] & (rows < seqlen)[None, :, None]
        if INTERLEAVED:
            # one contiguous load of all pairs, split in registers
            dims = tl.arange(0, 2 * BLOCK_K)[None, None, :]
            in_tile = in_rows & (dims < 2 * ROTARY_HALF)
            tile = tl.load(x_row + dims, mask=in_tile, other=0.0).to(tl.float32)
            x0, x1 = tl.split(tl.reshape(tile, [BLOCK_H, BLOCK_M, BLOCK_K, 2]))
            y = tl.join(rotate(x0, x1, c, s), rotate(x1, x0, c, -s))
            tl.store(out_row + dims, tl.reshape(y, [BLOCK_H, BLOCK_M, 2 * BLOCK_K]), mask=in_tile)
        else:
            dims = pairs[None, None, :]
            in_tile = in_rows & (dims < ROTARY_HALF)
            x0 = tl.load(x_row + dims, mask=in_tile, other=0.0).to(tl.float32)
            x1 = tl.load(x_row + dims + ROTARY_HALF, mask=in_tile, other=0.0).to(tl.float32)
            tl.store(out_row + dims, rotate(x0, x1, c, s), mask=in_tile)
            tl.store(out_row + dims + ROTARY_HALF, rotate(x1, x0, c, -s), mask=in_tile)


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, interleaved: bool = False, inplace: bool = False, conjugate: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate the first `rotary_dim` of the last dimension of x by the angles of each row's position.

    Args:
        x: (B, S, H, D), or (total, H, D) with `cu_seqlens`; on a GPU.
        cos, sin: (positions, rotary_dim / 2), same dtype as each other.
        seqlen_offsets: position of row 0 of every sequence: an integer, or int32/int64 (B,).
        cu_seqlens: int32 (B + 1,): starts of the packed sequences; needs `max_seqlen`.
        interleaved: pairs are (2i, 2i + 1) (GPT-J) instead of (i, i + rotary_dim / 2) (GPT-NeoX).
        inplace: write into x and return it.
        conjugate: rotate by the negative angle, which is the gradient.

    Raises:
        ArgumentValueError: shapes disagree, or an integer offset passes the end of cos.
        ArgumentTypeError: dtypes disagree.

    Source: RoFormer, Su et al. 2021, arXiv:2104.09864.
    """
    batch, seqlen, nheads, rotary_dim = check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if x.stride(-1) != 1:
        raise ArgumentValueError(f"x must have a contiguous last dimension, got strides {x.stride()}")
    cos, sin = cos.contiguous(), sin.contiguous()
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.contiguous()
    if inplace:
        out = x
    elif cu_seqlens is not None:
        out = x.clone()  # rows behind the last sequence belong to no program
    else:
        out = torch.empty_like(x)
        if rotary_dim < x.shape[-1]:
            out[..., rotary_dim:].copy_(x[..., rotary_dim:])
    if 0 in x.shape or seqlen == 0:
        return out
    # a packed tensor is one whose batch stride is 0: the kernel adds the start of the sequence
    x_strides, out_strides = (
        (0, *t.stride()[:-1]) if cu_seqlens is not None else t.stride()[:-1] for t in (x, out)
    )
    per_sequence = isinstance(seqlen_offsets, Tensor)
    half = rotary_dim // 2
    block_k = max(triton.next_power_of_2(half), 2)
    block_m, block_h = max(1, min(16, 1024 // block_k)), 2
    row_blocks = triton.cdiv(seqlen, block_m)
    grid = (row_blocks * batch, triton.cdiv(nheads, block_h), 1)
    # the launch goes to the current device, which need not be that of x
    with torch.cuda.device_of(x):
        rotary_kernel[grid](
            out, x, cos, sin, cu_seqlens, seqlen_offsets, seqlen, nheads, cos.shape[0], row_blocks,
            *out_strides, *x_strides,
            ROTARY_HALF=half, PER_SEQUENCE_OFFSETS=per_sequence, INTERLEAVED=interleaved, CONJUGATE=conjugate,
            BLOCK_H=block_h, BLOCK_M=block_m, BLOCK_K=block_k,
        )  # fmt: skip
    return out
