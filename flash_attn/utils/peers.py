"""Other people's attention behind one signature, to measure ourselves against in the same run."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.problem import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """One implementation; `make(problem)` gives (q, k, v) -> out on (B, S, H, D), or raises CannotRun."""

    name: str
    make: Callable[[Problem], Attention]


class CannotRun(Exception):
    """This peer does not do this problem."""


def _sdpa(backend: str | None) -> Callable[[Problem], Attention]:
    def make(p: Problem) -> Attention:
        if p.left is not None or p.softcap or p.alibi or p.dropout_p or (p.right is not None and p.right > 0):
            raise CannotRun("scaled_dot_product_attention has no such argument")
        if p.causal and p.max_q != p.max_k:
            raise CannotRun("its causal mask is aligned to the top left corner")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            context: contextlib.AbstractContextManager = contextlib.nullcontext()
            if backend:
                from torch.nn.attention import SDPBackend, sdpa_kernel

                context = sdpa_kernel(getattr(SDPBackend, backend))
            with context:
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                    is_causal=p.causal, scale=p.scale, enable_gqa=p.group > 1,
                )  # fmt: skip
            return out.transpose(1, 2)

        return run

    return make


def _flash_attn_4(p: Problem) -> Attention:
    try:
        from flash_attn.cute import flash_attn_func as fa4  # type: ignore[import-not-found]
    except ImportError as error:
        raise CannotRun(f"flash-attn-4 is not installed: {error}") from error
    if p.alibi or p.dropout_p:
        raise CannotRun("FlashAttention-4 has no ALiBi argument and no dropout")
    window = (p.left, p.right) if p.left is not None else (None, None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fa4(q, k, v, softmax_scale=p.scale, causal=p.causal, window_size=window, softcap=p.softcap)
        return out[0] if isinstance(out, tuple) else out

    return run


def _flex(p: Problem) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if p.softcap or p.alibi or p.dropout_p or p.left is not None or not (p.causal or p.right is None):
        raise CannotRun("only full and causal are measured")
    flex = torch.compile(flex_attention, dynamic=False)
    mask = None
    if p.causal:
        offset = p.max_k - p.max_q
        mask = create_block_mask(
            lambda b, h, i, j: i + offset >= j, None, None, p.max_q, p.max_k, device=p.device
        )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=p.scale,
            enable_gqa=p.group > 1,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a tuple only where the lse is asked for
        return out.transpose(1, 2)

    return run


def _ours(p: Problem) -> Attention:
    from flash_attn import flash_attn_func

    if p.alibi:
        raise CannotRun("ALiBi slopes are not part of this benchmark")
    left, right = (-1 if w is None else w for w in (p.left, p.right))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(
            q, k, v, p.dropout_p, p.scale, False, (left, right), p.softcap, deterministic=p.deterministic
        )

    return run


OURS = Peer("ours", _ours)
CPU_PEERS = (Peer("torch-sdpa", _sdpa(None)),)
GPU_PEERS = (
    Peer("fa2", _sdpa("FLASH_ATTENTION")),
    Peer("cudnn", _sdpa("CUDNN_ATTENTION")),
    Peer("fa4", _flash_attn_4),
)
FLEX = Peer("flex", _flex)  # slow to compile: only where asked for
