"""Lesson 4. Tiling: which numbers are where, and how often each is moved.

Four words about GPUs. A GPU is a hundred or so small processors side by side, its multiprocessors. A kernel is a
function that runs on all of them at once. A program (CUDA: a block of threads) is one run of that function, for its
part of the output, on one multiprocessor; a launch starts thousands, which know each other by number only. Main memory
(HBM) is large and far; each multiprocessor has a little fast memory of its own (shared memory: 163 KiB a program on an
A100, 227 KiB on an H100, plus 256 KiB of registers). A product of matrices is fast when each element that was fetched
is used many times before it is dropped.

Attention is cut into tiles. One program owns BLOCK_M queries and walks over all keys, BLOCK_N at a time:

    for each tile of queries:           (in parallel, one program each)
        fetch Q tile                    once
        for each tile of keys:
            fetch K tile, V tile        once for every tile of queries
            S tile = Q tile K tile^T    never leaves the chip
            online softmax, O tile      stays on the chip
        write O tile                    once

Traffic: Q and O once, K and V once for each of the M / BLOCK_M query tiles. Standard attention moves S and P as well:
written, read, written, read. Larger BLOCK_M means less traffic, until the tiles no longer fit.
"""

import torch


def standard_traffic(m: int, n: int, d: int, element: int = 2) -> int:
    """Bytes to and from HBM, one head: Q, K, V, O, and S and P written and read once each, all in 16 bit."""
    return element * (2 * m * d + 2 * n * d + 4 * m * n)


def tiled_traffic(m: int, n: int, d: int, block_m: int, element: int = 2) -> int:
    """Bytes to and from HBM, one head, with `block_m` queries a program and no cache in between."""
    tiles = -(-m // block_m)
    return element * (2 * m * d + tiles * 2 * n * d)


def tile_bytes(block_m: int, block_n: int, d: int, element: int = 2) -> int:
    """Fast memory that one program holds: Q, K and V tiles in 16 bit, S and O tiles, m and l in fp32."""
    return element * (block_m + 2 * block_n) * d + 4 * (block_m * block_n + block_m * d + 2 * block_m)


class CountingMemory:
    """A tensor whose reads are counted, to check the formula by walking the loops."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.elements = tensor, 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        tile = self.tensor[start:stop]
        self.elements += tile.numel()
        return tile


def walk(m: int, n: int, d: int, block_m: int, block_n: int) -> int:
    """Elements moved by the loops of the docstring, counted."""
    q, k, v = (CountingMemory(torch.zeros(length, d)) for length in (m, n, n))
    written = 0
    for i in range(0, m, block_m):
        q_tile = q.read(i, i + block_m)
        for j in range(0, n, block_n):
            k.read(j, j + block_n)
            v.read(j, j + block_n)
        written += q_tile.numel()
    return q.elements + k.elements + v.elements + written


def main() -> None:
    for m, n, block_m in ((256, 256, 64), (100, 300, 64), (128, 64, 128)):
        assert 2 * walk(m, n, 64, block_m, 32) == tiled_traffic(m, n, 64, block_m)
    n, d = 8192, 64
    standard = standard_traffic(n, n, d)
    print(f"one head, {n} tokens, D = {d}: standard attention moves {standard / 2**20:.0f} MiB")
    for block_m in (16, 64, 128, 256):
        tiled = tiled_traffic(n, n, d, block_m)
        fast, moved = tile_bytes(block_m, 64, d) / 1024, tiled / 2**20
        ratio = standard / tiled
        print(
            f"  BLOCK_M {block_m:>3}: {moved:>6.0f} MiB, standard / tiled {ratio:.1f}, {fast:>4.0f} KiB of fast memory"
        )
    assert tiled_traffic(n, n, d, 128) < standard / 3
    assert tile_bytes(128, 128, 64) < 163 * 1024 < tile_bytes(256, 256, 128), (
        "what an A100 can hold, and cannot"
    )


if __name__ == "__main__":
    main()
