"""Run Transformers models on this package where `attn_implementation="flash_attention_2"` cannot: on a CPU.

    from flash_attn.integrations.transformers import register
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register())

On a GPU plain `attn_implementation="flash_attention_2"` finds this package by itself; this route works there too, and
adds attention sinks. The name must not contain "flash": Transformers would look such a name up on a model hub.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn.attention import attention
from flash_attn.bert_padding import index_first_axis, pad_input
from flash_attn.errors import ArgumentValueError
from flash_attn.validate import describe, describe_varlen

NAME = "faplus"


def register(name: str = NAME) -> str:
    """Make `name` an attention implementation of Transformers (>= 4.56); returns `name`.

    Raises:
        ImportError: transformers is not installed, or too old to have these registries.
    """
    from transformers import AttentionInterface  # type: ignore[import-not-found]
    from transformers.masking_utils import (  # type: ignore[import-not-found]
        ALL_MASK_ATTENTION_FUNCTIONS,
        flash_attention_mask,
    )

    if "flash" in name:
        raise ArgumentValueError(
            f'name must not contain "flash", which Transformers keeps for hub kernels, got {name!r}'
        )
    AttentionInterface.register(name, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, flash_attention_mask)
    return name


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, is_causal: bool | None = None, s_aux: Tensor | None = None,
    position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None, max_length_k: int | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface.

    Args:
        query: (B, H, M, D); key, value: (B, Hk, N, D).
        attention_mask: bool (B, N), True for real tokens, or None; the queries are the last M tokens.
        sliding_window: keys that a query sees, itself included.
        cu_seq_lens_q, cu_seq_lens_k: sequences packed in a batch of one; or position_ids that start again at 0.
        Further arguments of Transformers that do not change the result (layer indices, output switches) are accepted.

    Returns:
        ((B, M, H, D), None)
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    options: dict[str, Any] = {
        "dropout_p": dropout, "softmax_scale": scaling, "causal": causal, "window_size": window,
        "softcap": softcap or 0.0,
    }  # fmt: skip
    sink = None if s_aux is None else s_aux.to(q.dtype)
    if cu_seq_lens_q is None and attention_mask is None and _is_packed(position_ids, q, k):
        assert position_ids is not None
        cu_seq_lens_q = cu_seq_lens_k = _starts(position_ids)
        max_length_q = max_length_k = int((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max())
    if cu_seq_lens_q is not None:
        problem, ops = describe_varlen(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            **options,
            sink=sink,
        )
        return attention(problem, ops)[0].view(*q.shape[:-1], v.shape[-1]), None
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask.bool(), options, sink), None
    problem, ops = describe(q, k, v, **options, sink=sink)
    return attention(problem, ops)[0], None


def _is_packed(position_ids: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """Whether a batch of one holds several sequences, which show by positions that start again."""
    if position_ids is None or q.shape[0] != 1 or q.shape[1] != k.shape[1] or position_ids.dim() != 2:
        return False
    return position_ids.shape == (1, q.shape[1]) and bool((position_ids[0, 1:] == 0).any())


def _starts(position_ids: Tensor) -> Tensor:
    """int32 (sequences + 1,): where each sequence begins, and the total."""
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    total = torch.tensor([position_ids.shape[1]], device=starts.device)
    return torch.cat([starts, total]).int()


def _padded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any], sink: Tensor | None
) -> Tensor:
    """Attention of a padded batch: take the padding out, attend, put it back (as zeros)."""
    B, M = q.shape[:2]
    k, v = k[:, : mask.shape[1]], v[:, : mask.shape[1]]  # a static cache is longer than the tokens so far
    q_mask = mask[:, -M:]
    parts: list[Any] = []
    cu_seqlens, longest = [], []
    for m, tensors in ((q_mask, (q,)), (mask, (k, v))):
        indices = torch.nonzero(m.flatten()).flatten()
        lengths = m.sum(1)
        cu_seqlens.append(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
        longest.append(int(lengths.max()))
        parts += [index_first_axis(t.flatten(0, 1), indices) for t in tensors]
        if m is q_mask:
            rows = indices
    lengths_of_both: tuple[Any, ...] = (*cu_seqlens, *longest)
    problem, ops = describe_varlen(*parts, *lengths_of_both, **options, sink=sink)
    return pad_input(attention(problem, ops)[0], rows, B, M)
