"""What a time line profiler shows, without one: every kernel and copy that the steps launch, from torch.profiler.

    python -m learn.cuda.timeline step_09_pipeline step_12_backward
    python -m learn.cuda.timeline --trace trace.json     and the time line itself, to open in ui.perfetto.dev

It uses CUPTI, as nsys does, so it needs no tool but PyTorch.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from learn.cuda import ladder

CALLS = 3  # of each step, after one that loads the kernel
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def events_of(trace: dict) -> list[dict]:
    """What ran on the GPU, in order: name, start and time in us, and how a kernel was launched."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ON_THE_GPU:
            args = event.get("args", {})
            found.append(
                {
                    "name": event["name"].removeprefix("void ").split("(")[0][:60],
                    "start": float(event["ts"]),
                    "us": float(event["dur"]),
                    "blocks": "x".join(map(str, args["grid"])) if "grid" in args else "",
                    "threads": "x".join(map(str, args["block"])) if "block" in args else "",
                    "registers": args.get("registers per thread", ""),
                    "shared": args.get("shared memory", ""),
                }
            )
    return sorted(found, key=lambda event: event["start"])


def table_of(events: list[dict]) -> list[str]:
    """One line a kernel (equal launches together), the longest total first; then how long the GPU had nothing to do."""
    groups: dict[tuple, list[float]] = {}
    for event in events:
        key = tuple(event[name] for name in ("name", "blocks", "threads", "registers", "shared"))
        groups.setdefault(key, []).append(event["us"])
    lines = [
        f"{'calls':>5} {'us a call':>10}  {'blocks':>10} {'threads':>7} {'regs':>4} {'shared B':>8}  kernel"
    ]
    for (name, blocks, threads, registers, shared), times in sorted(groups.items(), key=lambda g: -sum(g[1])):
        mean = sum(times) / len(times)
        launched = f"{blocks:>10} {threads:>7} {registers:>4} {shared:>8}"
        lines.append(f"{len(times):5} {mean:10.1f}  {launched}  {name}")
    busy = sum(event["us"] for event in events)
    span = max(e["start"] + e["us"] for e in events) - min(e["start"] for e in events)
    lines.append(f"busy {busy:.0f} us of {span:.0f} us: {busy / span:.0%}")
    return lines


def record(steps: list[str], head_dim: int, seqlen: int) -> dict:
    """The trace of CALLS calls of each step, and of its backward where it has one."""
    q, k, v, dout = (torch.randn(2, seqlen, 16, head_dim, device="cuda").half() for _ in range(4))
    libraries = [ladder.load(ladder.build(step, head_dim, ladder.gpu_arch())) for step in steps]

    def run() -> None:
        for library in libraries:
            out, lse = ladder.forward(library, q, k, v)
            if library.flash_can() & 32:
                ladder.backward(library, q, k, v, out, lse, dout)
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(CALLS):
            run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", default=["step_09_pipeline", "step_12_backward"])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--trace", type=Path, help="where to write the time line, for ui.perfetto.dev")
    words = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: there is nothing to record")
    unknown = sorted(set(words.steps) - set(ladder.steps()))
    if unknown:
        raise SystemExit(f"step must be one of {', '.join(ladder.steps())}, got {', '.join(unknown)}")
    trace = record(words.steps, words.head_dim, words.seqlen)
    events = events_of(trace)
    if not events:
        raise SystemExit("the profiler saw no kernel: CUPTI is missing or not permitted on this machine")
    print("\n".join(table_of(events)))
    if words.trace:
        words.trace.write_text(json.dumps(trace))
        print(f"time line: {words.trace}, open it in https://ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    main()
