"""Multi-head attention modules under flash-attn's names, on our attention functions."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.layers.rotary import RotaryEmbedding


def get_alibi_slopes(nheads: int) -> list[float]:
    """One slope a head: the geometric sequence 2^(-8/n), 2^(-16/n), ...; other n interleave the next power of two's.

    Source: Press, Smith and Lewis 2021, arXiv:2108.12409.
    """

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(nheads))
    return power_of_two(below) + power_of_two(2 * below)[0::2][: nheads - below]


class _Flash(nn.Module):
    """What the self- and cross-attention modules share: the options of the call."""

    def __init__(self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic):
        super().__init__()
        self.causal, self.softmax_scale, self.window_size = causal, softmax_scale, window_size
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def _options(self, causal):
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Flash):
    """Self-attention on packed qkv, (B, S, 3, H, D), or (total, 3, H, D) with cu_seqlens int32 (B + 1,)."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None,
        deterministic=False,
    ):  # fmt: skip
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._options(causal))


class FlashCrossAttention(_Flash):
    """Attention of q (B, Sq, H, D) on packed kv (B, Sk, 2, Hk, D), or packed sequences with cu_seqlens."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1),
        deterministic=False,
    ):  # fmt: skip
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, max_seqlen_k=None
    ):
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **self._options(causal)
        )


class CrossAttention(nn.Module):
    """Plain torch attention of q (B, Sq, H, D) on kv (B, Sk, 2, Hk, D) with an optional key padding mask."""

    def __init__(self, causal=False, softmax_scale=None, attention_dropout=0.0):
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(self, q, kv, causal=None, key_padding_mask=None):
        """key_padding_mask: bool (B, Sk), True for keys that may be seen."""
        M, N = q.shape[1], kv.shape[1]
        k, v = (t.repeat_interleave(q.shape[2] // kv.shape[3], 2) for t in kv.unbind(2))
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        s = torch.einsum("bmhd,bnhd->bhmn", q, k * scale)
        if key_padding_mask is not None:
            s = s.masked_fill(~key_padding_mask[:, None, None, :], torch.finfo(s.dtype).min)
        if self.causal if causal is None else causal:
            future = torch.ones(M, N, dtype=torch.bool, device=s.device).triu(1 + N - M)
            s = s.masked_fill(future, torch.finfo(s.dtype).min)
        p = self.drop(s.float().softmax(-1).to(v.dtype))
        return torch.einsum("bhmn,bnhd->bmhd", p, v)


class SelfAttention(CrossAttention):
    """Plain torch self-attention on packed qkv (B, S, 3, H, D)."""

    def forward(self, qkv, causal=None, key_padding_mask=None):
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask)


def _update_kv_cache(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Write kv (B, S, 2, Hk, D) behind the tokens that `inference_params` has seen; returns all kv so far."""
    cache = inference_params.key_value_memory_dict
    if layer_idx not in cache:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        cache[layer_idx] = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    row, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    end = start + kv.shape[1]
    if row + kv.shape[0] > cache[layer_idx].shape[0] or end > cache[layer_idx].shape[1]:
        raise ArgumentValueError(
            f"kv must fit the cache {tuple(cache[layer_idx].shape)}, got {tuple(kv.shape)} at row {row}, token {start}"
        )
    cache[layer_idx][row : row + kv.shape[0], start:end] = kv
    return cache[layer_idx][row : row + kv.shape[0], :end]


