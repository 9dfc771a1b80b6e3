"""The five entry points of upstream's compiled module `flash_attn_2_cuda`, in its positional order.

TransformerEngine imports them; FlashAttention-2's tests reach them as `flash_attn_interface.flash_attn_gpu`.
"""

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.errors import ArgumentValueError
from flash_attn.validate import describe, describe_varlen


def _no_generator(gen: object) -> None:
    if gen is not None:
        raise ArgumentValueError(
            "the RNG `generator` argument is no longer supported and must be None (seed with torch.manual_seed),"
            f" got {type(gen).__name__}"
        )


def _stored(result: Tensor, out: Tensor | None) -> Tensor:
    """result, in `out` where the caller gave one."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ArgumentValueError(
            f"out must have shape {tuple(result.shape)} and dtype {result.dtype},"
            f" got {tuple(out.shape)} and {out.dtype}"
        )
    return out.copy_(result)


def fwd(
    q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen,
) -> list[Tensor]:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of a dense call; written into `out` if that is not None."""
    _no_generator(gen)
    result, *rest = _legacy._flash_attn_forward(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    )  # fmt: skip
    return [_stored(result, out), *rest]


def varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen, num_splits=0,
) -> list[Tensor]:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences."""
    _no_generator(gen)
    result, *rest = _legacy._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        window_size_left, window_size_right, softcap, alibi_slopes, return_softmax, block_table, leftpad_k,
        seqused_k, zero_tensors, num_splits,
    )  # fmt: skip
    return [_stored(result, out), *rest]


def bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, is_causal,
    window_size_left, window_size_right, softcap, deterministic, gen, rng_state,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, softmax_d]; written into dq, dk and dv where those are not None."""
    _no_generator(gen)
    problem, ops = describe(
        q, k, v, p_dropout, softmax_scale, is_causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    return _gradients(problem, ops, out, softmax_lse, dout, (dq, dk, dv), rng_state)


def varlen_bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap,
    deterministic, gen, rng_state,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, softmax_d] of packed sequences; rows no sequence owns get 0, as zero_tensors asks."""
    _no_generator(gen)
    problem, ops = describe_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    return _gradients(problem, ops, out, softmax_lse, dout, (dq, dk, dv), rng_state)


def _gradients(problem, ops, out, softmax_lse, dout, into, rng_state) -> list[Tensor]:
    with torch.no_grad():
        written = _legacy.backward(problem, ops, out, softmax_lse, dout, None, into, rng_state)
        results = [given if given is not None else new for given, new in zip(into, written, strict=True)]
        return [*results, _legacy.softmax_d(problem, out, dout)]


def fwd_kvcache(
    q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table,
    alibi_slopes, out, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    is_rotary_interleaved, num_splits,
) -> list[Tensor]:  # fmt: skip
    """[out, softmax_lse] of a KV cache call; see `flash_attn_with_kvcache`."""
    from flash_attn.flash_attn_interface import flash_attn_with_kvcache

    result, lse = flash_attn_with_kvcache(
        q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k, block_table,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, is_rotary_interleaved,
        alibi_slopes, num_splits, return_softmax_lse=True,
    )  # fmt: skip
    return [_stored(result, out), lse]
