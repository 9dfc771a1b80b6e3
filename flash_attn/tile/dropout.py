"""The dropout mask: a function of (seed, offset, batch, head, row, column) alone, equal in every backend.

Philox-4x32 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with 7 rounds, the fewest
that pass BigCrush. One call serves the 8 keys of an aligned group: key 8 * g + c takes 16 bits of word c // 2,
the low half when c is even. It is kept iff those 16 bits are below `threshold` = round((1 - p) * 65536).
`reference/dropout.py` is the same in torch integers.
"""

import triton
import triton.language as tl


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
def keep_bits(rng, bh, rows, groups, threshold):
    """Bit c of the result says whether key 8 * group + c of the row is kept: int32, rows and groups broadcast.

    rng is (seed, offset), two int64 scalars; bh is sequence * query heads + query head; the rest is int32.
    """
    seed, offset = rng
    k0, k1 = seed.to(tl.uint32), ((seed ^ offset) >> 32).to(tl.uint32)
    words = philox(offset.to(tl.uint32), groups.to(tl.uint32), rows.to(tl.uint32), bh.to(tl.uint32), k0, k1)
    bits = 0
    for w in tl.static_range(4):
        bits |= ((words[w] & 0xFFFF).to(tl.int32) < threshold).to(tl.int32) << (2 * w)
        bits |= ((words[w] >> 16).to(tl.int32) < threshold).to(tl.int32) << (2 * w + 1)
    # A sum over one element. Triton cannot carry a layout backwards through it; without it the compiler would
    # compute Philox in the layout of the matrix product, where 4 lanes (8 when transposed) repeat the same work.
    return tl.sum(bits[None, :, :], 0)


@triton.jit
def keep_tile(rng, bh, rows, col0, threshold, BLOCK_N: tl.constexpr):
    """Boolean [rows, BLOCK_N] of the keys col0 ... col0 + BLOCK_N - 1; col0 and BLOCK_N are multiples of 8.

    One byte per 8 elements changes layout, not the words: the unpacking is one AND per element.
    """
    groups = col0 // 8 + tl.arange(0, BLOCK_N // 8)
    bits = keep_bits(rng, bh, rows[:, None], groups[None, :], threshold)  # [BLOCK_M, BLOCK_N / 8]
    bit = 1 << tl.arange(0, 8)
    return tl.reshape((bits[:, :, None] & bit[None, None, :]) != 0, [rows.shape[0], BLOCK_N])


@triton.jit
def keep_tile_t(rng, bh, rows, col0, threshold, BLOCK_N: tl.constexpr):
    """`keep_tile` transposed: boolean [BLOCK_N, rows]."""
    groups = col0 // 8 + tl.arange(0, BLOCK_N // 8)
    bits = keep_bits(rng, bh, rows[None, :], groups[:, None], threshold)  # [BLOCK_N / 8, BLOCK_M]
    bit = 1 << tl.arange(0, 8)
    return tl.reshape((bits[:, None, :] & bit[None, :, None]) != 0, [BLOCK_N, rows.shape[0]])
