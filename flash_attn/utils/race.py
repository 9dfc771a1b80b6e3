"""Ours against the other implementations on this machine: correctness first, then time, as rows of data."""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
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


def stopwatch(run, device: str, budget_s: float) -> float:
    """Median seconds of one call of `run`, over about `budget_s` seconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=budget_s * 250, rep=budget_s * 1000, return_mode="median") / 1e3
    run()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def make_inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh random q, k, v, dout of `p`."""

    def random(seqlen: int, heads: int, dim: int) -> Tensor:
        return torch.randn(p.batch, seqlen, heads, dim, device=p.device, dtype=p.dtype)

    return (
        random(p.max_q, p.heads, p.head_dim), random(p.max_k, p.kv_heads, p.head_dim),
        random(p.max_k, p.kv_heads, p.head_dim_v), random(p.max_q, p.heads, p.head_dim_v),
    )  # fmt: skip


def is_wrong(run, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the result of `run` on one batch row and two heads is wrong, or None; a wrong result is not timed."""
    heads = slice(0, p.group)
    few = p._replace(batch=1, heads=p.group, kv_heads=1)
    if p.dropout_p or p.max_q * p.max_k > 2**26:
        return None  # random, or too large for a reference that stores the score matrix
    want, _ = oracle(few, Operands(q[:1, :, heads], k[:1, :, :1], v[:1, :, :1]), dtype=torch.float32)
    error = float((run(q, k, v)[:1, :, heads].float() - want).norm() / want.norm())
    return None if error < 2e-2 else f"relative error {error:.1e}"


def time_row(peer: Peer, p: Problem, direction: str, budget_s: float) -> dict[str, Any]:
    """One row of bench/results (README.md there), or the same with a "note" that says why there is no time."""
    backend = dispatch.select(p, direction).__name__.rsplit(".", 1)[-1] if peer is OURS else peer.name
    row: dict[str, Any] = describe_row(p, direction) | {"impl": peer.name, "backend": backend}
    q, k, v, dout = make_inputs(p)
    try:
        run = peer.make(p)
        wrong = is_wrong(run, p, q, k, v)
        if wrong:
            return row | {"note": f"wrong: {wrong}"}
        if direction == "forward":
            with torch.no_grad():
                seconds = stopwatch(lambda: run(q, k, v), p.device, budget_s)
        else:
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = run(*leaves)
            seconds = stopwatch(
                lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), p.device, budget_s
            )
    except (CannotRun, FlashAttnError, RuntimeError) as error:
        return row | {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    return row | {"time_us": seconds * 1e6, "tflops": work_flop(p, direction) / seconds / 1e12}


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
    """The rows of one cell after the other; peers of a cell follow each other, to meet the same clocks."""
    for problem in problems:
        for direction in directions:
            yield [time_row(peer, problem, direction, budget_s) for peer in (OURS, *peers)]


def save(rows: list[dict[str, Any]], path: Path, meta: dict[str, Any] | None = None) -> None:
    """Write the rows that have a time, with where they come from, as bench/results/README.md describes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if "time_us" in row]
    path.write_text(json.dumps({"meta": meta or provenance(), "rows": timed}, indent=1) + "\n")
