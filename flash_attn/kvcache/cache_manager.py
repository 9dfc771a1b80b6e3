"""A paged KV cache for sequences that come, grow and go; feeds `flash_attn_with_kvcache`.

    cache = CacheManager(pages=64, page_size=16, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    ids = [cache.add() for _ in prompts]
    out = cache.attend(q, k, v, ids, causal=True)  # prompt, then one token at a time
    cache.free(ids[0])

Pages are chosen on the host; lengths and block tables reach the device with each call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import ArgumentValueError
from flash_attn.kvcache.paging import CacheFullError, PagePool


class CacheManager:
    """Pages of keys and values, and which sequence owns which.

    Args:
        pages: pages to start with.
        page_size: keys per page, at least 1.
        kv_heads, head_dim, head_dim_v: of the cache; head_dim_v defaults to head_dim.
        max_pages: up to where the cache may grow; default `pages`: it does not. Growing doubles and copies, so the
            addresses of `k_cache` and `v_cache` change: capture CUDA graphs anew after it.

    Attributes:
        k_cache, v_cache: (pages, page_size, kv_heads, head_dim or head_dim_v).
        pool: the free pages.
    """

    def __init__(
        self, pages: int, page_size: int, kv_heads: int, head_dim: int, head_dim_v: int | None = None, *,
        dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", max_pages: int | None = None,
    ):  # fmt: skip
        for name, value in dict(
            pages=pages, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim
        ).items():
            if value < 1:
                raise ArgumentValueError(f"{name} must be at least 1, got {value}")
        self.page_size, self.max_pages = page_size, max(pages, max_pages or 0)
        self.pool = PagePool(pages)
        shape = (pages, page_size, kv_heads)
        self.k_cache = torch.empty((*shape, head_dim), dtype=dtype, device=device)
        self.v_cache = torch.empty((*shape, head_dim_v or head_dim), dtype=dtype, device=device)
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    def add(self) -> int:
        """Start an empty sequence and return its id. Ids are not used again."""
        self._next += 1
        self._pages[self._next], self._lengths[self._next] = [], 0
        return self._next

    def length(self, sequence: int) -> int:
        """Keys that `sequence` has."""
        return self._lengths[self._known(sequence)]

    def reserve(self, sequences: Sequence[int], keys: int) -> None:
        """Give every sequence the pages for `keys` more keys; all of them, or none and an error.

        Raises:
            CacheFullError: not enough pages, and the cache may not grow so far.
        """
        ids = self._distinct(sequences)
        missing = [-(-(self._lengths[s] + keys) // self.page_size) - len(self._pages[s]) for s in ids]
        needed = sum(max(x, 0) for x in missing)
        if needed > self.pool.free:
            self._grow(needed)
        for s, count in zip(ids, missing, strict=True):
            if count > 0:
                self._pages[s] += self.pool.take(count)

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """int32 (len(sequences), most pages of one of them, at least 1) on the device; unused entries are 0."""
        rows = [self._pages[self._known(s)] for s in sequences]
        width = max([1, *map(len, rows)])
        return self._ints([row + [0] * (width - len(row)) for row in rows])

    def cache_seqlens(self, sequences: Sequence[int]) -> Tensor:
        """int32 (len(sequences),) on the device: keys of each."""
        return self._ints([self._lengths[self._known(s)] for s in sequences])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequence[int], **options: Any) -> Any:
        """Store k and v, (B, new keys, kv_heads, dim), behind the keys of `sequences` and let q attend to all.

        Row b belongs to sequences[b]. `options` are those of `flash_attn_with_kvcache` (rotary_cos, causal, ...).

        Raises:
            CacheFullError: nothing is stored then. And as `flash_attn_with_kvcache`.
        """
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache

        if len(sequences) != k.shape[0]:
            raise ArgumentValueError(
                f"sequences must have one id per row of k, {k.shape[0]}, got {len(sequences)}"
            )
        new = k.shape[1]
        self.reserve(sequences, new)
        out = flash_attn_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=self.cache_seqlens(sequences),
            block_table=self.block_table(sequences), **options,
        )  # fmt: skip
        for s in sequences:
            self._lengths[s] += new
        return out

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the keys of `sequence` from `length` on (rejected draft tokens) and free the pages behind them."""
        if not 0 <= length <= self.length(sequence):
            raise ArgumentValueError(f"length must be in [0, {self.length(sequence)}], got {length}")
        keep = -(-length // self.page_size)
        self.pool.give_back(self._pages[sequence][keep:])
        del self._pages[sequence][keep:]
        self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """End `sequence` and free its pages."""
        self.truncate(sequence, 0)
        del self._pages[sequence], self._lengths[sequence]

    def _grow(self, needed: int) -> None:
        """Have `needed` free pages: at least twice as many in all, so that copies stay rare."""
        have = self.pool.pages
        want = have - self.pool.free + needed
        if want > self.max_pages:
            raise CacheFullError(
                f"the KV cache is full: {needed} more pages needed, {self.pool.free} of {have} are free"
                f" and it may grow to {self.max_pages}"
            )
        pages = min(max(want, 2 * have), self.max_pages)
        for name in ("k_cache", "v_cache"):
            old = getattr(self, name)
            new = old.new_empty((pages, *old.shape[1:]))
            new[:have] = old
            setattr(self, name, new)
        self.pool.grow(pages)

    def _known(self, sequence: int) -> int:
        if sequence not in self._lengths:
            raise ArgumentValueError(f"sequences: there is no sequence {sequence}, or it was freed")
        return sequence

    def _distinct(self, sequences: Sequence[int]) -> list[int]:
        ids = [self._known(s) for s in sequences]
        if len(set(ids)) != len(ids):
            raise ArgumentValueError(f"sequences must be distinct, got {ids}")
        return ids

    def _ints(self, values: list) -> Tensor:
        ints = torch.tensor(values, dtype=torch.int32)
        # pinned memory and no wait: the copy must not hold up the host
        on_gpu = self.k_cache.device.type == "cuda"
        return ints.pin_memory().to(self.k_cache.device, non_blocking=True) if on_gpu else ints
