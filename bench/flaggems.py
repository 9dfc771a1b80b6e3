"""Ours against FlagGems (docs/flaggems.md), forward, in one process: python -m bench.flaggems [--output FILE] [--warm].

FlagGems runs through its backend here, so that what it computes is what the tests check.
"""

import argparse
import random
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from flash_attn import (
    flash_attn_flaggems_backend,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    use_backend,
)
from flash_attn.utils import race

LENGTHS = (4096, 100, 2000, 1500, 3000, 700, 4000, 988)
# name: (kind of call, batch, query heads, key heads, length, head dim, page size, options)
CASES: dict[str, tuple[str, int, int, int, int, int, int, dict[str, Any]]] = {
    "causal, 1k": ("dense", 16, 16, 16, 1024, 128, 0, {"causal": True}),
    "causal, 4k": ("dense", 4, 16, 16, 4096, 128, 0, {"causal": True}),
    "causal, 16k": ("dense", 1, 16, 16, 16384, 128, 0, {"causal": True}),
    "full, 4k": ("dense", 4, 16, 16, 4096, 128, 0, {}),
    "causal, 4k, D = 64": ("dense", 4, 32, 32, 4096, 64, 0, {"causal": True}),
    "causal, 4k, D = 96": ("dense", 4, 16, 16, 4096, 96, 0, {"causal": True}),
    "causal, 4k, D = 256": ("dense", 4, 8, 8, 4096, 256, 0, {"causal": True}),
    "causal, 4k, 32 heads on 8": ("dense", 4, 32, 8, 4096, 128, 0, {"causal": True}),
    "window 512, 4k": ("dense", 4, 16, 16, 4096, 128, 0, {"causal": True, "window_size": (512, 0)}),
    "softcap, causal, 4k": ("dense", 4, 16, 16, 4096, 128, 0, {"causal": True, "softcap": 30.0}),
    "packed, 8 lengths to 4k, causal": ("packed", 8, 16, 16, 4096, 128, 0, {"causal": True}),
    "decode, 4k": ("decode", 32, 32, 8, 4096, 128, 0, {"causal": True}),
    "decode, one sequence, 32k": ("decode", 1, 32, 8, 32768, 128, 0, {"causal": True}),
    "decode, 4k, pages of 64": ("decode", 32, 32, 8, 4096, 128, 64, {"causal": True}),
}


def call(
    kind: str, B: int, H: int, Hk: int, N: int, D: int, page: int, options: dict
) -> Callable[[], Tensor]:
    """A public call on fresh random bfloat16 tensors."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    if kind == "dense":
        q, k, v = normal(B, N, H, D), normal(B, N, Hk, D), normal(B, N, Hk, D)
        return lambda: flash_attn_func(q, k, v, **options)
    if kind == "packed":
        cu = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
        q, k, v = (normal(sum(LENGTHS), h, D) for h in (H, Hk, Hk))
        return lambda: flash_attn_varlen_func(q, k, v, cu, cu, N, N, **options)
    lengths = torch.full((B,), N - 3, device="cuda", dtype=torch.int32)
    shape = (B * N // page, page) if page else (B, N)
    q, k, v = normal(B, 1, H, D), normal(*shape, Hk, D), normal(*shape, Hk, D)
    table = torch.randperm(shape[0], device="cuda").int().view(B, -1) if page else None
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table, **options)


def on_flaggems(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with use_backend("flaggems"):
            return run()

    return forced


@torch.no_grad()
def rows(warm: bool) -> list[dict[str, Any]]:
    """A row of each implementation for every case; none with `warm`, which only compiles and compares."""
    found = []
    for name, (kind, B, H, Hk, N, D, page, options) in CASES.items():
        run = call(kind, B, H, Hk, N, D, page, options)
        runs = {"ours": run, "flaggems": on_flaggems(run)}
        ours, theirs = (r().float() for r in runs.values())
        error = float((ours - theirs).norm() / ours.norm())
        assert error < 1e-2, f"{name}: they differ by {error:.1e}"
        times: dict[str, list[float]] = {impl: [] for impl in runs}
        for _ in range(0 if warm else 4):
            for impl in random.sample(list(runs), 2):
                times[impl].append(do_bench(runs[impl], warmup=40, rep=120, return_mode="median") * 1e3)
        if warm:
            continue
        medians = {impl: statistics.median(t) for impl, t in times.items()}
        us, them = medians["ours"], medians["flaggems"]
        print(f"{name:32s} {us:9.1f} {them:9.1f} us  {them / us:.2f}", flush=True)
        found += [
            {"kind": kind, "case": name, "impl": impl, "B": B, "H": H, "Hk": Hk, "M": 1 if kind == "decode" else N,
             "N": N, "D": D, "dtype": "bfloat16", "page_size": page, "options": options, "time_us": time_us}
            for impl, time_us in medians.items()
        ]  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--warm", action="store_true", help="compile and compare, measure nothing")
    parser.add_argument("--commit", help="where the tree is not a git checkout")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # FlagGems warns while it is imported
    reason = flash_attn_flaggems_backend.probe("cuda")
    if reason is not None:
        raise SystemExit(f"FlagGems cannot be used: {reason}")
    found = rows(options.warm)
    if options.output and found:
        meta = race.provenance() | ({"commit": options.commit} if options.commit else {})
        import flag_gems

        command = "python -m bench.flaggems --output FILE"
        race.save(found, options.output, meta | {"command": command, "flag_gems": flag_gems.__version__})
