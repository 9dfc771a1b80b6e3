"""The public functions as torch.compile, export and dispatch modes see them: calls of custom operators.

Nothing here reads a tensor or checks an argument; the operators do, when they run. Shapes may be symbolic.
"""

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.attention import attention, run_append
from flash_attn.validate import describe, describe_varlen
from flash_attn.validate_cache import describe_kvcache


def tracing() -> bool:
    """Whether someone follows this call through the dispatcher instead of just running it."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@torch.library.custom_op("flash_attn::_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    rng_state: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), fresh and contiguous, of a dense (cu_seqlens None) or packed call."""
    common = (dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    if cu_seqlens_q is None:
        problem, ops = describe(q, k, v, *common, deterministic)
    else:
        problem, ops = describe_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *common, deterministic
        )  # fmt: skip
    if dlse is not None:
        dlse = dlse.masked_fill(softmax_lse == torch.inf, 0.0)  # constant there, see `surface_lse`
    return _legacy.backward(problem, ops, out, softmax_lse, dout, dlse, (None, None, None), rng_state)


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """apply(q, k, v, cu_q, cu_k, max_q, max_k, alibi, block_table, *numbers) -> (out, lse, S_dmask)."""

    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, alibi_slopes, block_table, dropout_p, scale,
        causal, left, right, softcap, deterministic, return_softmax,
    ):  # fmt: skip
        common = (dropout_p, scale, causal, left, right, softcap, alibi_slopes, return_softmax)
        if cu_seqlens_q is None:
            out, lse, s_dmask, rng_state = torch.ops.flash_attn._flash_attn_forward(q, k, v, *common)
        else:
            out, lse, s_dmask, rng_state = torch.ops.flash_attn._flash_attn_varlen_forward(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *common, block_table
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, rng_state, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
        ctx.lengths = max_q, max_k
        ctx.numbers = dropout_p, scale, causal, left, right, softcap
        ctx.deterministic = deterministic
        ctx.mark_non_differentiable(s_dmask)
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, k, v, out, lse, rng_state, cu_seqlens_q, cu_seqlens_k, alibi_slopes = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads = torch.ops.flash_attn._attention_backward(
            dout, dlse, q, k, v, out, lse, rng_state, cu_seqlens_q, cu_seqlens_k, *ctx.lengths, *ctx.numbers,
            alibi_slopes, ctx.deterministic,
        )  # fmt: skip
        return *grads, *[None] * 14


def call(
    q: Tensor, k: Tensor, v: Tensor, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0,
    block_table=None,
):  # fmt: skip
    """A dense call, or one of packed sequences when cu_seqlens_q is given; results as of the public functions."""
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse, s_dmask = _Attention.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, _int(max_seqlen_q), _int(max_seqlen_k), alibi_slopes, block_table,
        float(dropout_p), float(scale), bool(causal), _int(left), _int(right), float(softcap), bool(deterministic),
        bool(return_attn_probs and dropout_p > 0.0),
    )  # fmt: skip
    return (out, lse, s_dmask) if return_attn_probs else out


def _int(x):
    return x.item() if isinstance(x, Tensor) else x


# --- KV cache: one operator that writes the cache, one that only reads it ---------------------------------


@torch.library.custom_op("flash_attn::_flash_attn_append_kvcache", mutates_args=("k_cache", "v_cache"))
def _flash_attn_append_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, cache_seqlens: Tensor, cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None,
    block_table: Tensor | None, softmax_scale: float | None, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, rotary_interleaved: bool, alibi_slopes: Tensor | None, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, softmax_lse) after storing k and v."""
    problem, ops, new = describe_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        block_table, softmax_scale, causal, (window_size_left, window_size_right), softcap, rotary_interleaved,
        alibi_slopes, num_splits,
    )  # fmt: skip
    out, lse = attention(problem, run_append(problem, ops, new))
    return out.contiguous(), _legacy.surface_lse(problem, lse).contiguous()


@torch.library.custom_op("flash_attn::_flash_attn_read_kvcache", mutates_args=())
def _flash_attn_read_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, block_table: Tensor | None, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, softmax_lse) over a cache that stays as it is."""
    problem, ops, _ = describe_kvcache(
        q, k_cache, v_cache, None, None, None, None, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        softmax_scale, causal, (window_size_left, window_size_right), softcap, True, alibi_slopes, num_splits,
    )  # fmt: skip
    out, lse = attention(problem, ops)
    return out.contiguous(), _legacy.surface_lse(problem, lse).contiguous()


@_flash_attn_append_kvcache.register_fake
@_flash_attn_read_kvcache.register_fake
def _(q, k_cache, v_cache, *rest):
    B, M, H, _ = q.shape
    lse = q.new_empty((B, H, M), dtype=torch.promote_types(torch.float32, q.dtype))
    return q.new_empty((B, M, H, v_cache.shape[-1])), lse


def call_kvcache(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
    softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits, return_softmax_lse,
):  # fmt: skip
    """`flash_attn_with_kvcache`."""
    left, right = window_size
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    where = (cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    numbers = (softmax_scale, bool(causal), _int(left), _int(right), float(softcap))
    # no gradient, as without tracing
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    if k is None and v is None and rotary_cos is None:
        out, lse = torch.ops.flash_attn._flash_attn_read_kvcache(
            q, k_cache, v_cache, *where, *numbers, alibi_slopes, num_splits
        )  # fmt: skip
    else:
        out, lse = torch.ops.flash_attn._flash_attn_append_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *where, *numbers, bool(rotary_interleaved),
            alibi_slopes, num_splits,
        )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
