"""The portable forward against FlashAttention-2, cuDNN and FlexAttention of torch.

    python bench/portable_forward.py

bf16, 16k tokens, heads x head_dim = 2048; median of do_bench. A result that is wrong is not timed.
"""

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flash_attn.forward import launch
from flash_attn.problem import Problem
from flash_attn.tuning import table
from flash_attn.utils.example import operands

TOKENS, HIDDEN = 16384, 2048
SDPA = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def bench(call) -> float:
    """Milliseconds."""
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def problem(D: int, S: int, causal: bool) -> Problem:
    H = HIDDEN // D
    right = 0 if causal else None
    return Problem(TOKENS // S, H, H, S, S, D, D, torch.bfloat16, device="cuda", right=right, scale=D**-0.5)


def row(p: Problem, flex) -> dict[str, float]:
    """TFLOP/s of ours and of every peer."""
    ops, causal = operands(p), p.causal
    flop = 4 * p.batch * p.heads * p.max_q * p.max_k * p.head_dim / (2 if causal else 1)
    q, k, v = (x.transpose(1, 2) for x in ops[:3])
    found = {}
    for name, backend in SDPA.items():
        with sdpa_kernel(backend):
            want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            found[name] = (
                flop / 1e9 / bench(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
            )
    if p.head_dim == 128 and p.max_q > 1024:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, p.max_q, p.max_k) if causal else None
        found["flex"] = flop / 1e9 / bench(lambda: flex(q, k, v, block_mask=mask))
    out, _ = launch.forward(p, ops)
    error = (out.float() - want.transpose(1, 2).float()).norm() / want.float().norm()
    if not error < 1e-2:
        raise SystemExit(f"wrong result, error {error:.3g}: {p}")
    found["triton"] = flop / 1e9 / bench(lambda: launch.forward(p, ops))
    return found


def main() -> None:
    flex = torch.compile(flex_attention)
    for D in (64, 128, 256):
        for causal in (False, True):
            for S in (1024, 4096, 16384):
                p = problem(D, S, causal)
                found = row(p, flex)
                speeds = " ".join(f"{name} {x:.0f}" for name, x in found.items())
                print(D, "causal" if causal else "full", S, speeds, f"x fa2 {found['triton'] / found['fa2']:.2f}",
                      tuple(table.forward_config(p)), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
