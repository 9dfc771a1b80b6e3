"""Rotary position embedding with the names of FlashAttention-2's `flash_attn.layers.rotary`.

On a GPU the work is done by `flash_attn.ops.triton.rotary`, elsewhere by torch. Both compute in fp32 (fp64 in fp64) and
round once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flash_attn.errors import ArgumentTypeError, ArgumentValueError


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """The 90 degree rotation of every pair: (x0, x1) -> (-x1, x0), in the layout of the pairs."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x0, x1 = x.chunk(2, dim=-1)
    return torch.cat((-x1, x0), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Reference in the dtype of x: x (B, S, H, D); cos and sin (S, rotary_dim / 2) or (B, S, rotary_dim / 2)."""
    rotary_dim = cos.shape[-1] * 2
    if rotary_dim > x.shape[-1]:
        raise ArgumentValueError(f"rotary_dim must be at most the head dim {x.shape[-1]}, got {rotary_dim}")
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1).unsqueeze(-2) for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(-2) for t in (cos, sin))
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, rest), dim=-1)


def check_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[int, int, int, int]:
    """(batch, longest sequence, heads, rotary_dim), or an error that names the argument."""
    dims = 4 if cu_seqlens is None else 3
    if x.dim() != dims:
        layout = "(batch, seqlen, heads, dim)" if dims == 4 else "(total, heads, dim) with cu_seqlens"
        raise ArgumentValueError(f"x must have shape {layout}, got {tuple(x.shape)}")
    if cu_seqlens is not None:
        if max_seqlen is None:
            raise ArgumentValueError("max_seqlen must be given together with cu_seqlens, got None")
        batch, seqlen = len(cu_seqlens) - 1, int(max_seqlen)
    else:
        batch, seqlen = x.shape[:2]
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ArgumentValueError(
            "cos and sin must both have shape (positions, rotary_dim / 2), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.dtype != sin.dtype:
        raise ArgumentTypeError(f"cos and sin must have the same dtype, got {cos.dtype} and {sin.dtype}")
    if {cos.device, sin.device} != {x.device}:
        raise ArgumentValueError(
            f"cos and sin must be on {x.device} like x, got {cos.device} and {sin.device}"
        )
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim > x.shape[-1]:
        raise ArgumentValueError(f"rotary_dim must be at most the head dim {x.shape[-1]}, got {rotary_dim}")
    if isinstance(seqlen_offsets, Tensor):
        if seqlen_offsets.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(f"seqlen_offsets must be int32 or int64, got {seqlen_offsets.dtype}")
        if seqlen_offsets.shape != (batch,):
            raise ArgumentValueError(
                f"seqlen_offsets must have shape ({batch},), got {tuple(seqlen_offsets.shape)}"
            )
    last = seqlen if isinstance(seqlen_offsets, Tensor) else seqlen + seqlen_offsets
    if cos.shape[0] < last:
        raise ArgumentValueError(f"cos and sin must have at least {last} positions, got {cos.shape[0]}")
    return batch, seqlen, x.shape[-2], rotary_dim


def _positions(
    x: Tensor, batch: int, seqlen: int, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Position of every row of x: (B or 1, S), or (total,) for packed rows; -1 behind the last sequence."""
    if cu_seqlens is None:
        rows = torch.arange(seqlen, device=x.device)[None, :]
        return rows + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    rows = torch.arange(x.shape[0], device=x.device)
    ends = cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, rows, right=True)
    behind = sequence >= batch
    sequence = sequence.clamp(max=batch - 1)
    offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return (rows - cu_seqlens.long()[sequence] + offset).masked_fill(behind, -1)


def rotate_at(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, conjugate: bool = False
) -> Tensor:
    """x (..., H, D) rotated in fp32 (fp64: in fp64) by the angles of `positions` (...); a position outside cos is left
    as it is."""
    half, wide = cos.shape[1], torch.promote_types(torch.float32, x.dtype)
    known = (positions >= 0) & (positions < cos.shape[0])
    row = positions.clamp(0, max(cos.shape[0] - 1, 0))
    c = torch.where(known[..., None], cos[row].to(wide), 1.0).unsqueeze(-2)
    s = torch.where(known[..., None], sin[row].to(wide), 0.0).unsqueeze(-2)
    if conjugate:
        s = -s
    turned = x[..., : 2 * half].to(wide)
    if interleaved:
        x0, x1 = turned[..., ::2], turned[..., 1::2]
        y = torch.stack((x0 * c - x1 * s, x1 * c + x0 * s), dim=-1).flatten(-2)
    else:
        x0, x1 = turned[..., :half], turned[..., half:]
        y = torch.cat((x0 * c - x1 * s, x1 * c + x0 * s), dim=-1)
    return torch.cat((y.to(x.dtype), x[..., 2 * half :]), dim=-1)


