"""Arguments of `flash_attn_with_kvcache` in, (Problem, Operands, Append or None) out. See `validate.py`."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from flash_attn import validate_values
from flash_attn.errors import ArgumentTypeError, ArgumentValueError
from flash_attn.problem import Append, Operands, Problem
from flash_attn.validate import (
    NO_WINDOW,
    as_flag,
    as_window,
    build,
    check_index,
    check_paged,
    check_rows,
    check_tensors,
    contiguous,
    last_contiguous,
    meta,
    recall,
    remember,
)


def describe_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    *,
    sink: Tensor | None = None,
) -> tuple[Problem, Operands, Append | None]:
    """The description of a KV cache call, and what it appends first (None: nothing).

    The arguments are those of `flash_attn_with_kvcache`; sink is (H,). With an Append, the caller
    replaces q and seqused_k of the operands by what `kvcache.append.append` returns.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule; the cache is untouched then.
    """
    if window_size is not NO_WINDOW:
        window_size = as_window(window_size)
    lengths: Any = None if type(cache_seqlens) is int else cache_seqlens
    try:
        key: Hashable = (
            q.shape, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype,
            q.device, k_cache.device, v_cache.device, k_cache.stride(-1), v_cache.stride(-1),
            softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits, type(cache_seqlens),
            k if k is None else meta(k),
            v if v is None else meta(v),
            rotary_cos if rotary_cos is None else meta(rotary_cos),
            rotary_sin if rotary_sin is None else meta(rotary_sin),
            lengths if lengths is None else meta(lengths),
            cache_batch_idx if cache_batch_idx is None else meta(cache_batch_idx),
            cache_leftpad if cache_leftpad is None else meta(cache_leftpad),
            block_table if block_table is None else meta(block_table),
            alibi_slopes if alibi_slopes is None else meta(alibi_slopes),
            sink if sink is None else meta(sink),
        )  # fmt: skip
        problem = recall(key)
    except (AttributeError, TypeError, IndexError):  # not a tensor, or one without dimensions
        key = problem = None
    if problem is None:
        problem = _describe(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, rotary_interleaved, softmax_scale=softmax_scale, causal=causal, window=window_size,
            softcap=softcap, alibi_slopes=alibi_slopes, num_splits=num_splits, sink=sink,
        )  # fmt: skip
        remember(key, problem)
    new_keys = 0 if k is None else k.shape[1]
    if type(cache_seqlens) is int:
        capacity = _capacity(problem, k_cache, block_table)
        validate_values.cache_ends([cache_seqlens], new_keys, capacity, block_table is not None)
        lengths = torch.full((problem.batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if validate_values.wanted(problem):
        validate_values.check_cache(
            problem, k_cache, lengths, new_keys, cache_batch_idx, cache_leftpad, block_table
        )
    lengths = contiguous(lengths)
    new = None
    if k is not None:
        assert v is not None and lengths is not None  # _check_append
        cos, sin = contiguous(rotary_cos), contiguous(rotary_sin)
        new = Append(
            last_contiguous("k", k), last_contiguous("v", v), cos, sin, bool(rotary_interleaved), lengths
        )
    ops = Operands(  # by position, which costs half a microsecond less
        q if q.is_contiguous() and not q.is_neg() else last_contiguous("q", q),
        k_cache, v_cache, None, None, None, lengths,
        cache_leftpad if cache_leftpad is None else contiguous(cache_leftpad),
        block_table if block_table is None else last_contiguous("block_table", block_table),
        cache_batch_idx if cache_batch_idx is None else contiguous(cache_batch_idx),
        alibi_slopes if alibi_slopes is None else last_contiguous("alibi_slopes", alibi_slopes), sink,
    )  # fmt: skip
    return problem, ops, new


def _check_kind(cache_seqlens: Any) -> None:
    if cache_seqlens is not None and type(cache_seqlens) is not int and not isinstance(cache_seqlens, Tensor):
        raise ArgumentTypeError(
            f"cache_seqlens must be an int, an int32 tensor or None, got {type(cache_seqlens).__name__}"
        )


def _describe(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, cache_seqlens: Any, cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None,
    block_table: Tensor | None, rotary_interleaved: Any, **common,
) -> Problem:  # fmt: skip
    """Check a call that was not met before."""
    _check_kind(cache_seqlens)
    check_tensors(
        dict(q=q, k_cache=k_cache, v_cache=v_cache), k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_seqlens=None if type(cache_seqlens) is int else cache_seqlens, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table, alibi_slopes=common["alibi_slopes"], sink=common["sink"],
    )  # fmt: skip
    problem = _check_cache(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, **common
    )
    capacity = _capacity(problem, k_cache, block_table)
    _check_append(problem, q, k, v, cache_seqlens, capacity)
    _check_rotary(problem, q, k, rotary_cos, rotary_sin, rotary_interleaved, capacity)
    return problem


def _check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, block_table: Tensor | None, **common,
) -> Problem:  # fmt: skip
    """Check the cache and what indexes it; the description of the attention over it."""
    B, M = check_rows("q", q, "(batch_size, seqlen_q, num_heads, head_size)")
    page_size = 0
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ArgumentValueError(
                "cache_batch_idx: Paged KVcache does not support cache_batch_idx; permute the rows of block_table"
            )
        N, page_size = check_paged("k_cache", k_cache, "v_cache", v_cache, block_table, B, q)
    else:
        rows, N = check_rows("k_cache", k_cache, "(batch_size_cache, seqlen_cache, num_heads_k, head_size)")
        check_rows(
            "v_cache", v_cache, "(batch_size_cache, seqlen_cache, num_heads_k, head_size_v)", (rows, N)
        )
        if cache_batch_idx is None and rows < B:
            raise ArgumentValueError(f"k_cache must have at least a row per sequence, {B}, got {rows}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ArgumentValueError(
                f"{name} must have contiguous last dimension (it is used in place), got strides {x.stride()}"
            )
    for name, index in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if index is not None:
            check_index(name, index, "(batch_size,)", (B,), q)
    if isinstance(cache_seqlens, Tensor):
        check_index("cache_seqlens", cache_seqlens, "(batch_size,)", (B,), q)
    return build(
        q, k_cache, v_cache, B, M, N, names=("q", "k_cache", "v_cache"), dropout_p=0.0, deterministic=False,
        seqused_k=cache_seqlens is not None, leftpad=cache_leftpad is not None, page_size=page_size,
        batch_idx=cache_batch_idx is not None, **common,
    )  # fmt: skip


def _capacity(problem: Problem, k_cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence can have."""
    return k_cache.shape[1] if block_table is None else block_table.shape[1] * problem.page_size


