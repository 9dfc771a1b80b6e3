"""Between padded (batch, seqlen, ...) and packed (total, ...) tensors, as FlashAttention-2 names it. No kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # verl imports `rearrange` from here
    from einops import rearrange, repeat
except ImportError:

    def _needs_einops(*args: Any, **kwargs: Any) -> Any:
        """Stands for einops.rearrange and einops.repeat where einops is not installed."""
        raise ImportError(
            "flash_attn.bert_padding.rearrange and repeat are those of einops: pip install einops"
        )

    rearrange = repeat = _needs_einops

__all__ = [
    "F",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "torch",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]: (n, ...) and int64 (z,) -> (z, ...), differentiable in input."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(z, ...) into rows `indices` (distinct) of zeros (first_axis_dim, ...), differentiable in values.

    Transformers passes int32 indices when it decodes a padded batch; index_copy takes int64 only.
    """
    zeros = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return zeros.index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input without gradient)."""
    return index_first_axis(input, indices), input.detach()


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:  # fmt: skip
    """Pack the valid tokens of a padded batch.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integer, 1 is valid.
        unused_mask: (B, S), 1 is allocated but not used: such tokens are packed too, and left out of seqused.

    Returns:
        (packed (total, ...), indices int64 (total,) into B * S, cu_seqlens int32 (B + 1,), the longest
        sequence (reading it synchronises with a GPU), seqused int32 (B,): valid tokens of each sequence).
    """
    allocated = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    lengths = allocated.sum(-1, dtype=torch.int32)
    packed, indices, cu_seqlens, longest = _pack(hidden_states, allocated, lengths)
    return packed, indices, cu_seqlens, longest, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """Pack a padded batch each of whose rows holds several sequences, one behind the other.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: integers (B, S); row b begins with the lengths of its sequences, then zeros.

    Returns:
        (packed (total, ...), indices int64 (total,), cu_seqlens int32 (sequences + 1,), the longest sequence).
    """
    total = attention_mask_in_length.sum(-1, keepdim=True)
    valid = torch.arange(attention_mask_in_length.shape[-1], device=total.device) < total
    flat = attention_mask_in_length.flatten()
    return _pack(hidden_states, valid, flat[flat > 0].to(torch.int32))


def _pack(hidden_states: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max().item()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: (total, ...) -> (batch, seqlen, ...), zero where nothing was."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
