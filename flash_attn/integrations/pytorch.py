"""PyTorch's own attention on this package, through its registry of flash attention implementations (torch >= 2.11).

    import flash_attn                                            # registers "FAPLUS", changes nothing
    torch.nn.attention.activate_flash_attention_impl("FAPLUS")
    F.scaled_dot_product_attention(q, k, v, is_causal=True)      # where torch chooses flash attention, it runs here
    torch.nn.attention.restore_flash_attention_impl()

`torch.nn.attention.varlen` likewise. The operators below `scaled_dot_product_attention` and the variable-length
functions are replaced for GPU tensors, forward and backward; which calls reach them is torch's decision (16-bit
dtypes, head dimension to 256, no mask). Where torch prefers cuDNN, say `sdpa_kernel(SDPBackend.FLASH_ATTENTION)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.attention import run_forward, seeded
from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.problem import Operands, Problem
from flash_attn.validate import describe, describe_varlen

NAME = "FAPLUS"


class Handle:
    """Keeps the operators replaced until `remove`."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library: Any = torch.library.Library("aten", "IMPL", dispatch_key)
        for name, function in OPERATORS.items():
            if hasattr(torch.ops.aten, name):  # not every version has `_no_dropout_inplace`
                self._library.impl(name, function, dispatch_key)

    def remove(self) -> None:
        self._library = None  # its finalizer gives torch's kernels back


def register() -> bool:
    """Tell torch about "FAPLUS"; False where torch has no registry. Activates nothing."""
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None:
        return False
    offer(NAME, register_fn=Handle)
    return True


def _described(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, scale: float | None, left: int | None, right: int | None,
    alibi_slopes: Tensor | None = None, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Problem, Operands]:  # fmt: skip
    """q, k, v in rows first: (B, M, H, D) or packed."""
    window = (-1 if left is None else left, -1 if right is None else right)
    common = (
        dropout_p,
        scale,
        is_causal,
        window,
        0.0,
        alibi_slopes,
        torch.are_deterministic_algorithms_enabled(),
    )
    splits = num_splits or 0
    if cum_seq_q is None and cum_seq_k is None and seqused_k is None and block_table is None:
        return describe(q, k, v, *common, num_splits=splits)
    return describe_varlen(
        q,
        k,
        v,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        *common,
        block_table,
        seqused_k=seqused_k,
        num_splits=splits,
    )


def _run(problem: Problem, ops: Operands, return_debug_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logsumexp, uint64 (2,) state of the generator)."""
    if return_debug_mask:
        raise UnsupportedError("return_debug_mask has no meaning here; flash_attn_func has return_attn_probs")
    ops = seeded(problem, ops)
    out, lse = run_forward(problem, ops)
    # without dropout nobody reads it: not worth a kernel that writes zeros
    state = torch.empty(2, dtype=torch.int64, device=out.device) if ops.rng_state is None else ops.rng_state
    return out, _legacy.surface_lse(problem, lse).contiguous(), state.view(torch.uint64)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout that torch's compiler expects: that of `like`."""
    given = torch.empty_like(like)
    return x if x.stride() == given.stride() else given.copy_(x)


def _empties(q: Tensor) -> tuple[Tensor, Tensor]:
    """(unused philox offset, debug mask)."""
    return torch.empty((), dtype=torch.uint64, device=q.device), q.new_empty(0)


def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward: (out, logsumexp, rng_state, unused, debug_attn_mask)."""
    problem, ops = _described(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left,
        window_size_right, alibi_slopes, seqused_k, block_table, num_splits,
    )  # fmt: skip
    out, lse, state = _run(problem, ops, return_debug_mask)
    return _laid_out(out, query), lse, state, *_empties(query)


def forward_into(
    out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options
):  # fmt: skip
    """aten::_flash_attention_forward_no_dropout_inplace: writes out, returns logsumexp."""
    if dropout_p:
        raise ArgumentValueError(f"dropout_p must be 0 for this operator, got {dropout_p}")
    result, lse, *_ = forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, return_debug_mask, **options
    )
    out.copy_(result)
    return lse


def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None, into=None,
):  # fmt: skip
    """aten::_flash_attention_backward: (dq, dk, dv), each in the memory layout of its input, or in `into`."""
    problem, ops = _described(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left,
        window_size_right,
    )  # fmt: skip
    into = into or tuple(torch.empty_like(x) for x in (query, key, value))
    state = rng_state.view(torch.int64) if problem.dropout_p else None
    _legacy.backward(problem, ops, out, logsumexp, grad_out, None, into, state)
    return into


def sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention, heads first: (B, H, M, D); out has the memory layout of query."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    problem, ops = _described(
        q, k, v, None, None, 0, 0, dropout_p, is_causal, scale, None, None
    )  # fmt: skip
    result, lse, state = _run(problem, ops, return_debug_mask)
    out = _laid_out(result.transpose(1, 2), query)
    return out, lse, None, None, query.shape[2], key.shape[2], state, *_empties(query)


def sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward, heads first."""
    rows_first = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    backward(
        *rows_first, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
        into=tuple(x.transpose(1, 2) for x in grads),
    )  # fmt: skip
    return grads


# The operators of aten that the registry's implementations replace.
OPERATORS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_into,
    "_flash_attention_backward": backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}
