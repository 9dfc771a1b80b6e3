"""Decode: one query token against a KV cache, ours (contiguous and paged) beside the peers, in one run."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from flash_attn import flash_attn_with_kvcache

# (batch, query heads, key/value heads, cached tokens), bf16, D = 128
SHAPES = ((1, 32, 8, 8192), (16, 32, 8, 8192), (128, 32, 8, 4096), (1, 64, 8, 131072), (16, 32, 32, 4096))
D, PAGE = 128, 16


def paged(cache: Tensor, table: Tensor) -> Tensor:
    """`cache` (B, N, Hk, D) as pages in the order of `table`."""
    pages = torch.empty(table.numel(), PAGE, *cache.shape[2:], dtype=cache.dtype, device=cache.device)
    pages[table.flatten().long()] = cache.reshape(-1, PAGE, *cache.shape[2:])
    return pages


def calls(q: Tensor, k: Tensor, v: Tensor, fa3: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> one decode step of every implementation."""
    B, N = k.shape[:2]
    lengths = torch.full((B,), N, device="cuda", dtype=torch.int32)
    table = torch.randperm(B * N // PAGE, device="cuda").int().view(B, -1)
    k_pages, v_pages = paged(k, table), paged(v, table)

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)

    found = {
        "ours": lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True),
        f"ours, pages of {PAGE}": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=True
        ),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if fa3:
        none12 = (None,) * 12
        found["fa3"] = lambda: torch.ops._vllm_fa3_C.fwd(
            q, k, v, *none12[:8], lengths, None, None, None, None, None, None, None, None, None, None, None,
            D**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip
    return found


def read_bandwidth() -> float:
    """GB/s of a reduction over 4 GiB: what no decode kernel can beat for long."""
    buffer = torch.empty(2**30, device="cuda", dtype=torch.float32)
    return buffer.numel() * 4 / do_bench(lambda: buffer.sum(), return_mode="median") / 1e6


def rows(fa3: bool = False) -> list[dict[str, Any]]:
    """A row of bench/results for every shape and implementation, and the read bandwidth of the same run."""
    read = read_bandwidth()
    print(f"pure read (sum of 4 GiB): {read:.0f} GB/s")
    found = []
    for B, H, Hk, N in SHAPES:
        q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(B, N, Hk, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        want = None
        for name, step in calls(q, k, v, fa3).items():
            row: dict[str, Any] = {
                "kind": "decode", "impl": name, "backend": "triton" if name.startswith("ours") else name, "B": B,
                "H": H, "Hk": Hk, "M": 1, "N": N, "D": D, "Dv": D, "dtype": "bfloat16", "causal": True,
                "left": None, "right": None, "page_size": PAGE if "pages" in name else 0,
            }  # fmt: skip
            out = step()
            want = out if want is None else want
            error = float((out.float() - want.float()).norm() / want.float().norm())
            if error > 2e-2:
                found.append(row | {"note": f"wrong: differs from ours by {error:.1e}"})
                continue
            time_ms = do_bench(step, warmup=20, rep=80, return_mode="median")
            gbs = 2 * k.numel() * 2 / time_ms / 1e6
            found.append(row | {"time_us": time_ms * 1e3, "gb_per_s": gbs, "of_read": gbs / read})
    return found
