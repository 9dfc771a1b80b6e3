"""Lesson 10. A cache in pages: where the keys are is a lookup.

A server does not know how long a sequence will grow. Reserving the maximum for each wastes most of the memory; growing
a contiguous cache copies it. So the cache is one pool of pages of, say, 16 tokens, and every sequence has a list of the
pages it owns, its row of the block table:

    key j of sequence b is at  pool[block_table[b, j // page_size], j % page_size]

Attention changes in one line: the address of a key. Pages may be anywhere, in any order, and two sequences with a
common beginning may share pages. Unused slots hold whatever was there before, NaN included: a key beyond the length
must be masked, and its value must not be multiplied by 0 (0 * NaN = NaN) but not be read.
"""

import torch

from flash_attn import flash_attn_with_kvcache


class Pages:
    """A pool of pages and the lists of who owns which; fits the arguments of flash_attn_with_kvcache."""

    def __init__(self, pages: int, page_size: int, heads: int, d: int):
        self.k = torch.full((pages, page_size, heads, d), float("nan"))
        self.v = torch.full((pages, page_size, heads, d), float("nan"))
        self.page_size, self.free = page_size, list(range(pages))
        self.owned: list[list[int]] = []
        self.lengths: list[int] = []

    def add(self) -> int:
        """A new, empty sequence; returns its number."""
        self.owned.append([])
        self.lengths.append(0)
        return len(self.owned) - 1

    def append(self, b: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """One token: k and v (heads, d)."""
        if self.lengths[b] == len(self.owned[b]) * self.page_size:
            if not self.free:
                raise RuntimeError("the pool has no free page")
            self.owned[b].append(self.free.pop())
        page, slot = self.owned[b][-1], self.lengths[b] % self.page_size
        self.k[page, slot], self.v[page, slot] = k, v
        self.lengths[b] += 1

    def table(self) -> torch.Tensor:
        """int32 (sequences, most pages); unused entries are 0 and never read."""
        table = torch.zeros(len(self.owned), max(map(len, self.owned)), dtype=torch.int32)
        for b, pages in enumerate(self.owned):
            table[b, : len(pages)] = torch.tensor(pages)
        return table


def gather(pool: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
    """The first `length` keys of a sequence, in order: what the lookup means."""
    return pool[pages].flatten(0, 1)[:length]


def main() -> None:
    torch.manual_seed(0)
    cache = Pages(pages=12, page_size=4, heads=2, d=16)
    sequences = [cache.add(), cache.add()]
    for step in range(9):
        for b in sequences:
            if b == 0 or step < 5:  # two lengths: 9 and 5
                cache.append(b, torch.randn(2, 16), torch.randn(2, 16))
    print("pages of the sequences:", cache.owned, "lengths:", cache.lengths)

    q = torch.randn(2, 1, 2, 16)
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    out = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=lengths, block_table=cache.table())
    assert not out.isnan().any(), "the unused slots hold NaN and must not be touched"
    for b in sequences:
        k, v = (gather(pool, cache.owned[b], cache.lengths[b]) for pool in (cache.k, cache.v))
        s = torch.einsum("mhd,nhd->hmn", q[b], k) * 16**-0.5
        want = torch.einsum("hmn,nhd->mhd", s.softmax(-1), v)
        torch.testing.assert_close(out[b], want)
    print("attention through the block table equals attention on the gathered keys")

    try:
        for _ in range(100):
            cache.append(0, torch.zeros(2, 16), torch.zeros(2, 16))
    except RuntimeError as error:
        print("a full pool says so:", error)
    else:
        raise AssertionError("a full pool must not hand out pages")


if __name__ == "__main__":
    main()
