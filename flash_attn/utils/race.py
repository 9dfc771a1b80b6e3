"""Ours against the other implementations on this machine: correctness first, then time, as rows of data."""

import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn import dispatch
from flash_attn.errors import FlashAttnError
from flash_attn.problem import Operands, Problem
from flash_attn.reference.attention import forward as oracle
from flash_attn.utils import device as devices
from flash_attn.utils.peers import OURS, CannotRun, Peer


def work_flop(p: Problem, direction: str) -> float:
    """Multiply-adds counted as two: 4 B H M N D, causal half; the backward counts 2.5 times the forward."""
    visible = 0.5 if p.causal else 1.0
    if p.left is not None and p.max_k:
        visible = min(1.0, (p.left + 1 + (p.right or 0)) / p.max_k)
    forward = 2 * p.batch * p.heads * p.max_q * p.max_k * (p.head_dim + p.head_dim_v) * visible
    return forward * (2.5 if direction == "backward" else 1.0)


def stopwatch(run: Callable[[], object], budget_s: float) -> float:
    """Median seconds of one call of `run` on the CPU, over about `budget_s` seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def take_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int = 5, burst_s: float = 0.02
) -> dict[str, float]:
    """Median seconds of one call of each of `runs` on the GPU.

    A GPU starts at a high clock and falls within half a second of load, and how far depends on what ran before. So it
    is loaded first, and then every run has a burst of calls in each round, in random order.
    """
    calls, start, end = {}, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def burst(run: Callable[[], object], calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls / 1e3

    for name, run in runs.items():
        run()
        calls[name] = max(2, round(burst_s / burst(run, 2)))
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        for name, run in runs.items():
            burst(run, calls[name])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(burst(runs[name], calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def make_inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh random q, k, v, dout of `p`."""

    def random(seqlen: int, heads: int, dim: int) -> Tensor:
        return torch.randn(p.batch, seqlen, heads, dim, device=p.device, dtype=p.dtype)

    return (
        random(p.max_q, p.heads, p.head_dim), random(p.max_k, p.kv_heads, p.head_dim),
        random(p.max_k, p.kv_heads, p.head_dim_v), random(p.max_q, p.heads, p.head_dim_v),
    )  # fmt: skip


class WrongResult(RuntimeError):
    """A result that is not timed."""


def check(run: Callable[[], Tensor], p: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise WrongResult unless `run` is right on one batch row and one head of keys."""
    out = run()
    if p.dropout_p or p.max_q * p.max_k > 2**26:
        return  # random, or too large for a reference that stores the score matrix
    heads = slice(0, p.group)
    few = p._replace(batch=1, heads=p.group, kv_heads=1)
    want, _ = oracle(few, Operands(q[:1, :, heads], k[:1, :, :1], v[:1, :, :1]), dtype=torch.float32)
    error = float((out[:1, :, heads].float() - want).norm() / want.norm())
    if not error < 2e-2:
        raise WrongResult(f"relative error {error:.1e}")


def prepare(peer: Peer, p: Problem, direction: str, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """What is timed of `peer`, after one checked call.

    Raises:
        CannotRun, FlashAttnError, RuntimeError: it has no result. WrongResult: it has a wrong one.
    """
    q, k, v, dout = inputs
    run = peer.make(p)
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(q, k, v)

        check(forward, p, q, k, v)
        return forward
    check(lambda: run(q, k, v).detach(), p, q, k, v)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = run(*leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    backward()
    return backward


def measure(p: Problem, direction: str, peers: Iterable[Peer], budget_s: float) -> list[dict[str, Any]]:
    """Rows of bench/results (README.md there), or the same with a "note" that says why there is no time."""
    inputs = make_inputs(p)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for peer in peers:
        backend = dispatch.select(p, direction).__name__.rsplit(".", 1)[-1] if peer is OURS else peer.name
        rows[peer.name] = describe_row(p, direction) | {"impl": peer.name, "backend": backend}
        try:
            runs[peer.name] = prepare(peer, p, direction, inputs)
        except (CannotRun, FlashAttnError, RuntimeError) as error:
            rows[peer.name]["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if p.device == "cuda":
        seconds = take_turns(runs, burst_s=budget_s / 5)
    else:
        seconds = {name: stopwatch(run, budget_s) for name, run in runs.items()}
    for name, s in seconds.items():
        rows[name] |= {"time_us": s * 1e6, "tflops": work_flop(p, direction) / s / 1e12}
    return list(rows.values())


def describe_row(p: Problem, direction: str) -> dict[str, Any]:
    """The problem half of a row, as bench/results/README.md names it."""
    return {
        "kind": direction, "B": p.batch,
        "H": p.heads, "Hk": p.kv_heads, "M": p.max_q, "N": p.max_k, "D": p.head_dim, "Dv": p.head_dim_v,
        "dtype": str(p.dtype)[6:], "causal": p.causal, "left": p.left, "right": p.right, "softcap": p.softcap,
        "dropout_p": p.dropout_p, "deterministic": p.deterministic,
    }  # fmt: skip


def provenance() -> dict[str, Any]:
    """Where and with what the rows were measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    gpu = devices.info()
    found = {
        "date": datetime.date.today().isoformat(), "commit": commit or "unknown",
        "gpu": gpu.name if gpu else None, "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "command": " ".join(_portable(word) for word in sys.argv),
    }  # fmt: skip
    if gpu:
        import triton

        found |= {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return found


def _portable(word: str) -> str:
    """A word of a command without the folders of this machine, which say nothing on another."""
    path, root = Path(word), Path(__file__).parents[2]
    if not path.is_absolute():
        return word
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def run_grid(
    problems: Iterable[Problem], directions: Iterable[str], peers: tuple[Peer, ...], budget_s: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one cell after the other, about `budget_s` seconds for each of its implementations."""
    for problem in problems:
        for direction in directions:
            yield measure(problem, direction, (OURS, *peers), budget_s)


def save(rows: list[dict[str, Any]], path: Path, meta: dict[str, Any] | None = None) -> None:
    """Write the rows that have a time, with where they come from, as bench/results/README.md describes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if "time_us" in row]
    path.write_text(json.dumps({"meta": meta or provenance(), "rows": timed}, indent=1) + "\n")
