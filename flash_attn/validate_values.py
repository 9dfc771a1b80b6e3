"""Checks that must read a tensor: order of cu_seqlens, lengths, block tables. Always on the CPU, where they
are cheap; on a GPU only with FLASH_ATTN_CHECK=1, since reading makes the host wait for the device.
"""

import torch
from torch import Tensor

from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem
from flash_attn.utils import env


def wanted(problem: Problem) -> bool:
    """Whether the values of this call's tensors are to be read."""
    return (problem.device == "cpu" or env.check_values()) and not torch.compiler.is_compiling()


def check_varlen(
    problem: Problem, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    """Every sequence lies inside its tensor and is no longer than announced."""
    B = problem.batch
    lengths_q, lengths_k = [problem.max_q] * B, [problem.max_k] * B
    if cu_seqlens_q is not None:
        lengths_q = _sequences("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    if cu_seqlens_k is not None:
        total = None if block_table is not None else k.shape[0]
        lengths_k = _sequences("cu_seqlens_k", cu_seqlens_k, total, "max_seqlen_k", max_seqlen_k)
    if seqused_q is not None:
        in_range("seqused_q", seqused_q.tolist(), 0, lengths_q, "length of the sequence")
    if seqused_k is not None:
        bound = lengths_k if block_table is None else [problem.max_k] * B
        lengths_k = in_range("seqused_k", seqused_k.tolist(), 0, bound, "length of the sequence")
    if leftpad_k is not None:
        in_range("leftpad_k", leftpad_k.tolist(), 0, lengths_k, "end of the valid keys")
    if block_table is not None:
        check_pages(block_table, lengths_k, problem.page_size, k.shape[0])


def check_cache(
    problem: Problem, k_cache: Tensor, cache_seqlens: Tensor | None, new_keys: int,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    """Every index of a KV cache call points into the cache, also behind the `new_keys` it appends."""
    B, N = problem.batch, problem.max_k
    ends = [N] * B
    if cache_seqlens is not None:
        ends = cache_ends(cache_seqlens.tolist(), new_keys, N, block_table is not None)
    if cache_leftpad is not None:
        in_range("cache_leftpad", cache_leftpad.tolist(), 0, ends, "end of the valid keys")
    if cache_batch_idx is not None:
        in_range(
            "cache_batch_idx",
            cache_batch_idx.tolist(),
            0,
            [k_cache.shape[0] - 1] * B,
            "last row of the cache",
        )
    if block_table is not None:
        check_pages(block_table, ends, problem.page_size, k_cache.shape[0])


def cache_ends(cache_seqlens: list[int], new_keys: int, capacity: int, paged: bool) -> list[int]:
    """Where the keys of each sequence end after the append."""
    for b, n in enumerate(cache_seqlens):
        if n < 0 or n + new_keys > capacity:
            where = "addressable by block_table" if paged else "of the cache"
            raise ArgumentValueError(
                f"cache_seqlens[{b}] must not be negative and, with {new_keys} new keys, not be such that it"
                f" exceeds the capacity {where}, {capacity}, got {n}"
            )
    return [n + new_keys for n in cache_seqlens]


def _sequences(
    name: str, cu_seqlens: Tensor, total: int | None, max_name: str, longest: int | None
) -> list[int]:
    """Lengths of packed sequences."""
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    if starts[0] < 0 or min(lengths, default=0) < 0:
        raise ArgumentValueError(f"{name} must not be negative and must not decrease, got {brief(starts)}")
    if total is not None and starts[-1] > total:
        raise ArgumentValueError(
            f"{name} must end within the {total} rows of the packed tensor, got {starts[-1]}"
        )
    if longest is not None and max(lengths, default=0) > longest:
        raise ArgumentValueError(
            f"{max_name} must be at least the longest sequence of {name}, {max(lengths)}, got {longest}"
        )
    return lengths


def in_range(name: str, values: list[int], low: int, high: list[int], what: str) -> list[int]:
    """values, each of which lies in [low, high[b]]."""
    for b, (value, bound) in enumerate(zip(values, high, strict=True)):
        if not low <= value <= bound:
            raise ArgumentValueError(f"{name}[{b}] must lie in [{low}, {bound}], the {what}, got {value}")
    return values


def check_pages(block_table: Tensor, lengths: list[int], page_size: int, pages: int) -> None:
    """The entries that `lengths` keys need name a page; those behind them may hold anything."""
    capacity = block_table.shape[1] * page_size
    for b, (row, length) in enumerate(zip(block_table.tolist(), lengths, strict=True)):
        if length > capacity:
            raise ArgumentValueError(
                f"block_table: sequence {b} of {length} keys exceeds the capacity addressable by block_table,"
                f" {block_table.shape[1]} pages of {page_size}"
            )
        needed = row[: -(-length // page_size)]
        if needed and not (min(needed) >= 0 and max(needed) < pages):
            raise ArgumentValueError(
                f"block_table[{b}] must name pages in [0, {pages}) for {length} keys, got {brief(needed)}"
            )


def brief(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"
