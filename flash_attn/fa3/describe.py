"""FlashAttention-3's arguments in, (Problem, Operands, Append or None) out; what is missing here is refused by name."""

from typing import Any

from torch import Tensor

from flash_attn.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flash_attn.problem import Append, Operands, Problem
from flash_attn.validate import describe, describe_varlen
from flash_attn.validate_cache import describe_kvcache

# What of FlashAttention-3 does not exist here, and what to do instead.
INSTEAD = {
    "qv": "concatenate q with qv and k with v along the head dimension (at most 512)",
    "q_descale": "cast q, k and v to bfloat16 and fold the scales into softmax_scale and out",
    "k_descale": "cast q, k and v to bfloat16 and fold the scales into softmax_scale and out",
    "v_descale": "cast q, k and v to bfloat16 and fold the scales into softmax_scale and out",
    "attention_chunk": "cut the sequences at the chunks with cu_seqlens, or use window_size",
    "cu_seqlens_k_new": "pass new keys of equal lengths, (batch_size, seqlen_new, num_heads_k, head_size)",
    "rotary_seqlens": "new keys and queries are rotated at positions from cache_seqlens on",
}


def refuse(**given: Any) -> None:
    """Raise UnsupportedError for the first argument that is neither None nor 0; its name is a key of INSTEAD."""
    for name, value in given.items():
        if value is not None and (isinstance(value, Tensor) or value):
            raise UnsupportedError(f"{name} of FlashAttention-3 is not supported here: {INSTEAD[name]}")


def described(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None, v_new: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seqused_q: Tensor | None, seqused_k: Any, max_seqlen_q: int | None,
    max_seqlen_k: int | None, page_table: Tensor | None, kv_batch_idx: Tensor | None, leftpad_k: Tensor | None,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, softmax_scale: float | None, causal: bool, window: Any,
    softcap: float, rotary_interleaved: bool = True, num_splits: int = 0, deterministic: bool = False,
    is_cache: bool = False,
) -> tuple[Problem, Operands, Append | None]:  # fmt: skip
    """The description of any forward call of FlashAttention-3: dense, packed, paged or with a cache.

    Args:
        is_cache: the caller knows k, v and seqused_k as k_cache, v_cache and cache_seqlens, and errors shall too.

    Raises:
        UnsupportedError: packed queries together with an append or a cache index.
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule; nothing has been done then.
    """
    try:
        return _described(
            q, k, v, k_new, v_new, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
            page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, softmax_scale, causal, window, softcap,
            rotary_interleaved, num_splits, deterministic, is_cache,
        )  # fmt: skip
    except (ArgumentTypeError, ArgumentValueError) as error:  # the one argument that has another name here
        raise type(error)(str(error).replace("block_table", "page_table")) from None


def _described(
    q, k, v, k_new, v_new, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
    kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, softmax_scale, causal, window, softcap, rotary_interleaved,
    num_splits, deterministic, is_cache,
) -> tuple[Problem, Operands, Append | None]:  # fmt: skip
    if page_table is not None and kv_batch_idx is not None:
        page_table, kv_batch_idx = page_table.index_select(0, kv_batch_idx), None
    packed = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q)
    cache = dict(k=k_new, v=v_new, cache_batch_idx=kv_batch_idx, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    of_cache = is_cache and cu_seqlens_q is None
    if of_cache or isinstance(seqused_k, int) or any(x is not None for x in cache.values()):
        for name, x in packed.items():
            if x is not None:
                used = [n for n, y in cache.items() if y is not None] or ["cache_seqlens as an int"]
                raise UnsupportedError(
                    f"{name} together with {', '.join(used)} is not supported: append and index with dense q first"
                )
        return describe_kvcache(
            q, k, v, k_new, v_new, rotary_cos, rotary_sin, seqused_k, kv_batch_idx, leftpad_k, page_table,
            softmax_scale, causal, window, softcap, rotary_interleaved, None, num_splits,
        )  # fmt: skip
    others = (seqused_k, page_table, leftpad_k)
    if all(x is None for x in packed.values()) and all(x is None for x in others):
        problem, ops = describe(
            q, k, v, 0.0, softmax_scale, causal, window, softcap, None, deterministic, num_splits=num_splits
        )
        return problem, ops, None
    problem, ops = describe_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window, softcap,
        None, deterministic, page_table, seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k,
        num_splits=num_splits,
    )  # fmt: skip
    return problem, ops, None
