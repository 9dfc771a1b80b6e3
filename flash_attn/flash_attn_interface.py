"""The public functions, with the signatures of FlashAttention-2.8; each is describe -> attention.

Common arguments:

    dropout_p: probability in [0, 1) that a softmax weight is dropped; the rest is scaled by 1 / (1 - p).
    softmax_scale: factor of q.k; None: 1 / sqrt(head_dim).
    causal: query i of M sees keys j <= i + N - M of N (aligned to the bottom right corner).
    window_size: (left, right) keys seen on each side of that diagonal; -1: all.
    softcap: scores become softcap * tanh(score / softcap); 0: off.
    alibi_slopes: fp32 (H,) or (B, H); adds -slope * |i + N - M - j| to the score.
    deterministic: make dq bitwise reproducible (dk and dv always are); so does torch.use_deterministic_algorithms.
    return_attn_probs: also return the lse and, for tests of dropout, the signed probabilities.

Common rules: float16 or bfloat16, and float32; float64 on the CPU. q, k and v have the same dtype and
device; Hk divides H, and query head h uses key head h // (H // Hk). Head dimensions 1 to 512; that of
v may differ. Strides are free; a strided last dimension is copied. A query that sees no key gives 0,
and lse +inf. Every error is a `flash_attn.errors.FlashAttnError`, see docs/errors.md.

Source: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _raw as flash_attn_gpu  # noqa: F401  upstream's name for its compiled module
from flash_attn import _traced
from flash_attn._applied import applied
from flash_attn._legacy import (  # noqa: F401  private names that other projects import from here
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
    round_multiple,
    surface_lse,
)
from flash_attn._traced import tracing
from flash_attn.attention import attention, seeded
from flash_attn.errors import ArgumentTypeError, ArgumentValueError
from flash_attn.problem import Operands, Problem
from flash_attn.validate import describe, describe_varlen, last_contiguous
from flash_attn.validate_cache import describe_kvcache

USE_TRITON_ROCM = False  # upstream's tests ask whether its AMD backend is in use

Result = Any  # Tensor, or (Tensor, Tensor, Tensor) when asked: a union would make every caller narrow it


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """softmax(softmax_scale * q k^T + bias) v, without ever storing the score matrix.

    Args:
        q: queries (B, M, H, D).
        k, v: keys (B, N, Hk, D) and values (B, N, Hk, Dv).
        Others: see the module.

    Returns:
        out (B, M, H, Dv); with return_attn_probs (out, softmax_lse fp32 (B, H, M), S_dmask), where
        S_dmask (B, H, M, N) holds exp(score - row maximum), negative where dropped, or is empty without dropout.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule. UnsupportedError: no backend.

    Example:
        >>> q, k, v = torch.randn(3, 2, 64, 8, 32).unbind(0)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 64, 8, 32])
    """
    return _dense(
        None, return_attn_probs, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor; the backward writes one gradient for both.

    Args:
        q: (B, M, H, D). kv: (B, N, 2, Hk, D).

    Returns and raises: as `flash_attn_func`.
    """
    kv, k, v = _unpack("kv", kv, "(batch_size, seqlen_k, 2, num_heads_k, head_size)")
    return _dense(
        kv, return_attn_probs, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor; the backward writes one gradient for all.

    Args:
        qkv: (B, M, 3, H, D).

    Returns and raises: as `flash_attn_func`.
    """
    qkv, q, k, v = _unpack("qkv", qkv, "(batch_size, seqlen, 3, num_heads, head_size)")
    return _dense(
        qkv, return_attn_probs, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
) -> Result:
    """Attention of B sequences of different lengths, packed one behind the other.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, Hk, D) and (total_k, Hk, Dv), or pages (num_blocks, page_size, Hk, D) with block_table.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,); sequence b has rows [cu[b], cu[b + 1]); may be empty.
        max_seqlen_q, max_seqlen_k: int or 0-d tensor, at least the longest sequence.
        block_table: int32 (B, pages per sequence), forward only; cu_seqlens_k then gives the lengths.

    Returns:
        out (total_q, H, Dv); with return_attn_probs (out, softmax_lse fp32 (H, total_q), S_dmask
        (B, H, max_seqlen_q, max_seqlen_k) or empty). Rows behind cu_seqlens_q[-1] are 0.

    Raises: as `flash_attn_func`. The order and range of cu_seqlens and block_table are checked on the
        CPU, and on a GPU with FLASH_ATTN_CHECK=1.
    """
    return _varlen(
        None, return_attn_probs,
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, block_table,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor.

    Args:
        q: (total_q, H, D). kv: (total_k, 2, Hk, D). Others, returns and raises: as `flash_attn_varlen_func`.
    """
    kv, k, v = _unpack("kv", kv, "(total_k, 2, num_heads_k, head_size)")
    return _varlen(
        kv, return_attn_probs,
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor.

    Args:
        qkv: (total, 3, H, D). Others, returns and raises: as `flash_attn_varlen_func`.
    """
    qkv, q, k, v = _unpack("qkv", qkv, "(total, 3, num_heads, head_size)")
    return _varlen(
        qkv, return_attn_probs,
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention over a KV cache, after storing new keys and values in it. Forward only: no gradient.

    Args:
        q: (B, M, H, D).
        k_cache, v_cache: (B_cache, N, Hk, D) and (B_cache, N, Hk, Dv), or pages
            (num_blocks, page_size, Hk, D) with block_table; last dimension contiguous; written in place.
        k, v: (B, M_new, Hk, D), stored at rows [cache_seqlens, cache_seqlens + M_new), then attended to.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), like q; rotate the first rotary_dim
            dimensions of new k at positions cache_seqlens + i, and of q at cache_seqlens + i (causal or
            windowed) or all at cache_seqlens.
        cache_seqlens: int or int32 (B,), keys in the cache before the call; None: the whole cache.
        cache_batch_idx: int32 (B,), row of the cache that each sequence uses; not with block_table.
        cache_leftpad: int32 (B,), first valid row of each sequence.
        block_table: int32 (B, pages per sequence); any page size.
        rotary_interleaved: True rotates dimensions (2i, 2i + 1), False (i, i + rotary_dim / 2).
        num_splits: programs that share the keys of one query tile, 0 to 128; 0: chosen by shape, 1: none.

    Returns:
        out (B, M, H, Dv), or (out, softmax_lse fp32 (B, H, M)).

    Raises: as `flash_attn_func`. Values of cache_seqlens and indices are checked on the CPU, and on a
        GPU with FLASH_ATTN_CHECK=1.
    """
    if tracing(q):
        return _traced.call_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
            return_softmax_lse,
        )  # fmt: skip
    problem, ops, new = describe_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
    )  # fmt: skip
    with torch.no_grad():
        out, lse = attention(problem, ops, new=new)
    return (out, surface_lse(problem, lse)) if return_softmax_lse else out


