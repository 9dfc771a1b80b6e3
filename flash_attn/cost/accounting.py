"""Four ways to put a number on the work of attention, side by side; each result says which one it is.

paper           4 B H M N D FLOP, halved when causal, backward 2.5 times that: FlashAttention papers, seed 003.
genz-original   what GenZ 0.0.16 counts: B H M N D MACs an operator, keys divided by sequence parallelism.
genz-corrected  seed 000: B H M N D C "FLOPs" an operator, full key length, C = 3.0 unless set.
exact           the visible pairs, both products and the softmax operations (see `counts`); the default.
"""

from collections.abc import Sequence
from typing import NamedTuple

from flash_attn.cost.counts import count, positive
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

MODES = ("paper", "genz-original", "genz-corrected", "exact")
SOFTMAX_CONSTANT = 3.0  # seed 000's C


class Account(NamedTuple):
    """Operations of one attention call under one mode."""

    mode: str
    unit: str  # of `logit` and `attend`: "MAC" or "FLOP"
    logit: float  # Q K^T; in the backward the three products with D
    attend: float  # P V; in the backward the two products with Dv
    softmax_flops: float  # beyond logit and attend
    flops: float  # total FLOP as the mode means it
    flops_reported: float  # total FLOP as GenZ prints it (2 x num_ops); equal to `flops` in the other modes
    note: str


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ArgumentValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def account(
    problem: Problem,
    mode: str = "exact",
    direction: str = "forward",
    softmax_constant: float = SOFTMAX_CONSTANT,
    sequence_parallel: int = 1,
    lens_q: Sequence[int] | None = None,
    lens_k: Sequence[int] | None = None,
) -> Account:
    """Operations of `problem` on one device under `mode`.

    Raises:
        ArgumentValueError: unknown mode, wrong size, or a GenZ mode asked for what GenZ does not model.
    """
    check_mode(mode)
    positive("sequence_parallel", sequence_parallel)
    work = count(problem, direction, lens_q, lens_k)
    p = problem
    if mode == "exact":
        qk = sum(n for name, n in work.macs.items() if name[0] == "S" or name[:2] in ("dK", "dQ"))
        softmax = sum(work.softmax.values())
        total = work.flops / sequence_parallel
        note = f"{work.pairs} visible pairs; products and {len(work.softmax)} softmax operations a pair"
        rest = sum(work.macs.values()) - qk
        parts = (qk / sequence_parallel, rest / sequence_parallel, softmax / sequence_parallel)
        return Account(mode, "MAC", *parts, total, total, note)
    if lens_q is not None or lens_k is not None:
        raise ArgumentValueError(f"mode {mode} knows no varlen, got lens_q or lens_k; use exact")
    area = p.batch * p.heads * p.max_q * p.max_k
    if mode == "paper":
        scale = (0.5 if p.causal else 1.0) * (1.0 if direction == "forward" else 2.5) / sequence_parallel
        logit, attend = 2 * area * p.head_dim * scale, 2 * area * p.head_dim_v * scale
        total = logit + attend
        return Account(
            mode, "FLOP", logit, attend, 0.0, total, total, "4 B H M N D; causal half; backward x 2.5"
        )
    if direction != "forward":
        raise ArgumentValueError(f"mode {mode} counts no backward pass, got direction={direction!r}")
    if mode == "genz-original":
        keys = p.max_k // sequence_parallel
        macs = float(p.batch * p.heads * p.max_q * keys * p.head_dim)
        return Account(
            mode, "MAC", macs, macs, 0.0, 4 * macs, 4 * macs, "no mask, no softmax; keys // sequence_parallel"
        )
    if not softmax_constant > 0:
        raise ArgumentValueError(f"softmax_constant must be positive, got {softmax_constant}")
    ops = area * p.head_dim * softmax_constant
    note = f"B H M N D C an operator, C = {softmax_constant:g}; GenZ prints twice that"
    return Account(mode, "FLOP", ops, ops, 0.0, 2 * ops, 4 * ops, note)


class SoftmaxFactor(NamedTuple):
    """What seed 000's constant C stands for, three ways."""

    asked: float  # C as set
    flops: float  # (products + softmax operations) / products
    time: float  # (matrix time + exp time) / matrix time when neither hides the other


def softmax_factor(
    problem: Problem, matrix_flops: float, exps: float, asked: float = SOFTMAX_CONSTANT
) -> SoftmaxFactor:
    """C next to its defensible readings on a machine of `matrix_flops` FLOP/s and `exps` exp/s."""
    work = count(problem)
    matmul = work.matmul_flops / matrix_flops
    return SoftmaxFactor(asked, work.flops / work.matmul_flops, 1 + work.exps / exps / matmul)


def memory_efficiency_coefficient(problem: Problem) -> float:
    """Bytes moved by standard attention over bytes moved by flash attention (seed 000's benefit of flash)."""
    work = count(problem)
    return work.standard_bytes / work.flash_bytes
