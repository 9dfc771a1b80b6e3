"""The dropout mask: a function of (seed, offset, batch, head, row, column) alone, equal in every backend.

Philox-4x32 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with 7 rounds, the fewest
that pass BigCrush. One call serves the 16 keys of an aligned group: key 16 * g + c takes a half of word c // 4, rotated
left by 8 where c % 4 is 2 or 3; the low half when c is even. It is dropped iff the low 15 bits of that half are below
`threshold` = round(p * 32768). `reference/dropout.py` is the same in torch integers, docs/numerics.md says how little
keys that share a word have in common. Where the threshold is 0 the host compiles kernels without dropout.
"""

import torch
import triton
import triton.language as tl

from flash_attn.problem import Problem
from flash_attn.reference.dropout import threshold
from flash_attn.utils import device


def by_halves(problem: Problem) -> bool:
    """`Features.halves`: 16 bits are compared as numbers of fp16, two at once; NVIDIA only.

    Without the sign, order of bits is order of numbers up to infinity, 0x7C00; what is above it compares as not less.
    Both keys of a pair must lie in one thread, as matrix units leave them; products in fp32 may lie otherwise.
    """
    found = device.info()
    if problem.device != "cuda" or torch.version.hip or (found is not None and found.capability < (8, 0)):
        return False
    return problem.dtype.itemsize == 2 and threshold(problem.dropout_p) <= 0x7C00


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four words of counter (c0 ... c3) under key (k0, k1), all uint32."""
    for _ in tl.static_range(7):
        # one wide multiplication where tl.philox, otherwise the same, has two: high and low word
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _pair(i):
    """Which pair of keys of a Philox call stands at its i-th place, 0 to 7: the bits of i from last to first.

    The first bits of i may be a warp's or a lane's number, the last ones are a register's. So each of the former halves
    the words that a lane needs, and which pairs take a rotated word is known at compile time.
    """
    return i % 2 * 4 + i // 2 % 2 * 2 + i // 4


@triton.jit
def key_order(BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Which key of a tile stands in which of its columns, int32 [BLOCK_N]; any order unless there is dropout.

    The 16 keys of a Philox call stand where one lane holds them, so that no call is made twice, no bit changes lanes.
    A lane holds columns c and c + 1 of every 8 (matrix units up to Hopper's), of every 16 where two warps share the
    rows (up to Ada's), or all columns of half a tile (Blackwell's): of 64 columns a call takes every fourth pair.
    Where warps share rows, and in tiles of fewer than 64 keys, a lane holds a part of the keys of a call.
    """
    c = tl.arange(0, BLOCK_N)
    if F.dropout:
        W: tl.constexpr = min(4, BLOCK_N // 16)  # calls side by side
        return c // (16 * W) * (16 * W) + c // 2 % W * 16 + _pair(c // (2 * W) % 8) * 2 + c % 2
    else:
        return c


@triton.jit
def random_pairs(rng, bh, rows, col0, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """uint32 [rows, BLOCK_N]: the 16 bits of keys col0 + key_order(BLOCK_N, F), those of an odd one in the high half.

    Both keys of a pair have the same word here. rng is (seed, offset), two int64 scalars; bh is sequence * query heads
    + query head; col0 and BLOCK_N are multiples of 16.
    """
    W: tl.constexpr = min(4, BLOCK_N // 16)
    seed, offset = rng
    k0, k1 = seed.to(tl.uint32), ((seed ^ offset) >> 32).to(tl.uint32)
    groups = col0 // 16 + W * tl.arange(0, BLOCK_N // 16 // W)[None, :, None] + tl.arange(0, W)[None, None, :]
    a, b, c, d = philox(
        offset.to(tl.uint32),
        groups.to(tl.uint32),
        bh.to(tl.uint32),
        rows[:, None, None].to(tl.uint32),
        k0,
        k1,
    )  # [rows, blocks, W] each
    # where a lane keeps what it computes, nothing of these choices is left in the machine code
    pair = _pair(tl.arange(0, 8))[None, None, :, None]
    first = tl.where(pair & 2 != 0, b[:, :, None, :], a[:, :, None, :])
    second = tl.where(pair & 2 != 0, d[:, :, None, :], c[:, :, None, :])
    word = tl.where(pair & 4 != 0, second, first)  # [rows, blocks, 8, W]
    word = tl.where(pair & 1 != 0, (word << 8) | (word >> 24), word)
    both = tl.broadcast_to(word[:, :, :, :, None], [rows.shape[0], BLOCK_N // 16 // W, 8, W, 2])
    return tl.reshape(both, [rows.shape[0], BLOCK_N])


@triton.jit
def dropped(x, pairs, threshold, F: tl.constexpr):
    """x where it is kept, else 0; `pairs` as `random_pairs` made it. With F.halves x is of 16 bits or fp32."""
    if F.halves:
        limit = (threshold * 0x10001).to(tl.uint32)
        if x.dtype.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise(
                "{.reg .b32 m; abs.f16x2 m, $2; set.lt.u32.f16x2 m, m, $4; not.b32 m, m; and.b32 $0, $1, m;}",
                "=r,r,r,r,r,r",
                [x, pairs, limit],
                dtype=x.dtype,
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 m; .reg .pred p, q; abs.f16x2 m, $4; setp.lt.f16x2 p|q, m, $6;"
                "selp.f32 $0, 0f00000000, $2, p; selp.f32 $1, 0f00000000, $3, q;}",
                "=f,=f,f,f,r,r,r,r",
                [x, pairs, limit],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
    else:
        odd = (tl.arange(0, x.shape[1]) % 2)[None, :]
        bits = (pairs >> (odd * 16).to(tl.uint32)) & 0x7FFF
        return tl.where(bits < threshold.to(tl.uint32), 0.0, x)
