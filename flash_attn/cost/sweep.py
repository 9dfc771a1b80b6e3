"""One quantity varied over a range: rows for a table, a file or a plot; standard attention beside flash attention."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flash_attn.cost.accounting import account
from flash_attn.cost.counts import count
from flash_attn.cost.hardware import SUSTAINED_BANDWIDTH, SUSTAINED_MATRIX, Hardware
from flash_attn.cost.kernels import estimate
from flash_attn.cost.report import Table
from flash_attn.cost.whole import ModelEstimate
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

SUFFIXES = {"k": 2**10, "m": 2**20, "g": 2**30}
FIELDS = {
    "seqlen": ("max_q", "max_k"), "seqlen_q": ("max_q",), "seqlen_k": ("max_k",), "batch": ("batch",),
    "heads": ("heads", "kv_heads"), "head_dim": ("head_dim", "head_dim_v"),
}  # fmt: skip


class Sweep(NamedTuple):
    name: str
    values: list[int]


def number(text: str, what: str = "a size") -> int:
    """An integer with an optional binary suffix: 4096, 4k, 1M; `what` names it in an error.

    Raises:
        ArgumentValueError: it is not one, or it is not positive.
    """
    text = text.strip().lower()
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        value = int(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise ArgumentValueError(
            f"{what} must be an integer with an optional k, M or G, got {text!r}"
        ) from None
    if value <= 0:
        raise ArgumentValueError(f"{what} must be positive, got {text!r}")
    return value


def parse(text: str, known: Sequence[str] = tuple(FIELDS)) -> Sweep:
    """`name=low:high[:points]` (doubling without points) or `name=a,b,c`.

    Raises:
        ArgumentValueError: unknown name, or a range that is none.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in known or not values:
        raise ArgumentValueError(f"sweep must be NAME=LOW:HIGH with NAME of {', '.join(known)}, got {text!r}")
    if ":" not in values:
        return Sweep(name, sorted({number(value) for value in values.split(",")}))
    low, high, *rest = values.split(":")
    first, last = number(low), number(high)
    if last < first or len(rest) > 1:
        raise ArgumentValueError(f"sweep must be NAME=LOW:HIGH[:POINTS] with LOW <= HIGH, got {text!r}")
    if not rest:
        found = [first]
        while found[-1] * 2 <= last:
            found.append(found[-1] * 2)
        return Sweep(name, found)
    points = number(rest[0])
    ratio = (last / first) ** (1 / max(points - 1, 1))
    return Sweep(name, sorted({round(first * ratio**i) for i in range(points)}))


def standard_time(problem: Problem, direction: str, hw: Hardware) -> float:
    """Seconds of attention by separate products and a softmax, each at its roofline, scores in memory, no tile
    skipped for the mask."""
    work = count(problem, direction)
    area = work.score_bytes // problem.dtype.itemsize
    rate = hw.matrix_rate(str(problem.dtype).removeprefix("torch.")) * SUSTAINED_MATRIX
    bandwidth = hw.bandwidth * SUSTAINED_BANDWIDTH
    time_s = 0.0
    for name in work.macs:
        dim = problem.head_dim_v if "V" in name else problem.head_dim
        # Each product reads or writes one score matrix and two others.
        moved = work.score_bytes + 2 * work.flash_bytes / len(work.tensors)
        time_s += max(2 * area * dim / rate, moved / bandwidth) + hw.launch
    # Softmax reads S and writes P; its gradient reads P and dP and writes dS.
    passes = 2 if direction == "forward" else 3
    return time_s + passes * work.score_bytes / bandwidth + hw.launch


def standard_memory(problem: Problem, direction: str) -> int:
    """Bytes allocated: inputs, outputs, and S or P (the backward also holds dP)."""
    work = count(problem, direction)
    return work.flash_bytes + (1 if direction == "forward" else 2) * work.score_bytes


def with_value(problem: Problem, name: str, value: int) -> Problem:
    """`problem` with the swept field set; heads keeps the group, a bound of the window keeps its size."""
    if name == "heads":
        group = problem.group
        if value % group:
            raise ArgumentValueError(f"heads must be multiples of the group {group}, got {value}")
        return problem._replace(heads=value, kv_heads=value // group)
    changes: dict[str, Any] = dict.fromkeys(FIELDS[name], value)
    changed = problem._replace(**changes)
    return changed._replace(scale=changed.head_dim**-0.5)


def problem_rows(
    problem: Problem, sweep: Sweep, hardware: Sequence[Hardware], directions: Sequence[str], backend: str | None,
    mode: str = "exact",
) -> Table:  # fmt: skip
    """One row a value, direction and device."""
    rows = []
    for value in sweep.values:
        p = with_value(problem, sweep.name, value)
        for hw in hardware:
            for direction in directions:
                e = estimate(p, direction, hw, backend)
                rows.append(
                    {
                        sweep.name: value,
                        "hardware": hw.name,
                        "direction": direction,
                        "backend": e.backend,
                        "flash_s": e.time_s,
                        "standard_s": standard_time(p, direction, hw),
                        "flash_bytes": count(p, direction).flash_bytes,
                        "standard_bytes": standard_memory(p, direction),
                        "flops": account(p, mode, direction).flops,
                        "mode": mode,
                        "tflops": e.tflops,
                        "flop_per_byte": e.matmul_flops / e.bytes,
                        "bound": e.bound,
                    }
                )
    return Table(rows)


def model_rows(name: str, values: Sequence[int], runs: Callable[[int], Sequence[ModelEstimate]]) -> Table:
    """One row a value and device."""
    rows = []
    for value in values:
        for e in runs(value):
            attention = sum(part.time_s for part in e.parts if part.name == "attention")
            rows.append(
                {
                    name: value,
                    "hardware": e.hardware.name,
                    "phase": e.phase,
                    "devices": e.devices,
                    "time_s": e.time_s,
                    "attention_s": attention,
                    "tokens_per_s": e.tokens_per_s,
                    "mfu": e.utilisation,
                    "memory_bytes": e.memory_bytes,
                    "fits": e.fits,
                    "bound": e.bound,
                }
            )
    return Table(rows)
