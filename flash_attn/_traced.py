"""The public functions as torch.compile, export and dispatch modes see them: calls of custom operators.

Nothing here reads a tensor or checks an argument; the operators do, when they run. Shapes may be symbolic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flash_attn import _legacy
from flash_attn.attention import attention, run_append
from flash_attn.errors import UnsupportedError
from flash_attn.validate import NEGLIGIBLE_DROPOUT, describe, describe_varlen
from flash_attn.validate_cache import describe_kvcache


def tracing(x: Any) -> bool:
    """Whether someone follows a call on tensors like `x` through the dispatcher instead of just running it.

    So does the class of a tensor that wraps others (DTensor): it has no memory of its own that a kernel could read.
    A nested tensor does not follow: it is refused as not dense.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x) and not getattr(x, "is_nested", False)


@torch.library.custom_op("flash_attn::_attention_forward", mutates_args=())
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rng_state: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, softmax_lse, S_dmask) of a dense (cu_seqlens None) or packed call, for what upstream's operators
    cannot say: their dropout draws its seed inside, which a compiler may merge with that of an equal call,
    and they do not know whether the backward is to be deterministic.
    """
    problem, ops = _describe(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    return _legacy.forward(problem, ops._replace(rng_state=rng_state), dropout_p, return_softmax)[:3]


@_attention_forward.register_fake
def _(
    q, k, v, rng_state, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    left, right, softcap, alibi_slopes, deterministic, return_softmax,
):  # fmt: skip
    if cu_seqlens_q is None:
        B, M, H, _ = q.shape
        return _legacy.fakes(q, v, (B, H, M), (B, H, M, k.shape[1]), dropout_p, return_softmax)[:3]
    total_q, H, _ = q.shape
    dmask = (cu_seqlens_q.shape[0] - 1, H, max_seqlen_q, max_seqlen_k)
    return _legacy.fakes(q, v, (H, total_q), dmask, dropout_p, return_softmax)[:3]


@torch.library.custom_op("flash_attn::_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, softmax_lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    rng_state: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), fresh and contiguous."""
    problem, ops = _describe(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    if dlse is not None:
        dlse = dlse.masked_fill(softmax_lse == torch.inf, 0.0)  # constant there, see `surface_lse`
    return _legacy.backward(problem, ops, out, softmax_lse, dout, dlse, (None, None, None), rng_state)


@_attention_backward.register_fake
def _(dout, dlse, out, softmax_lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _describe(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, left, right,
    softcap, alibi_slopes, deterministic,
):  # fmt: skip
    common = (dropout_p, softmax_scale, causal, (left, right), softcap, alibi_slopes, deterministic)
    if cu_seqlens_q is None:
        return describe(q, k, v, *common)
    return describe_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *common)


# --- derivatives: of our operator and of upstream's two, by the one backward --------------------------------


def _save(ctx, inputs, output) -> None:
    """Of `_attention_forward`; the others bring their arguments into its order first."""
    q, k, v, rng_state, cu_q, cu_k, max_q, max_k, *numbers, alibi_slopes, deterministic, _ = inputs
    out, lse = output[:2]
    ctx.save_for_backward(out, lse, q, k, v, rng_state, cu_q, cu_k, alibi_slopes)
    ctx.arguments = max_q, max_k, numbers, deterministic, len(inputs)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _save_dense(ctx, inputs, output) -> None:
    q, k, v, *numbers, alibi_slopes, return_softmax = inputs
    rng_state = output[3]
    _save(ctx, (q, k, v, rng_state, None, None, 0, 0, *numbers, alibi_slopes, False, return_softmax), output)
    ctx.count = len(inputs)


def _save_varlen(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, *rest = inputs
    numbers, alibi_slopes, return_softmax = rest[:6], rest[6], rest[7]
    lengths = (cu_q, cu_k, max_q, max_k)
    _save(ctx, (q, k, v, output[3], *lengths, *numbers, alibi_slopes, False, return_softmax), output)
    ctx.count = len(inputs)
    ctx.plain = all(x is None for x in rest[8:11])


def _backward(ctx, dout, dlse, *_):
    out, lse, q, k, v, rng_state, cu_q, cu_k, alibi_slopes = ctx.saved_tensors
    max_q, max_k, numbers, deterministic, count = ctx.arguments
    if not getattr(ctx, "plain", True):
        raise UnsupportedError(
            "attention over pages, leftpad_k or seqused_k has no backward; gather the keys instead"
        )
    if dout is None:
        dout = torch.zeros_like(out)
    grads = _attention_backward(
        dout, dlse, out, lse, q, k, v, rng_state, cu_q, cu_k, max_q, max_k, *numbers, alibi_slopes, deterministic
    )  # fmt: skip
    return *grads, *[None] * (getattr(ctx, "count", count) - 3)


_attention_forward.register_autograd(_backward, setup_context=_save)
_legacy._flash_attn_forward.register_autograd(_backward, setup_context=_save_dense)
_legacy._flash_attn_varlen_forward.register_autograd(_backward, setup_context=_save_varlen)


def call(
    q: Tensor, k: Tensor, v: Tensor, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0,
    block_table=None,
):  # fmt: skip
    """A dense call, or one of packed sequences when cu_seqlens_q is given; results as of the public functions."""
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    max_q, max_k = _int(max_seqlen_q), _int(max_seqlen_k)
    numbers = (float(dropout_p), float(scale), bool(causal), _int(left), _int(right), float(softcap))
    dropped = dropout_p > NEGLIGIBLE_DROPOUT
    return_softmax = bool(return_attn_probs and dropped)
    if (deterministic or dropped) and block_table is None:
        rng_state = torch.randint(0, 2**62, (2,), device=q.device) if dropped else None
        out, lse, s_dmask = torch.ops.flash_attn._attention_forward(
            q, k, v, rng_state, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *numbers, alibi_slopes,
            bool(deterministic), return_softmax,
        )  # fmt: skip
    elif cu_seqlens_q is None:
        out, lse, s_dmask, _ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, *numbers, alibi_slopes, return_softmax
        )
    else:
        out, lse, s_dmask, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *numbers, alibi_slopes, return_softmax, block_table
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
    assert new is not None
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
