"""FlashAttention-3's functions with their signatures; each is described -> attention.

What differs from `flash_attn`: dropout and ALiBi do not exist, a row that sees no key has lse -inf, and what
FlashAttention-3 has and this package lacks (qv, fp8 scales, attention_chunk, ...) raises UnsupportedError by name.
`scheduler_metadata`, `pack_gqa` and `sm_margin` steer FlashAttention-3's own kernels and change nothing here.

Common arguments:

    softmax_scale: factor of q.k; None: 1 / sqrt(head_dim).
    causal, window_size, softcap, deterministic: as in `flash_attn.flash_attn_interface`.
    num_splits: programs that share the keys of one query tile, 0 to 128; 0: chosen by shape, 1: none.

Source: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _traced
from flash_attn._legacy import maybe_contiguous, round_multiple  # noqa: F401  clients import them from here
from flash_attn._traced import tracing
from flash_attn.attention import attention, run_append
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flash_attn.fa3.describe import described, refuse
from flash_attn.fa3.operators import _flash_attn_backward, _flash_attn_forward, combine  # noqa: F401
from flash_attn.validate import describe, last_contiguous

Result = Any  # Tensor, or (Tensor, Tensor) when the lse is asked for


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
) -> Result:
    """softmax(softmax_scale * q k^T) v of dense sequences.

    Args:
        q: queries (B, M, H, D). k, v: keys (B, N, Hk, D) and values (B, N, Hk, Dv). Others: see the module.

    Returns:
        out (B, M, H, Dv); with return_attn_probs (out, softmax_lse fp32 (B, H, M)).

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule. UnsupportedError: a feature that is missing
        here, or no backend.
    """
    refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    return _attend(
        q, k, v, None, None, None, None, None, None, softmax_scale, causal, window_size, softcap, num_splits,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
) -> Result:
    """Attention of B sequences of different lengths, packed one behind the other.

    Args:
        q: (total_q, H, D), or (B, M, H, D) with cu_seqlens_q None. k, v: (total_k, Hk, D) and (total_k, Hk, Dv),
            or dense likewise.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), or None. max_seqlen_q, max_seqlen_k: at least the longest sequence.
        seqused_q, seqused_k: int32 (B,), rows of each sequence that count; out of the others is 0.

    Returns:
        out like q with Dv; with return_attn_probs (out, softmax_lse fp32 (H, total_q)).

    Raises: as `flash_attn_func`.
    """
    refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    return _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, softmax_scale, causal,
        window_size, softcap, num_splits, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor; the backward writes one gradient.

    Args:
        qkv: (B, M, 3, H, D), or (B, M, H + 2 Hk, D) with num_heads_q = H.

    Returns and raises: as `flash_attn_func`.
    """
    refuse(
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )  # fmt: skip
    if not isinstance(qkv, Tensor):
        raise ArgumentTypeError(f"qkv must be a torch.Tensor, got {type(qkv).__name__}")
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        if not tracing(qkv):
            qkv = last_contiguous("qkv", qkv)
            q, k, v = qkv.detach().unbind(2)
            problem, ops = describe(
                q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic, num_splits=1
            )
            out, lse = attention(problem, ops, qkv)
            return (out, lse) if return_attn_probs else out
        q, k, v = qkv.unbind(2)
    elif qkv.ndim == 4 and num_heads_q is not None:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        if heads_k < 1 or heads_k * 2 + num_heads_q != qkv.shape[2]:
            raise ArgumentValueError(
                f"num_heads_q must leave an even number of key and value heads of {qkv.shape[2]}, got {num_heads_q}"
            )
        q, k, v = qkv.split([num_heads_q, heads_k, heads_k], dim=2)
    else:
        raise ArgumentValueError(
            "qkv must have shape (batch_size, seqlen, 3, num_heads, head_size), or (batch_size, seqlen,"
            f" num_heads_q + 2 * num_heads_k, head_size) with num_heads_q, got {tuple(qkv.shape)}"
        )
    return _attend(
        q, k, v, None, None, None, None, None, None, softmax_scale, causal, window_size, softcap, 1, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Attention over a KV cache, after storing new keys and values in it. Forward only: no gradient.

    Args:
        q: (B, M, H, D), or packed (total_q, H, D) with cu_seqlens_q and max_seqlen_q (then nothing is appended).
        k_cache, v_cache: (B_cache, N, Hk, D) and (B_cache, N, Hk, Dv), or pages (num_blocks, page_size, Hk, D) with
            page_table; last dimension contiguous; written in place.
        page_table: int32 (B, pages per sequence), or a row per cache_batch_idx.
        Others: as in `flash_attn.flash_attn_with_kvcache`, where page_table is called block_table.

    Returns:
        out (B, M, H, Dv) or packed; with return_softmax_lse (out, softmax_lse fp32, out_accum, softmax_lse_accum),
        the last two of which are empty.

    Raises: as `flash_attn_func`.
    """
    if rotary_seqlens is cache_seqlens:
        rotary_seqlens = None  # what is done anyway
    refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
    )  # fmt: skip
    if tracing(q):
        if cu_seqlens_q is not None:
            raise UnsupportedError(
                "cu_seqlens_q with a cache cannot be traced; call it outside torch.compile or pass q dense"
            )
        if page_table is not None and cache_batch_idx is not None:
            page_table, cache_batch_idx = page_table.index_select(0, cache_batch_idx), None
        out, lse = _traced.call_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, None, num_splits, True,
        )  # fmt: skip
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    else:
        problem, ops, new = described(
            q, k_cache, v_cache, k, v, cu_seqlens_q, None, None, cache_seqlens, max_seqlen_q, None, page_table,
            cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin, softmax_scale, causal, window_size, softcap,
            rotary_interleaved, num_splits, is_cache=True,
        )  # fmt: skip
        with torch.no_grad():
            out, lse = attention(problem, ops if new is None else run_append(problem, ops, new))
    if not return_softmax_lse:
        return out
    return out, lse, *(torch.empty(0, device=out.device) for _ in range(2))


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them; see `operators.combine`.

    Args:
        out_partial: (parts, B, M, H, Dv) fp32. lse_partial: (parts, B, M, H) fp32. out, out_dtype: of the result.

    Returns:
        (out (B, M, H, Dv), softmax_lse (B, M, H)).
    """
    return combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens: Tensor,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
) -> Tensor:
    """An opaque int32 tensor for `scheduler_metadata`. The kernels here schedule by themselves: it holds nothing."""
    return torch.zeros(1, dtype=torch.int32, device=cache_seqlens.device)


def _attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, softmax_scale, causal,
    window_size, softcap, num_splits, deterministic, return_lse,
) -> Result:  # fmt: skip
    if tracing(q):
        if deterministic:
            raise UnsupportedError(
                "deterministic cannot be traced: torch.use_deterministic_algorithms(True) says it to a graph"
            )
        left, right = window_size
        out, lse, _, _ = torch.ops.flash_attn_3._flash_attn_forward(
            q, k, v, None, None, None, None, cu_seqlens_q, cu_seqlens_k, None, seqused_q, seqused_k, max_seqlen_q,
            max_seqlen_k, None, None, None, None, None, None, None, None, None, softmax_scale, bool(causal), left,
            right, 0, float(softcap), True, None, num_splits,
        )  # fmt: skip
    else:
        problem, ops, _ = described(
            q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, None,
            None, None, None, None, softmax_scale, causal, window_size, softcap, True, num_splits, deterministic,
        )  # fmt: skip
        out, lse = attention(problem, ops)
    return (out, lse) if return_lse else out
