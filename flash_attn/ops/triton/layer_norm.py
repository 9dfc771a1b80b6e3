"""Layer and RMS norm with residual, dropout and a second branch, under flash-attn's names; torch operators only.

These lie outside attention: torch (and torch.compile, which fuses them) does the work, autograd the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.errors import ArgumentValueError


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, zero_centered: bool
) -> Tensor:
    """Normalise the last dimension of fp32 `x`."""
    weight = weight.float() + 1.0 if zero_centered else weight.float()
    if rms:
        out = F.rms_norm(x, x.shape[-1:], weight, eps)
        return out if bias is None else out + bias.float()
    return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.float(), eps)


def _drop(x: Tensor, p: float, rowscale: Tensor | None, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Scale the rows and drop elements; (result, which were kept)."""
    if rowscale is not None:
        x = x * rowscale[..., None]
    if p == 0.0:
        return x, torch.ones_like(x, dtype=torch.bool) if want_mask else None
    kept = torch.rand(x.shape, device=x.device) >= p
    return torch.where(kept, x / (1.0 - p), 0.0), kept


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False,
    return_dropout_mask=False, out_dtype=None, out=None, residual_out=None,
):  # fmt: skip
    """norm(dropout(x * rowscale) + dropout(x1) + residual) * weight + bias, computed in fp32.

    Args:
        x, x1, residual: (..., N). x1 is a second branch to add; not together with rowscale.
        weight, bias, weight1, bias1: (N,). weight1 gives a second output of the same normalised input.
        rowscale: one factor a row, (...,).
        prenorm: also return the sum before the norm, in the dtype of `residual` (or x), or fp32 if residual_in_fp32.
        return_dropout_mask: also return which elements of x and of x1 were kept (None where there is no x1).
        out, residual_out: tensors to write the results into.

    Returns:
        out, or a tuple in the order (out, out1 if weight1, sum if prenorm, mask and mask1 if asked for).
    """
    if x1 is not None and rowscale is not None:
        raise ArgumentValueError("rowscale must be None when x1 is given, got both")
    total, mask = _drop(x.float(), dropout_p, rowscale, return_dropout_mask)
    mask1 = None
    if x1 is not None:
        branch, mask1 = _drop(x1.float(), dropout_p, None, return_dropout_mask)
        total = total + branch
    if residual is not None:
        total = total + residual.float()
    total_dtype = torch.float32 if residual_in_fp32 else (x if residual is None else residual).dtype
    results = [_norm(total, weight, bias, eps, is_rms_norm, zero_centered_weight).to(out_dtype or x.dtype)]
    if out is not None:
        results[0] = out.copy_(results[0])
    if weight1 is not None:
        second = _norm(total, weight1, bias1, eps, is_rms_norm, zero_centered_weight)
        results.append(second.to(out_dtype or x.dtype))
    if prenorm:
        total = total.to(total_dtype)
        results.append(total if residual_out is None else residual_out.copy_(total))
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, zero_centered_weight=False, return_dropout_mask=False, out_dtype=None,
    out=None, residual_out=None,
):  # fmt: skip
    """`layer_norm_fn` without the mean: x / sqrt(mean(x^2) + eps) * weight + bias."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


def layer_norm_linear_fn(
    x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6, prenorm=False,
    residual_in_fp32=False, is_rms_norm=False,
):  # fmt: skip
    """linear(norm(x + residual)), and the sum too if `prenorm`."""
    normed = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    y, rest = (normed[0], normed[1:]) if prenorm else (normed, ())
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, *rest) if prenorm else y


def _reference(
    x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, zero_centered_weight,
    dropout_mask, dropout_mask1, upcast, rms,
):  # fmt: skip
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1 = (
            None if t is None else t.float() for t in (x, weight, bias, residual, x1, weight1, bias1)
        )

    def drop(t: Tensor, mask: Tensor | None) -> Tensor:
        return F.dropout(t, dropout_p) if mask is None else t.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    if rowscale is not None:
        x = x * rowscale[..., None]
    if dropout_p > 0.0:
        x = drop(x, dropout_mask)
        x1 = None if x1 is None else drop(x1, dropout_mask1)
    for extra in (x1, residual):
        x = x if extra is None else (x + extra).to(x.dtype)
    outs = [_norm(x.float(), weight, bias, eps, rms, zero_centered_weight).to(dtype)]
    if weight1 is not None:
        outs.append(_norm(x.float(), weight1, bias1, eps, rms, zero_centered_weight).to(dtype))
    if prenorm:
        outs.append(x)
    return outs[0] if len(outs) == 1 else tuple(outs)


def layer_norm_ref(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False,
):  # fmt: skip
    """Reference of `layer_norm_fn` with the dropout masks given."""
    return _reference(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, zero_centered_weight,
        dropout_mask, dropout_mask1, upcast, False,
    )  # fmt: skip


def rms_norm_ref(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False,
):  # fmt: skip
    """Reference of `rms_norm_fn` with the dropout masks given."""
    return _reference(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, zero_centered_weight,
        dropout_mask, dropout_mask1, upcast, True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """RMS norm over the last dimension with the options of `rms_norm_fn`; dropout is active in training only."""

    def __init__(
        self, hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None
    ):
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return rms_norm_fn(
            x, self.weight, self.bias, residual=residual, eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32, zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip
