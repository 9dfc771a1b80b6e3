"""What features cost on the portable kernels, beside the same call without them, forward and backward.

    python -m bench.portable_features [output.json]

bf16, 16k tokens, 16 heads of 128. Medians over shuffled rounds in one process; a wrong result is not timed.
"""

import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from flash_attn.backward import launch as backward
from flash_attn.cost.counts import count
from flash_attn.forward import launch as forward
from flash_attn.problem import Operands, Problem
from flash_attn.reference import attention
from flash_attn.utils import race
from flash_attn.utils.example import operands

TOKENS, H, D = 16384, 16, 128
ROUNDS = 3


class Feature(NamedTuple):
    """A problem, what it is compared with, and the ratios of time per visible pair that docs/perf aims at."""

    name: str
    problem: Problem
    plain: Problem
    aims: tuple[float, float]  # forward, backward
    lengths: tuple[int, ...] | None = None


def dense(S: int, causal: bool, batch: int = 0, **fields: Any) -> Problem:
    return Problem(
        batch or TOKENS // S, H, H, S, S, D, D, torch.bfloat16, device="cuda", right=0 if causal else None,
        scale=D**-0.5, **fields,
    )  # fmt: skip


def documents(total: int = TOKENS, seed: int = 0) -> tuple[int, ...]:
    """Document lengths in tokens, log-normal with median 500 and sigma 1.1 (mean 915): a corpus of web text, packed."""
    rng = random.Random(seed)
    found: list[int] = []
    while sum(found) < total:
        found.append(max(16, min(round(rng.lognormvariate(6.2146, 1.1)), total - sum(found))))
    return (*found[:-1], total - sum(found[:-1]))


def features() -> list[Feature]:
    found: list[Feature] = []
    for S in (4096, TOKENS):
        plain = dense(S, False)
        for name, fields in (
            ("ALiBi", dict(alibi=True)),
            ("softcap", dict(softcap=30.0)),
            ("dropout", dict(dropout_p=0.1)),
        ):
            found.append(Feature(f"{name} full {S}", plain._replace(**fields), plain, (1.25, 1.35)))
    plain = dense(4096, True)
    found.append(Feature("dropout causal 4096", plain._replace(dropout_p=0.1), plain, (1.25, 1.35)))
    plain = dense(TOKENS, True)
    found.append(Feature("window 1024 causal 16384", plain._replace(left=1023), plain, (1.25, 1.25)))
    for S in (1024, 4096):
        plain = dense(S, True)
        packed = plain._replace(varlen_q=True, varlen_k=True)
        found.append(
            Feature(f"packed, equal lengths, causal {S}", packed, plain, (1.05, 1.05), (S,) * plain.batch)
        )
    for seed in (0, 1):
        lengths = documents(seed=seed)
        S = round(sum(n * n for n in lengths) / TOKENS)  # dense sequences with as many pairs
        plain = dense(S, True, batch=round(TOKENS / S))
        packed = plain._replace(
            batch=len(lengths), max_q=max(lengths), max_k=max(lengths), varlen_q=True, varlen_k=True
        )
        found.append(Feature(f"documents {seed}, causal", packed, plain, (1.15, 1.15), lengths))
    return found


def inputs(p: Problem, lengths: tuple[int, ...] | None) -> Operands:
    if lengths is None:
        return operands(p)
    q, k, v = (torch.randn(sum(lengths), H, D, device="cuda", dtype=p.dtype) for _ in range(3))
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return Operands(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def is_wrong(p: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, grads: Any) -> str | None:
    """Compares the first head (of the first sequence, or of all packed ones) with the formula in fp32."""
    few = p._replace(heads=1, kv_heads=1, batch=p.batch if p.varlen_q else 1)

    def part(x: Tensor) -> Tensor:
        return x[:, :1] if p.varlen_q else x[:1, :, :1]

    slopes = None if ops.alibi_slopes is None else ops.alibi_slopes[:1]
    ops = ops._replace(q=part(ops.q), k=part(ops.k), v=part(ops.v), alibi_slopes=slopes)
    lse = lse[:1] if p.varlen_q else lse[:1, :1]
    want, want_lse = attention.forward(few, ops, torch.float32)
    expected = attention.backward(few, ops, want, want_lse, part(dout), None, torch.float32)
    pairs = [
        (part(out), want),
        (lse, want_lse),
        *((part(x), y) for x, y in zip(grads[:3], expected[:3], strict=True)),
    ]
    errors = [((x.float() - y).norm() / y.norm()).item() for x, y in pairs]
    return None if max(errors) < 1e-2 else f"errors of out, lse, dq, dk, dv {errors}"


def calls(p: Problem, lengths: tuple[int, ...] | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, backward) on fresh inputs, both checked."""
    ops = inputs(p, lengths)
    out, lse = forward.forward(p, ops)
    dout = torch.randn_like(out)
    grads = backward.backward(p, ops, out, lse, dout)
    wrong = is_wrong(p, ops, out, lse, dout, grads)
    if wrong:
        raise SystemExit(f"{wrong}: {p}")
    return lambda: forward.forward(p, ops), lambda: backward.backward(p, ops, out, lse, dout, None, grads[:3])


def pairs(p: Problem, lengths: tuple[int, ...] | None) -> float:
    if lengths is None:
        return count(p, "forward").matmul_flops
    return sum(count(p._replace(batch=1, max_q=n, max_k=n, varlen_q=False, varlen_k=False), "forward").matmul_flops
               for n in lengths)  # fmt: skip


def main() -> None:
    rows: list[dict[str, Any]] = []
    for feature in features():
        sides = {"feature": calls(feature.problem, feature.lengths), "plain": calls(feature.plain, None)}
        jobs = [(side, d) for side in sides for d in (0, 1)]
        times: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        for _ in range(ROUNDS):
            random.shuffle(jobs)
            for side, d in jobs:
                times[side, d].append(do_bench(sides[side][d], warmup=5, rep=25, return_mode="median"))
        share = pairs(feature.problem, feature.lengths) / pairs(feature.plain, None)
        for d, direction in enumerate(("forward", "backward")):
            time_us, plain_us = (1e3 * statistics.median(times[side, d]) for side in ("feature", "plain"))
            ratio = time_us / plain_us / share
            print(f"{direction:9}{feature.name:34} {time_us:8.0f} us, plain {plain_us:8.0f}: {ratio:.3f} per pair"
                  f" (aim {feature.aims[d]})", flush=True)  # fmt: skip
            rows.append(
                race.describe_row(feature.problem, direction)
                | {"impl": "ours", "backend": "triton", "variant": feature.name, "lens_q": feature.lengths,
                   "lens_k": feature.lengths, "time_us": time_us, "plain_us": plain_us, "ratio_per_pair": ratio}
            )  # fmt: skip
    if len(sys.argv) > 1:
        race.save(rows, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