def _check_append(
    problem: Problem, q: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: Any, capacity: int
) -> None:  # fmt: skip
    """The new keys and values."""
    if k is None and v is None:
        return
    if k is None or v is None:
        given, missing = ("value", "key (k)") if k is None else ("key", "value (v)")
        raise ArgumentValueError(f"k, v: If {given} is supplied, {missing} must also be passed in, got None")
    if cache_seqlens is None:
        raise ArgumentValueError(
            "cache_seqlens: If key is supplied, seqlens_k (cache_seqlens) must also be passed in, got None"
        )
    B, Hk = problem.batch, problem.kv_heads
    _, new = check_rows(
        "k", k, "(batch_size, seqlen_new, num_heads_k, head_size)", (B, None, Hk, problem.head_dim)
    )
    check_rows("v", v, "(batch_size, seqlen_new, num_heads_k, head_size_v)", (B, new, Hk, problem.head_dim_v))
    if new > capacity:
        raise ArgumentValueError(
            f"k: If key is supplied, it must have seqlen <= the seqlen of the KV cache, {capacity}, got {new}"
        )
    for name, x in (("k", k), ("v", v)):
        _like_q(name, x, q)


def _check_rotary(
    problem: Problem, q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: Any,
    capacity: int,
) -> None:  # fmt: skip
    as_flag("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ArgumentValueError("rotary_cos and rotary_sin must be given together, got one of them")
    if k is None:
        raise ArgumentValueError(
            "rotary_cos: If rotary cos/sin are provided, new key / value to be appended to KV cache must also be"
            " provided, got k None"
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        _like_q(name, x, q)
        check_rows(name, x, "(seqlen_rotary, rotary_dim / 2)")
    if cos.shape != sin.shape:
        raise ArgumentValueError(
            f"rotary_sin must have the shape of rotary_cos, {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    if not 1 <= cos.shape[1] <= problem.head_dim // 2:
        raise ArgumentValueError(
            f"rotary_cos: rotary_dim must be <= headdim, {problem.head_dim}, and even and positive,"
            f" got rotary_dim {2 * cos.shape[1]}"
        )
    if cos.shape[0] < capacity:
        raise ArgumentValueError(
            f"rotary_cos: cos/sin seqlen must be at least the seqlen of KV cache, {capacity}, got {cos.shape[0]}"
        )


def _like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise ArgumentTypeError(f"{name} must have the same dtype as query, {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ArgumentValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