class MHA(nn.Module):
    """Multi-head self- or cross-attention with projections, rotary embedding, ALiBi, windows and a KV cache.

    Parameters are named as flash-attn names them (Wqkv, or Wq and Wkv; out_proj), so that its checkpoints load.
    """

    def __init__(
        self, embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True,
        dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0,
        rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False,
        window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False,
        checkpointing=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        unsupported = {"dwconv": dwconv, "fused_bias_fc": fused_bias_fc}
        for name, asked in unsupported.items():
            if asked:
                raise UnsupportedError(f"MHA does not support {name}=True; leave it False")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads or num_heads % self.num_heads_kv:
            raise ArgumentValueError(
                f"num_heads must divide embed_dim and num_heads_kv must divide num_heads, "
                f"got {embed_dim}, {num_heads}, {self.num_heads_kv}"
            )
        if (use_alibi or window_size != (-1, -1)) and not use_flash_attn:
            raise ArgumentValueError("use_alibi and window_size need use_flash_attn=True")
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.use_flash_attn, self.return_residual, self.checkpointing = (
            use_flash_attn,
            return_residual,
            checkpointing,
        )
        self.rotary_emb_dim = rotary_emb_dim
        factory = {"device": device, "dtype": dtype}
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        if rotary_emb_dim > 0:
            if cross_attn:
                raise ArgumentValueError("rotary_emb_dim must be 0 with cross_attn=True")
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, base=rotary_emb_base, scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved, device=device,
            )  # fmt: skip
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        if use_flash_attn:
            make_self = partial(FlashSelfAttention, alibi_slopes=slopes, window_size=window_size)
            make_cross = partial(FlashCrossAttention, alibi_slopes=slopes, window_size=window_size)
        else:
            make_self, make_cross = SelfAttention, CrossAttention
        options = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        self.inner_attn, self.inner_cross_attn = make_self(**options), make_cross(**options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        """An empty kv cache, (batch, max_seqlen, 2, Hk, D)."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _project(self, x: Tensor, x_kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """(q (..., H, D), kv (..., 2, Hk, D))."""
        if self.cross_attn:
            q, kv = self.Wq(x), self.Wkv(x if x_kv is None else x_kv)
        else:
            qkv = self.Wqkv(x)
            # slices, not split: the rotary embedding works in place, which autograd forbids on split's views
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        return (
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)),
        )

    def _attend(self, q: Tensor, kv: Tensor, **options) -> Tensor:
        if self.checkpointing:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self.inner_cross_attn, q, kv, use_reentrant=False, **options)
        return self.inner_cross_attn(q, kv, **options)

    def _cached(self, q: Tensor, kv: Tensor, inference_params) -> Tensor:
        """Attention over the cache of `inference_params`, which it appends to."""
        if not self.use_flash_attn or inference_params.seqlen_offset == 0:
            kv = _update_kv_cache(kv, inference_params, self.layer_idx)
            return self.inner_cross_attn(q, kv)
        cache = inference_params.key_value_memory_dict[self.layer_idx]
        row = inference_params.batch_size_offset
        cache = cache[row : row + q.shape[0]]
        lengths = inference_params.lengths_per_sample
        return flash_attn_with_kvcache(
            q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths,
            softmax_scale=self.inner_cross_attn.softmax_scale, causal=self.inner_cross_attn.causal,
            window_size=self.inner_cross_attn.window_size, alibi_slopes=self.inner_cross_attn.alibi_slopes,
        )  # fmt: skip

    def forward(
        self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None,
        inference_params=None,
    ):  # fmt: skip
        """Attention of x on itself (or on x_kv with cross_attn).

        Args:
            x: (B, S, embed_dim), or (total, embed_dim) with cu_seqlens int32 (B + 1,) and max_seqlen.
            x_kv: (B, Sk, embed_dim), keys and values of cross-attention; default x.
            key_padding_mask: bool (B, Sk), True for keys that may be seen; without use_flash_attn only.
            mixer_subset: index of the query rows to compute; needs cross_attn.
            inference_params: has max_seqlen, max_batch_size, seqlen_offset, batch_size_offset,
                key_value_memory_dict and lengths_per_sample; makes the call append to its cache.

        Returns:
            like x, or (that, x) if return_residual.
        """
        if key_padding_mask is not None and self.use_flash_attn:
            raise ArgumentValueError(
                "key_padding_mask must be None with use_flash_attn=True: unpad the input instead"
            )
        if cu_seqlens is not None and not self.use_flash_attn:
            raise ArgumentValueError("cu_seqlens needs use_flash_attn=True")
        if mixer_subset is not None and not self.cross_attn:
            raise ArgumentValueError("mixer_subset needs cross_attn=True")
        if inference_params is not None and (self.cross_attn or self.layer_idx is None):
            raise ArgumentValueError("inference_params needs cross_attn=False and a layer_idx")
        queries = x if mixer_subset is None else x[:, mixer_subset]
        q, kv = self._project(queries, x if mixer_subset is not None and x_kv is None else x_kv)
        if self.rotary_emb_dim > 0:
            q, kv = self._rotate(q, kv, inference_params, max_seqlen)
        if inference_params is not None:
            context = self._cached(q, kv, inference_params)
        elif cu_seqlens is not None:
            context = self._attend(
                q,
                kv,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_k=max_seqlen,
            )
        elif self.use_flash_attn:
            context = self._attend(q, kv)
        else:
            context = self._attend(q, kv, key_padding_mask=key_padding_mask)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _rotate(self, q, kv, inference_params, max_seqlen):
        offset = 0
        longest = max_seqlen
        if inference_params is not None:
            lengths = inference_params.lengths_per_sample
            offset = inference_params.seqlen_offset if lengths is None else lengths
            longest = inference_params.max_seqlen
        if q.dim() != 4:
            raise UnsupportedError(
                "rotary_emb_dim > 0 with cu_seqlens is not supported; rotate before packing"
            )
        return self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=longest)


class ParallelMHA(nn.Module):
    """Tensor-parallel attention is not part of this package."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        raise UnsupportedError("ParallelMHA is not supported; use MHA with torch.distributed.tensor.parallel")
