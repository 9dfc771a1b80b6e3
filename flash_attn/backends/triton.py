"""The portable kernels: one Triton family for every GPU that Triton supports."""

import importlib.util
import os
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.utils import device

OLDEST = (7, 5)  # compute capability: the first with tensor cores that Triton still compiles for
REPEATABLE = True  # its work on the GPU is allocations and launches of utils/launcher.py


def supports(problem: Problem, direction: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if problem.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on GPUs, the tensors are on the CPU"
        from flash_attn.dispatch import forced_backend

        if forced_backend() != "triton":
            return "interprets kernels on the CPU only when asked for by name"
    elif problem.device == "cuda":
        found = device.info()
        if found is not None and not found.hip and found.capability < OLDEST:
            return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, {found.name} has {found.capability}"
    elif problem.device != "xpu":
        return f"runs on cuda, hip and xpu devices, not on {problem.device}"
    return importlib.import_module(f"flash_attn.{direction}.launch").supports(problem)


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    return _schedule(problem, ops.q.get_device()).forward(problem, ops)


@lru_cache(maxsize=4096)
def _schedule(problem: Problem, index: int) -> ModuleType:
    """The module that runs the forward on GPU `index`, the current one: few query rows have a kernel of their own."""
    from flash_attn.forward import decode, launch

    return decode if decode.wants(problem) else launch


def backward(
    problem: Problem,
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:
    from flash_attn.backward import launch, short

    way = short if short.wants(problem) else launch
    return way.backward(problem, ops, out, lse, dout, dlse, into)
