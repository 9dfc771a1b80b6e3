"""Which backend runs a problem: an ordered list, each entry with its reason to refuse.

To add a backend: one module with `supports`, `forward` and `backward` (see `flash_attn/backends`)
and one line in `BACKENDS`. A forced backend never falls back to another.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.problem import Problem
from flash_attn.utils import env

# In order of preference. A name maps to the module that implements
#   supports(problem, direction) -> str | None      None: can run it; else the reason why not
#   forward(problem, operands) -> (out, lse)
#   backward(problem, operands, out, lse, dout, dlse=None, into=(None, None, None)) -> Gradients
BACKENDS = {
    "hopper": "flash_attn.backends.hopper",
    "triton": "flash_attn.backends.triton",
    "cpu": "flash_attn.backends.cpu",
}
# Run only when asked for by name.
FORCED_ONLY = {
    "reference": "flash_attn.backends.reference",
    "flaggems": "flash_attn.flash_attn_flaggems_backend",
}
DIRECTIONS = ("forward", "backward")

_forced: str | None = None


def load(name: str) -> ModuleType:
    """The module of backend `name`."""
    known = BACKENDS | FORCED_ONLY
    if name not in known:
        raise ArgumentValueError(f"backend must be one of {', '.join(known)}, got {name!r}")
    return importlib.import_module(known[name])


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or FLASH_ATTN_BACKEND, if any."""
    return _forced if _forced is not None else env.backend()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call inside the block on backend `name`, or raise if it cannot.

    Raises:
        ArgumentValueError: no such backend.
    """
    global _forced
    load(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def select(problem: Problem, direction: str = "forward") -> ModuleType:
    """The backend that runs `problem`; raises UnsupportedError with every backend's reason."""
    return _select(problem, direction, forced_backend())


@lru_cache(maxsize=4096)
def _select(problem: Problem, direction: str, forced: str | None) -> ModuleType:
    reasons = {}
    for name in (forced,) if forced else BACKENDS:
        backend = load(name)
        reason = backend.supports(problem, direction)
        if reason is None:
            return backend
        reasons[name] = reason
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    asked = f"the forced backend cannot run this {direction}" if forced else f"no backend can run this {direction}"
    raise UnsupportedError(f"{asked}: {lines}. Problem: {problem}")


def explain(problem: Problem, direction: str = "forward") -> list[tuple[str, str | None]]:
    """(backend, reason it refuses or None) for every backend, in order of preference."""
    return [(name, load(name).supports(problem, direction)) for name in BACKENDS | FORCED_ONLY]