def _dense(packed: Tensor | None, return_attn_probs: bool, q, k, v, *common) -> Result:
    """A dense call; `common` are the arguments of `describe` from dropout_p to deterministic."""
    if tracing(q):
        return _traced.call(q, k, v, *common, return_attn_probs)  # type: ignore[call-arg]
    problem, ops = describe(q, k, v, *common)
    return _run(problem, ops, return_attn_probs, packed)


def _varlen(
    packed: Tensor | None, return_attn_probs: bool, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, *common,
) -> Result:  # fmt: skip
    """A call of packed sequences; `common` are those of `describe_varlen` from dropout_p on."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if tracing(q):
        return _traced.call(q, k, v, *common[:7], return_attn_probs, *lengths, *common[7:])  # type: ignore[call-arg]
    problem, ops = describe_varlen(q, k, v, *lengths, *common)
    return _run(problem, ops, return_attn_probs, packed)


def _run(problem: Problem, ops: Operands, return_attn_probs: bool, packed: Tensor | None = None) -> Result:
    if not return_attn_probs:
        return attention(problem, ops, packed)[0]
    ops = seeded(problem, ops)
    out, lse = attention(problem, ops, packed)
    if problem.dropout_p:
        from flash_attn.reference.dmask import signed_probabilities

        s_dmask = signed_probabilities(problem, ops)
    else:
        s_dmask = torch.empty(0, dtype=out.dtype, device=out.device)
    return out, surface_lse(problem, lse), s_dmask


def _unpack(name: str, packed: Any, form: str) -> tuple[Tensor, ...]:
    """`packed` with a contiguous last dimension, and its parts as views (without autograd history: `_run` gets
    the whole)."""
    if not isinstance(packed, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(packed).__name__}")
    if packed.ndim != form.count(",") + 1 or packed.shape[-3] != len(name):
        raise ArgumentValueError(f"{name} must have shape {form}, got {tuple(packed.shape)}")
    if tracing(packed):
        return packed, *packed.unbind(-3)
    packed = last_contiguous(name, packed)
    return packed, *packed.detach().unbind(-3)


FlashAttnFunc = applied("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = applied("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = applied("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = applied("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = applied("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = applied("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)
