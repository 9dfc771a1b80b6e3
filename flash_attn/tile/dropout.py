"""The dropout mask: a function of (seed, offset, batch, head, row, column) alone, equal in every backend.

Philox-4x32 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with 7 rounds, the fewest
that pass BigCrush. One call serves the 8 keys of an aligned group: key 8 * g + c takes 16 bits of word c // 2,
the low half when c is even. It is kept iff those 16 bits are below `threshold` = round((1 - p) * 65536).
`reference/dropout.py` is the same in torch integers. Where the threshold is 65536 nothing is dropped: the host then
compiles kernels without dropout, and the one comparison of 32 bits here need not know that number.
"""

import triton
import triton.language as tl

from flash_attn.reference.dropout import threshold
from flash_attn.utils import device


def calls_abreast(dropout_p: float) -> int:
    """`Features.dropout`: Philox calls side by side in a tile, see `key_order`; 0 where nothing is dropped."""
    found = device.info()
    if threshold(dropout_p) == 65536:
        return 0
    return 8 if found is not None and found.capability[0] < 9 else 4


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
def key_order(BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Which key of a tile stands in which of its columns, int32 [BLOCK_N]; any order unless there is dropout.

    The 8 keys of a Philox call stand where one lane holds them, so that no call is made twice and no bit changes lanes.
    A lane holds columns c and c + 1 of every 8 (matrix units up to Hopper's), of every 16 where two warps share the
    rows (up to Ada's), or all columns of half a tile (Blackwell's): with 4 calls abreast a call takes every eighth pair
    of columns, with 8 every sixteenth.
    """
    c = tl.arange(0, BLOCK_N)
    if F.dropout:
        W: tl.constexpr = min(F.dropout, BLOCK_N // 8)
        return c // (8 * W) * (8 * W) + c // 2 % W * 8 + c // (2 * W) % 4 * 2 + c % 2
    else:
        return c


@triton.jit
def keep_tile(rng, bh, rows, col0, threshold, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Boolean [rows, BLOCK_N]: whether keys col0 + key_order(BLOCK_N, F) are kept.

    rng is (seed, offset), two int64 scalars; bh is sequence * query heads + query head; col0 and BLOCK_N are multiples
    of 8, threshold is 0 to 65535.
    """
    W: tl.constexpr = min(F.dropout, BLOCK_N // 8)
    seed, offset = rng
    k0, k1 = seed.to(tl.uint32), ((seed ^ offset) >> 32).to(tl.uint32)
    groups = col0 // 8 + W * tl.arange(0, BLOCK_N // 8 // W)[None, :, None] + tl.arange(0, W)[None, None, :]
    words = philox(
        offset.to(tl.uint32),
        groups.to(tl.uint32),
        rows[:, None, None].to(tl.uint32),
        bh.to(tl.uint32),
        k0,
        k1,
    )
    limit = threshold.to(tl.uint32) << 16
    bits = tl.zeros_like(words[0]).to(tl.int32)
    for w in tl.static_range(4):
        bits |= ((words[w] << 16) < limit).to(tl.int32) << (2 * w)
        bits |= (words[w] < limit).to(tl.int32) << (2 * w + 1)
    # where a lane keeps what it computes, nothing of this packing is left in the machine code
    bit = 1 << (2 * tl.arange(0, 4)[:, None] + tl.arange(0, 2)[None, :])
    kept = (bits[:, :, None, :, None] & bit[None, None, :, None, :]) != 0  # [rows, blocks, 4, W, 2]
    return tl.reshape(kept, [rows.shape[0], BLOCK_N])


@triton.jit
def dropped(p, kept, threshold):
    """p where it is kept, else 0.

    This 0 is one that the compiler does not know: were it a constant, LLVM would round p first and then choose between
    halves of registers, which takes two more instructions per element.
    """
    return tl.where(kept, p, tl.minimum(threshold, 0).to(tl.float32))
