"""Seed 000's switch between GenZ's original attention accounting and the corrected one.

Everything reads the switch at call time, and the softmax constant hangs on it too: switching back restores the
original numbers exactly. (The seed's text changes the operators for good and lets the switch choose only the layer
lists, so its "original" setting would still count three times the operations.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from flash_attn.cost.accounting import SOFTMAX_CONSTANT
from flash_attn.errors import ArgumentValueError

USE_CORRECTED_FLASH_ATTENTION = True

MODES = ("genz-original", "genz-corrected")
_override: ContextVar[tuple[bool, float] | None] = ContextVar("genz_mode", default=None)


def is_corrected() -> bool:
    override = _override.get()
    return USE_CORRECTED_FLASH_ATTENTION if override is None else override[0]


def current_mode() -> str:
    return MODES[is_corrected()]


def softmax_constant() -> float:
    """C of the current mode: what Logit and Attend multiply their operations with."""
    override = _override.get()
    if not is_corrected():
        return 1.0
    return SOFTMAX_CONSTANT if override is None else override[1]


def set_flash_attention_mode(use_corrected: bool = True) -> None:
    """Choose the corrected (the default, as in seed 000) or the original accounting from now on."""
    global USE_CORRECTED_FLASH_ATTENTION
    USE_CORRECTED_FLASH_ATTENTION = bool(use_corrected)


@contextmanager
def using_mode(mode: str | None, constant: float = SOFTMAX_CONSTANT) -> Iterator[None]:
    """Account by `mode` inside the block, in this thread or task only; None leaves the switch in charge.

    Raises:
        ArgumentValueError: unknown mode, or a constant that is not positive.
    """
    if mode is not None and mode not in MODES:
        raise ArgumentValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not constant > 0:
        raise ArgumentValueError(f"softmax_constant must be positive, got {constant}")
    corrected = is_corrected() if mode is None else mode == "genz-corrected"
    token = _override.set((corrected, constant))
    try:
        yield
    finally:
        _override.reset(token)


def get_flash_attention_implementation() -> tuple[Callable, Callable]:
    """(prefill, decode) layer builders of the current mode."""
    from flash_attn.cost.genz import layers

    if is_corrected():
        return layers.mha_flash_attention_corrected_prefill, layers.mha_flash_attention_corrected_decode
    return layers.mha_flash_attention_prefill, layers.mha_flash_attention_decode
