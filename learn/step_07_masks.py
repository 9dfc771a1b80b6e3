"""Lesson 7. Causal masks and windows: one band, aligned to the bottom right corner.

A query may see only some keys. With M queries at the end of N keys (a prompt continued, a cache), query i is the token
at position i + N - M. It sees key j when

    i + N - M - left <= j <= i + N - M + right

causal: right = 0, left unbounded. Window of w tokens: left = w - 1, right = 0. Full: both unbounded.
The first diagonal ends in the bottom right corner of S: the last query sees the last key. (Aligned to the top left,
a single new token could see only the first key of its cache.)

    M = 2, N = 5, causal:    1 1 1 1 0
                             1 1 1 1 1

A band makes tiles of three kinds: hidden (skip: no load, no product), edge (apply the mask), inside (no mask at all).
Half of a causal matrix is hidden, so skipping is worth a factor of two; a window makes the work linear in N.
"""

import torch
from torch import Tensor


def visible(M: int, N: int, left: int | None, right: int | None) -> Tensor:
    """bool (M, N): query i sees key j."""
    distance = torch.arange(N)[None, :] - (torch.arange(M)[:, None] + N - M)
    keep = torch.ones(M, N, dtype=torch.bool)
    if left is not None:
        keep &= distance >= -left
    if right is not None:
        keep &= distance <= right
    return keep


def key_range(first: int, last: int, M: int, N: int, left: int | None, right: int | None) -> tuple[int, int]:
    """Keys [lo, hi) that at least one of the queries [first, last) sees."""
    lo = 0 if left is None else max(0, first + N - M - left)
    hi = N if right is None else min(N, last - 1 + N - M + right + 1)
    return lo, max(lo, hi)


def full_range(first: int, last: int, M: int, N: int, left: int | None, right: int | None) -> tuple[int, int]:
    """Keys [lo, hi) that every one of the queries [first, last) sees."""
    lo = 0 if left is None else max(0, last - 1 + N - M - left)
    hi = N if right is None else min(N, first + N - M + right + 1)
    return lo, max(lo, hi)


def tile_kinds(M: int, N: int, left: int | None, right: int | None, block: int) -> dict[str, int]:
    """How many tiles are hidden, on an edge, and inside, from the two ranges alone."""
    kinds = {"hidden": 0, "edge": 0, "inside": 0}
    for i in range(0, M, block):
        seen = key_range(i, min(i + block, M), M, N, left, right)
        inner = full_range(i, min(i + block, M), M, N, left, right)
        for j in range(0, N, block):
            end = min(j + block, N)
            if end <= seen[0] or j >= seen[1]:
                kinds["hidden"] += 1
            elif j >= inner[0] and end <= inner[1]:
                kinds["inside"] += 1
            else:
                kinds["edge"] += 1
    return kinds


def main() -> None:
    assert visible(2, 5, None, 0).tolist() == [[True] * 4 + [False], [True] * 5]
    for M, N in ((5, 5), (3, 8), (8, 3), (1, 6)):
        for left in (None, 0, 2):
            for right in (None, 0, 1):
                keep = visible(M, N, left, right)
                for first in range(M):
                    for last in range(first + 1, M + 1):
                        rows = keep[first:last]
                        lo, hi = key_range(first, last, M, N, left, right)
                        assert not rows[:, :lo].any() and not rows[:, hi:].any()
                        lo, hi = full_range(first, last, M, N, left, right)
                        assert rows[:, lo:hi].all()
    print("the ranges agree with the mask for every shape tried")

    for name, (left, right) in {"full": (None, None), "causal": (None, 0), "window 256": (255, 0)}.items():
        kinds = tile_kinds(2048, 2048, left, right, 64)
        print(f"{name:>10}, 2048 tokens, 64 x 64 tiles: {kinds}")
    causal, window = (tile_kinds(2048, 2048, left, 0, 64) for left in (None, 255))
    assert causal["hidden"] == 32 * 31 // 2 and causal["edge"] == 32
    assert window["inside"] + window["edge"] < causal["inside"] / 2

    # an inverted comparison masks the past and keeps the future: easy to write, and the shapes still fit
    wrong = torch.arange(4)[None, :] >= torch.arange(4)[:, None]
    assert not torch.equal(wrong, visible(4, 4, None, 0))


if __name__ == "__main__":
    main()
