"""Times every step against FlashAttention-2 (inside PyTorch) on one GPU; prints a table and writes JSON.

python -m learn.cuda.measure --output ladder.json
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from learn.cuda import ladder

TOKENS, WIDTH = 16384, 2048  # batch * seqlen and heads * head_dim of every row
DEVICE = "cuda"
PEAK_TFLOPS = 989.4  # dense fp16 of an H200, datasheet


def fa2(q, k, v, causal=False, backend=SDPBackend.FLASH_ATTENTION):
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)


def fa2_backward(q, k, v, dout):
    """A call that runs the backward alone, as often as wanted."""
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout.transpose(1, 2), retain_graph=True)


def elapsed(run, least_s: float) -> float:
    """Mean seconds of one call, over at least `least_s` seconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(count: int) -> float:
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    first = once(1)
    count = int(least_s / first)
    return once(count) / count if count > 1 else first


def race(runs: dict, rounds: int, least_s: float) -> dict[str, float]:
    """Median seconds of each, all in turn in every round: the clock falls under load, and so it falls for all."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(elapsed(run, least_s))
    return {name: statistics.median(values) for name, values in times.items()}


def row_of(name: str, time_s: float, peer: str, peer_s: float, d: int, s: int, case: dict) -> dict:
    """One row; `of_peer` is the speed relative to the peer in the same race."""
    share = (0.5 if case["causal"] else 1) * (2.5 if case["direction"] == "backward" else 1)
    tflops = 4 * TOKENS * s * WIDTH * share / time_s / 1e12
    row = {"step": name, "head_dim": d, "seqlen": s, **case, "time_s": time_s, "tflops": tflops}
    return row | {"of_peak": tflops / PEAK_TFLOPS, "peer": peer, "of_peer": peer_s / time_s}


def measure_cell(libraries: dict, d: int, s: int, words) -> list[dict]:
    """Rows of one head_dim and seqlen."""
    shape = (TOKENS // s, s, WIDTH // d, d)
    q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=torch.float16) for _ in range(4))
    rows: list[dict] = []

    def add(runs: dict, direction: str, causal: bool, peer: str, dtype: str = "float16") -> None:
        times = race(runs, words.rounds, words.least)
        case = {"direction": direction, "causal": causal, "dtype": dtype}
        rows.extend(row_of(name, time_s, peer, times[peer], d, s, case) for name, time_s in times.items())

    def forwards(first: str = "", **options) -> dict:
        return {
            name: partial(ladder.forward, lib, q, k, v, **options)
            for name, lib in libraries.items()
            if name >= first
        }

    add({"FA2": partial(fa2, q, k, v, False)} | forwards(), "forward", False, "FA2")
    add({"FA2": partial(fa2, q, k, v, True)} | forwards("step_10", causal=True), "forward", True, "FA2")
    for name, lib in libraries.items():
        if name.startswith("step_11"):
            dropped = partial(ladder.forward, lib, q, k, v, dropout_p=0.1, rng=(1, 2))
            add(
                {name: partial(ladder.forward, lib, q, k, v), name + " p=0.1": dropped},
                "forward",
                False,
                name,
            )
        if name.startswith("step_13"):
            for dtype, backend in (
                (torch.bfloat16, SDPBackend.FLASH_ATTENTION),
                (torch.float32, SDPBackend.EFFICIENT_ATTENTION),
            ):
                x = [tensor.to(dtype) for tensor in (q, k, v)]
                peer = "FA2" if dtype == torch.bfloat16 else "PyTorch fp32"
                pair = {
                    peer: partial(fa2, x[0], x[1], x[2], False, backend),
                    name: partial(ladder.forward, lib, *x),
                }
                add(pair, "forward", False, peer, str(dtype).removeprefix("torch."))
        if name.startswith("step_12"):
            out, lse = ladder.forward(lib, q, k, v)
            ours = partial(ladder.backward, lib, q, k, v, out, lse, dout)
            add({"FA2": fa2_backward(q, k, v, dout), name: ours}, "backward", False, "FA2")
    return rows


def describe(row: dict) -> str:
    mask = "causal" if row["causal"] else "full"
    return (
        f"{row['step']:28} {row['dtype']:8} {row['direction']:8} {mask:6} D={row['head_dim']:3} S={row['seqlen']:5} "
        f"{row['time_s'] * 1e3:9.3f} ms {row['tflops']:7.1f} TFLOP/s {row['of_peak']:6.1%} of peak "
        f"{row['of_peer']:5.2f} of {row['peer']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", default=ladder.steps())
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=0.02, help="seconds of one timing")
    parser.add_argument("--arch", default=ladder.gpu_arch())
    parser.add_argument("--output", type=Path)
    words = parser.parse_args()
    rows = []
    for d in words.head_dims:
        with ThreadPoolExecutor() as pool:
            paths = list(pool.map(lambda step, d=d: ladder.build(step, d, words.arch), words.steps))
        libraries = {step: ladder.load(path) for step, path in zip(words.steps, paths, strict=True)}
        for s in words.seqlens:
            for row in measure_cell(libraries, d, s, words):
                rows.append(row)
                print(describe(row), flush=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    about = {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "command": "python -m learn.cuda.measure " + " ".join(sys.argv[1:]),
    }
    if words.output:
        words.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
