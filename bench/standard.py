"""Standard attention against flash attention: time and memory beyond the inputs, by length.

python3 -m bench.standard --output rows.json      on a GPU: one sequence, 16 heads of 64, fp16, forward
"""

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flash_attn import flash_attn_func


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, D) by the definition; S and P go through memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """(median ms, MiB that the call needs beyond what is there)."""
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(run, warmup=20, rep=60, return_mode="median"), mib


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--output", type=Path)
    words = parser.parse_args()
    rows = []
    for length in words.seqlens:
        q, k, v = (torch.randn(1, length, 16, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        # 16-bit results of two orders of summation
        torch.testing.assert_close(flash_attn_func(q, k, v), standard(q, k, v), atol=2e-3, rtol=1e-2)
        row: dict[str, float] = {"seqlen": length}
        for name, function in (("standard", standard), ("flash", flash_attn_func)):
            row[f"{name}_ms"], row[f"{name}_mib"] = measure(partial(function, q, k, v))
        rows.append(row)
        print(" ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    if words.output:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        about = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": git or os.environ.get("COMMIT", "unknown"),
            "date": datetime.date.today().isoformat(),
            "command": "python3 -m bench.standard",
        }
        words.output.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
