"""Padded to packed and back."""

import importlib
import sys

import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
def test_unpad_then_pad(kind, rest):
    x = torch.randn(3, 4, *rest)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK.to(kind))
    assert torch.equal(packed, x[MASK.bool()]) and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 5, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and type(longest) is int
    assert seqused.tolist() == [3, 2, 0] and seqused.dtype == torch.int32
    mask = MASK.view(3, 4, *[1] * len(rest))
    assert torch.equal(pad_input(packed, indices, 3, 4), x * mask)


def test_unused_tokens_are_packed_and_not_counted_as_used():
    unused = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    x = torch.randn(3, 4, 2)
    packed, _, cu_seqlens, longest, seqused = unpad_input(x, MASK, unused)
    assert packed.shape == (7, 2) and cu_seqlens.tolist() == [0, 4, 7, 7]
    assert longest == 4 and seqused.tolist() == [3, 2, 0]


def test_concatenated_sequences():
    """Rows of 6 tokens: sequences of 2 and 3; of 1; of 6."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 6, 12] and cu_seqlens.dtype == torch.int32 and longest == 6
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :1], x[2]]))
    assert torch.equal(pad_input(packed, indices, 3, 6)[2], x[2])


def test_gradients():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, rows), x)
    assert torch.autograd.gradcheck(
        lambda y: index_put_first_axis(y, rows, 7), x[:3].detach().requires_grad_()
    )
    selected, residual = index_first_axis_residual(x, rows)
    assert torch.equal(selected, x[rows]) and torch.equal(residual, x) and not residual.requires_grad


def test_indices_may_be_int32():
    """Transformers' decoding of a padded batch passes them; index_copy used to refuse them."""
    x = torch.randn(3, 1, 2)
    packed = index_first_axis(x, torch.arange(3, dtype=torch.int32))
    assert torch.equal(pad_input(packed[:, 0], torch.arange(3, dtype=torch.int32), 3, 1), x)


def test_empty_batch():
    packed, _, cu_seqlens, longest, _ = unpad_input(
        torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    )
    assert packed.shape == (0, 4) and cu_seqlens.tolist() == [0, 0, 0] and longest == 0


def test_names_that_clients_import():
    for name in ("rearrange", "repeat", "F", "torch"):
        assert hasattr(bert_padding, name)


def test_rearrange_without_einops_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "einops", None)
    try:
        module = importlib.reload(bert_padding)
        with pytest.raises(ImportError, match="pip install einops"):
            module.rearrange(torch.zeros(2, 3), "a b -> b a")
    finally:
        monkeypatch.undo()
        importlib.reload(bert_padding)
