"""Host time of one call, microseconds: what Python and the launch cost when the GPU has next to nothing to do."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func


def host_time_us(call: Callable[[], object], calls: int = 300, repeats: int = 7) -> float:
    """Best mean over `repeats` runs of `calls` calls; the queue is drained before each run, not after."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best * 1e6


def rows() -> list[dict[str, Any]]:
    B, S, H, D = 1, 128, 8, 64
    q, k, v = (torch.randn(B, S, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    leaves_sdpa = [t.clone().requires_grad_() for t in heads_first]
    dout = torch.randn_like(q)
    dout_sdpa = dout.transpose(1, 2).contiguous()

    def ours_backward():
        torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, dout)

    def sdpa_backward():
        out = F.scaled_dot_product_attention(*leaves_sdpa, is_causal=True)
        torch.autograd.grad(out, leaves_sdpa, dout_sdpa)

    found = []
    shape = {"B": B, "H": H, "Hk": H, "M": S, "N": S, "D": D, "Dv": D, "dtype": "bfloat16", "causal": True,
             "left": None, "right": 0}  # fmt: skip
    with torch.no_grad():
        found.append(("host forward", "ours", host_time_us(lambda: flash_attn_func(q, k, v, causal=True))))
    found.append(("host forward+backward", "ours", host_time_us(ours_backward)))
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            with torch.no_grad():
                forward = host_time_us(lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True))
            found.append(("host forward", name, forward))
            found.append(("host forward+backward", name, host_time_us(sdpa_backward)))
    return [
        {"kind": kind, "impl": name, "backend": name, **shape, "time_us": time_us}
        for kind, name, time_us in found
    ]
