"""FlagGems' forward as a backend, with our backward: `use_backend("flaggems")` or FLASH_ATTN_BACKEND=flaggems.

It calls one function, `flag_gems.flash_attn_varlen_func`, the only attention of FlagGems 5.0.2 that can be made right,
and never `flag_gems.enable()`, which replaces some 430 operators of torch for the whole process. What that function
computes wrongly is avoided or refused here; D1 to D18 are the defects in docs/flaggems.md.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import dispatch
from flash_attn.errors import UnsupportedError
from flash_attn.problem import Gradients, Operands, Problem, sees_all_rows

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_ELEMENTS = 2**31  # its kernel computes offsets in 32 bits


def supports(problem: Problem, direction: str) -> str | None:
    if direction == "backward":
        try:
            dispatch.select_unforced(problem, direction)
        except UnsupportedError as error:
            return f"FlagGems has no backward (D13), and of ours {error}"
        return None
    return _refuses(problem) or probe(problem.device)


def _refuses(p: Problem) -> str | None:
    """Why `problem` is not for FlagGems, as far as the description tells."""
    if p.device not in DEVICES:
        return f"runs on {', '.join(DEVICES)} devices, not on {p.device}"
    if p.dtype not in DTYPES:
        return f"computes float16 and bfloat16, not {p.dtype}"
    if max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, not {(p.head_dim, p.head_dim_v)}"
    if _is_cache(p) and (p.head_dim % 8 or p.head_dim < 16 or p.head_dim != p.head_dim_v):
        return f"a cache would have to be copied to pad its head dims {(p.head_dim, p.head_dim_v)}"
    if p.dropout_p:
        return "its dropout is not scaled by 1 / (1 - p) (D7)"
    for feature in ("sink", "leftpad", "seqused_q"):
        if getattr(p, feature):
            return f"has no {feature}"
    if p.seqused_k and p.varlen_k:
        return "has seqused_k only for a cache (D11)"
    if p.num_splits > 1:
        return "does not split keys"
    if p.scale <= 0:
        return f"takes the maximum before scaling, which needs a positive softmax scale, not {p.scale}"
    return None


@cache
def probe(device: str) -> str | None:
    """Why FlagGems cannot be used on this machine, or None. Imports it, and tests it, at the first call."""
    if importlib.util.find_spec("flag_gems") is None:
        return "flag_gems is not installed (see docs/flaggems.md)"
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    # FlagGems raises RuntimeError, AssertionError, TypeError and others where it finds no device or a Triton that it
    # does not know; whatever it is, it is the reason.
    try:
        _function()
    except Exception as error:
        return f"import flag_gems fails with {type(error).__name__}: {error}"
    try:
        self_test(device)
    except Exception as error:
        return f"its self-test fails with {type(error).__name__}: {error}"
    return None


@cache
def _function() -> Callable[..., Any]:
    return importlib.import_module("flag_gems").flash_attn_varlen_func


def self_test(device: str) -> None:
    """Compare FlagGems with the oracle where its versions have been wrong.

    Raises:
        AssertionError: a wrong result, with its error and the allowed one. Whatever FlagGems raises.
    """
    from flash_attn.reference import attention, eager
    from flash_attn.utils.testing import assert_as_close_as_torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    base = Problem(1, 2, 2, 200, 200, 64, 64, torch.float16, device, scale=0.125)
    paged = base._replace(
        batch=3, heads=4, max_q=1, max_k=32, seqused_k=True, page_size=16
    )  # one query a sequence and groups of heads: its own path
    table = torch.tensor([[3, 0], [5, 1], [2, 4]], dtype=torch.int32, device=device)
    used = torch.tensor([31, 9, 16], dtype=torch.int32, device=device)
    dense = Operands(normal(1, 200, 2, 64), normal(1, 200, 2, 64), normal(1, 200, 2, 64))
    cache_ops = Operands(normal(3, 1, 4, 64), normal(6, 16, 2, 64), normal(6, 16, 2, 64))
    for name, problem, ops in (
        ("causal", base._replace(right=0), dense),
        ("window to the left", base._replace(left=16), dense),
        ("paged decode", paged, cache_ops._replace(seqused_k=used, block_table=table)),
    ):
        got, want, plain = (run(problem, ops) for run in (forward, attention.forward, eager.forward))
        for what, g, w, t in zip(("out", "lse"), got, want, plain, strict=True):
            assert_as_close_as_torch(g, w, t, name=f"{name}, {what}")


def _is_cache(p: Problem) -> bool:
    """Whether keys are addressed through a page table: pages, or the rows of a cache as one page each."""
    return p.paged or p.batch_idx or (p.seqused_k and not p.varlen_k)


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) of FlagGems' packed attention. Packed rows that no sequence owns: 0 and -inf.

    Raises:
        UnsupportedError: a tensor has 2^31 elements or more.
    """
    p = problem
    if max(x.numel() for x in ops[:3]) >= MAX_ELEMENTS:
        raise UnsupportedError(f"FlagGems computes offsets in 32 bits: tensors below {MAX_ELEMENTS} elements")
    q, k, v = ops.q, ops.k, ops.v
    keys: dict[str, Any]
    if _is_cache(p):
        k, v = _same_layout(k, v, pages=True)
        keys = {"seqused_k": _lengths(p, ops), "block_table": _table(p, ops)}
    else:
        # Head dims that are no power of two: its inner loop reads K past the head dim (D18). dot needs 16.
        dim = 1 << max(4, (max(p.head_dim, p.head_dim_v) - 1).bit_length())
        q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
        k, v = (x if p.varlen_k else x.flatten(0, 1) for x in (k, v))
        k, v = _same_layout(k, v)
        keys = {"cu_seqlens_k": ops.cu_seqlens_k if p.varlen_k else _steps(p.batch, p.max_k, q)}
    cu_seqlens_q = ops.cu_seqlens_q if p.varlen_q else _steps(p.batch, p.max_q, q)
    q = q if p.varlen_q else q.flatten(0, 1)
    causal, window, reach = _mask(p)
    out, lse = _function()(
        q, k, v,
        # 1 would take a path that needs exactly one query in every sequence
        max(p.max_q, 2) if p.varlen_q else p.max_q,
        cu_seqlens_q,
        reach,
        **keys,
        softmax_scale=p.scale,
        causal=causal,
        window_size=window,
        softcap=p.softcap,
        alibi_slopes=ops.alibi_slopes,
        return_softmax_lse=True,
        out=torch.zeros_like(q) if p.varlen_q else None,
    )  # fmt: skip
    if p.max_q == 1 and not p.varlen_q and p.group > 1 and window == (-1, -1) and not p.alibi:
        # This path returns (Hk, B, G) for (Hk, G, B) (D8).
        lse = lse.reshape(p.kv_heads, p.batch, p.group).transpose(1, 2).reshape(p.heads, p.batch)
    if not sees_all_rows(p):
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    out = out[..., : p.head_dim_v].contiguous()
    if p.varlen_q:
        assert cu_seqlens_q is not None
        owned = torch.arange(q.shape[0], device=q.device) < cu_seqlens_q[-1]
        return out, lse.where(owned, -torch.inf)  # it leaves rows behind the last sequence as they were
    return out.view(p.batch, p.max_q, p.heads, -1), lse.view(-1, p.batch, p.max_q).transpose(
        0, 1
    ).contiguous()


