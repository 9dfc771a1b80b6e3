"""Which backend runs a problem: an ordered list, each entry with its reason to refuse.

To add a backend: one module with `supports`, `forward` and `backward` (see `flash_attn/backends`)
and one line in `BACKENDS`. A forced backend never falls back to another.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, lru_cache
from types import ModuleType

import torch

from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.problem import Problem
from flash_attn.utils import device, env

# In order of preference. A name maps to the module that implements
#   supports(problem, direction) -> str | None      None: can run it; else the reason why not
#   forward(problem, operands) -> (out, lse)
#   backward(problem, operands, out, lse, dout, dlse=None, into=(None, None, None)) -> Gradients
# and may say REPEATABLE = True: all it does on a GPU are allocations and launches of utils/launcher.py, so
# utils/replay.py may repeat them.
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

# A context variable: a thread or an asyncio task that forces a backend does not force it for the others.
_forced: ContextVar[str | None] = ContextVar("flash_attn_backend", default=None)


@cache
def load(name: str) -> ModuleType:
    """The module of backend `name`."""
    known = BACKENDS | FORCED_ONLY
    if name not in known:
        raise ArgumentValueError(f"backend must be one of {', '.join(known)}, got {name!r}")
    return importlib.import_module(known[name])


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or FLASH_ATTN_BACKEND, if any."""
    return _forced.get() or env.backend()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call inside the block, of this thread or task, on backend `name`, or raise if it cannot.

    A backward pass runs where its forward pass was told to run, also outside the block.

    Raises:
        ArgumentValueError: no such backend.
    """
    load(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(
    problem: Problem, direction: str = "forward", index: int | None = None, forced: str | None = None
) -> ModuleType:
    """The backend that runs `problem` on GPU `index` (default: the current one).

    `forced` is a choice made earlier (the forward's, for a backward); default: the choice in force here.

    Raises:
        UnsupportedError: no backend can, with every backend's reason.
        ArgumentValueError: FLASH_ATTN_BACKEND names no backend.
    """
    if index is None:
        index = _current(problem)
    key = (id(problem), direction, forced or forced_backend(), index, device.assumed())
    found = _chosen.get(key)
    if found is None:
        if len(_chosen) >= 4096:
            _chosen.clear()
        # by id, since hashing 23 fields takes longer than all else here; kept alive, so no other problem has its id
        found = _chosen[key] = _select(problem, *key[1:]), problem
    return found[0]


_chosen: dict[tuple, tuple[ModuleType, Problem]] = {}


def forget() -> None:
    """Ask the backends again: after a change in what one of them supports."""
    _chosen.clear()
    _select.cache_clear()


def select_unforced(problem: Problem, direction: str) -> ModuleType:
    """The backend that runs `problem` on the current GPU where none is forced: for one that leaves a part to others."""
    return _select(problem, direction, None, _current(problem), device.assumed())


def _current(problem: Problem) -> int | None:
    on_gpu = problem.device == "cuda" and torch.cuda.is_available()
    return torch.cuda.current_device() if on_gpu else None


# What a backend supports depends on the GPU too (machines with two kinds of them; `device.assume`).
@lru_cache(maxsize=4096)
def _select(
    problem: Problem, direction: str, forced: str | None, index: int | None, assumed: device.DeviceInfo | None
) -> ModuleType:
    reasons = {}
    current = torch.cuda.device(index) if problem.device == "cuda" and index is not None else nullcontext()
    # a backend may accept only when asked for by name, which a backward was perhaps in a block that has ended
    with current, use_backend(forced) if forced else nullcontext():
        for name in (forced,) if forced else BACKENDS:
            backend = load(name)
            reason = backend.supports(problem, direction)
            if reason is None:
                return backend
            reasons[name] = reason
        plain = next(iter(FORCED_ONLY))  # runs wherever torch does, and leaves nothing to others
        if not forced and load(plain).supports(problem, direction) is None:
            reasons[plain] = f'can, but only runs when asked for: flash_attn.use_backend("{plain}")'
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    asked = (
        f"the forced backend cannot run this {direction}"
        if forced
        else f"no backend can run this {direction}"
    )
    raise UnsupportedError(f"{asked}: {lines}. Problem: {problem}")


def explain(problem: Problem, direction: str = "forward") -> list[tuple[str, str | None]]:
    """(backend, reason it refuses or None) for every backend, in order of preference."""
    return [(name, load(name).supports(problem, direction)) for name in BACKENDS | FORCED_ONLY]