def _apply(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, interleaved: bool = False, inplace: bool = False, conjugate: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn.ops.triton.rotary.apply_rotary` where there is a GPU, the same in torch where there is none."""
    if x.device.type != "cpu":
        from flash_attn.ops.triton.rotary import apply_rotary

        return apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )
    batch, seqlen, _, _ = check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    positions = _positions(x, batch, seqlen, seqlen_offsets, cu_seqlens)
    out = rotate_at(x, cos, sin, positions, interleaved, conjugate)
    return x.copy_(out) if inplace else out


def _in_graph(
    packed: Tensor, views: Callable[[Tensor], Sequence[Tensor]], tables: Sequence[Tensor], interleaved: bool,
    inplace: bool, seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """`views(packed)` rotated, in torch operations for torch.compile: of an autograd.Function that writes into its
    input it refuses some, and traces others to wrong results (torch 2.13)."""
    out = packed.clone()
    for x, (cos, sin) in zip(views(out), _pairs(tables), strict=True):
        batch, seqlen, _, _ = check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
        positions = _positions(x, batch, seqlen, seqlen_offsets, cu_seqlens)
        x.copy_(rotate_at(x, cos.detach(), sin.detach(), positions, interleaved))
    if not inplace:
        return out
    if packed.is_leaf and packed.requires_grad:  # see `_mark_dirty`
        with torch.no_grad():
            packed.copy_(out)
        return out
    return packed.copy_(out)


def _mark_dirty(ctx, x: Tensor) -> None:
    """Tell autograd that x changed. A leaf that requires grad cannot be marked, and FA2 lets it be rotated in place."""
    if not (x.is_leaf and x.requires_grad):
        ctx.mark_dirty(x)


class _ApplyRotaryEmb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen):
        out = _apply(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)
        offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
        ctx.save_for_backward(cos, sin, cu_seqlens, offsets)
        ctx.offset = None if offsets is not None else seqlen_offsets
        ctx.interleaved, ctx.max_seqlen = interleaved, max_seqlen
        if inplace:
            _mark_dirty(ctx, x)
        return out

    @staticmethod
    def backward(ctx, dout):
        cos, sin, cu_seqlens, offsets = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        dx = _apply(
            _last_contiguous(dout),
            cos,
            sin,
            offsets,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.interleaved,
            conjugate=True,
        )
        return dx, None, None, None, None, None, None, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first rotary_dim of the head dim of x by the angles of each row's position.

    Args:
        x: (B, S, H, D), or packed (total, H, D) with `cu_seqlens`.
        cos, sin: (positions, rotary_dim / 2), at least as many positions as the last one needed.
        interleaved: pairs are (2i, 2i + 1) (GPT-J) instead of (i, i + rotary_dim / 2) (GPT-NeoX).
        inplace: write into x.
        seqlen_offsets: position of row 0: an integer, or (B,) with one per sequence.
        cu_seqlens: int32 (B + 1,); `max_seqlen` is then the longest sequence.

    Returns:
        Like x; x itself when `inplace`.

    Raises:
        ArgumentValueError, ArgumentTypeError: shapes, dtypes or devices disagree.

    Source: RoFormer, Su et al. 2021, arXiv:2104.09864.
    """
    if inplace and x.stride(-1) != 1:
        raise ArgumentValueError(
            f"x must have a contiguous last dimension to be rotated in place, got {x.stride()}"
        )
    if torch.compiler.is_compiling():
        where = (seqlen_offsets, cu_seqlens, max_seqlen)
        return _in_graph(x, lambda t: (t,), (cos, sin), interleaved, inplace, *where)
    x = _last_contiguous(x)
    return _ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


apply_rotary_emb_func = apply_rotary_emb  # the name of older releases


def _split_qkv(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of q and k in (B, S, 3, H, D), or in (B, S, Hq + 2 Hk, D) with num_heads_q."""
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ArgumentValueError(
                f"qkv must have shape (batch, seqlen, 3, heads, dim), got {tuple(qkv.shape)}"
            )
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4 or num_heads_q is None:
        raise ArgumentValueError(
            "qkv must have 5 dimensions, or 4 together with num_heads_q, "
            f"got {tuple(qkv.shape)} and num_heads_q={num_heads_q}"
        )
    rest = qkv.shape[2] - num_heads_q
    if rest < 0 or rest % 2:
        raise ArgumentValueError(f"qkv.shape[2] - num_heads_q must be even and not negative, got {rest}")
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + rest // 2]


class _Packed(torch.autograd.Function):
    """Rotate some heads of a packed tensor in place; `views` finds them, each with its own (cos, sin)."""

    @staticmethod
    def forward(ctx, packed, views, interleaved, seqlen_offsets, *tables):
        for x, (cos, sin) in zip(views(packed), _pairs(tables), strict=True):
            _apply(x, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
        ctx.save_for_backward(offsets, *tables)
        ctx.views, ctx.interleaved, ctx.offset = (
            views,
            interleaved,
            seqlen_offsets if offsets is None else None,
        )
        _mark_dirty(ctx, packed)
        return packed

    @staticmethod
    def backward(ctx, dout):
        offsets, *tables = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        grad = dout.clone(memory_format=torch.contiguous_format)
        for x, (cos, sin) in zip(ctx.views(grad), _pairs(tables), strict=True):
            _apply(x, cos, sin, offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return grad, None, None, None, *(None for _ in tables)


def _rotate_packed(packed, views, interleaved, seqlen_offsets, *tables):
    if torch.compiler.is_compiling():
        return _in_graph(packed, views, tables, interleaved, True, seqlen_offsets)
    return _Packed.apply(packed, views, interleaved, seqlen_offsets, *tables)


def _pairs(tables):
    return zip(tables[::2], tables[1::2], strict=True)


def apply_rotary_emb_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
    interleaved: bool = False, seqlen_offsets: int | Tensor = 0, num_heads_q: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate q and k of a packed qkv in place and return it.

    Args:
        qkv: (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) together with `num_heads_q`.
        cos, sin: (positions, rotary_dim / 2).
        cos_k, sin_k: other angles for k (XPos); default those of q.

    Raises:
        ArgumentValueError, ArgumentTypeError: shapes, dtypes or devices disagree.
    """
    if (cos_k is None) != (sin_k is None):
        raise ArgumentValueError("cos_k and sin_k must be given together")
    tables = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    return _rotate_packed(qkv, lambda t: _split_qkv(t, num_heads_q), interleaved, seqlen_offsets, *tables)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k of a packed kv (B, S, 2, Hk, D) in place and return it; errors as `apply_rotary_emb`."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ArgumentValueError(
            f"kv must have shape (batch, seqlen, 2, kv_heads, dim), got {tuple(kv.shape)}"
        )
    return _rotate_packed(kv, lambda t: (t[:, :, 0],), interleaved, seqlen_offsets, cos, sin)


class RotaryEmbedding(nn.Module):
    """Rotary angles for a growing number of positions, applied in place to packed projections.

    Args:
        dim: rotary dimensions of a head.
        base: wavelength base, 10000 in the paper.
        interleaved: pairs are (2i, 2i + 1) (GPT-J) instead of (i, i + dim / 2) (GPT-NeoX).
        scale_base: XPos (Sun et al. 2022, arXiv:2212.10554): positions decay with this base; None: plain rotary.
        device: of the frequencies.
    """

    def __init__(
        self, dim: int, base: float = 10000.0, interleaved: bool = False, scale_base=None, device=None
    ):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer(
            "scale", (even + 0.4 * dim) / (1.4 * dim) if scale_base is not None else None, persistent=False
        )
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device=None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> None:
        """Make the tables hold `seqlen` positions in `dtype` on `device`."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == torch.device(device if device is not None else cached.device)
            and cached.dtype == (dtype or cached.dtype)
            and not (self.training and cached.is_inference())  # autograd cannot save an inference tensor
        ):
            return
        self._seq_len_cached = seqlen
        # fp32 throughout: in bf16 positions above 256 are not even distinct. A module cast to 16 bits has
        # rounded its frequencies, so they are computed again.
        inv_freq = self.inv_freq
        inv_freq = inv_freq.to(device) if inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        t = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(t, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = (
            self.scale.to(device=device, dtype=torch.float32)
            ** ((t - seqlen // 2) / self.scale_base)[:, None]
        )
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self, qkv: Tensor, kv: Tensor | None = None, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Rotate in place.

        Args:
            qkv: (B, S, 3, H, D), (B, S, Hq + 2 Hk, D) with `num_heads_q`, or only q (B, S, H, D) when `kv` is given.
            kv: (B, S, 2, Hk, D).
            seqlen_offset: position of row 0: an integer, or (B,) with one per sequence (then give `max_seqlen`,
                the number of positions needed, or the tables stay as long as they are).

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        if cos is None or sin is None:
            raise ArgumentValueError(
                "max_seqlen must be given with a tensor seqlen_offset before the first use, got None"
            )
        style, at = self.interleaved, seqlen_offset
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, style, at, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, style, inplace=True, seqlen_offsets=at)
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, style, at)