def _mask(p: Problem) -> tuple[bool, tuple[int, int], int]:
    """(causal, window_size, max_seqlen_k) that make FlagGems see the keys of `problem`.

    It takes one open side of a window literally or ignores it (D4, D5), and as unbounded a side that reaches
    max_seqlen_k; so the open side gets the largest number below a max_seqlen_k that exceeds every distance. Its causal
    ALiBi shifts the lse (D9); as a window it does not.
    """
    if p.left is None and p.right is None:
        return False, (-1, -1), p.max_k
    if p.causal and not p.alibi:
        return True, (-1, -1), p.max_k
    far = p.max_q + p.max_k
    return False, (far if p.left is None else p.left, far if p.right is None else p.right), far + 1


def _same_layout(k: Tensor, v: Tensor, pages: bool = False) -> tuple[Tensor, Tensor]:
    """k and v with equal strides: its kernels use those of k for both (D6), and take pages to follow each other."""
    dense_pages = not pages or k.stride(0) == k.shape[1] * k.stride(1)
    if k.stride() == v.stride() and dense_pages:
        return k, v
    return k.clone(memory_format=torch.contiguous_format), v.clone(memory_format=torch.contiguous_format)


def _steps(batch: int, rows: int, like: Tensor) -> Tensor:
    """int32 (batch + 1,): cumulative lengths of sequences of equal length."""
    return torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=like.device)


def _lengths(p: Problem, ops: Operands) -> Tensor:
    """int32 (B,): valid keys of each sequence in its cache."""
    if ops.seqused_k is not None:
        return ops.seqused_k
    if ops.cu_seqlens_k is not None:
        return ops.cu_seqlens_k.diff()
    return torch.full((p.batch,), p.max_k, dtype=torch.int32, device=ops.q.device)


def _table(p: Problem, ops: Operands) -> Tensor:
    """int32 (B, pages per sequence)."""
    if ops.block_table is not None:
        return ops.block_table
    if ops.cache_batch_idx is not None:
        return ops.cache_batch_idx[:, None]
    return torch.arange(p.batch, dtype=torch.int32, device=ops.q.device)[:, None]


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    """Ours, from FlagGems' out and lse."""
    return dispatch.select_unforced(problem, "backward").backward(problem, ops, out, lse, dout, dlse, into)
