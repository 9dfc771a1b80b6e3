"""Apply seed 000's correction to an installed genz-llm, and undo it."""

import importlib

from flash_attn.cost.accounting import SOFTMAX_CONSTANT
from flash_attn.errors import UnsupportedError


class Patch:
    """What `patch_genz` changed; `undo()` restores it. Also a context manager."""

    def __init__(self, saved: list[tuple[object, str, object]]):
        self._saved = saved

    def undo(self) -> None:
        while self._saved:
            setattr(*self._saved.pop())

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exc) -> None:
        self.undo()


def patch_genz(softmax_constant: float = SOFTMAX_CONSTANT) -> Patch:
    """Make the genz-llm of this environment count as seed 000 asks: operations times C, full key length.

    Returns:
        A Patch; call `undo()` or use it in a `with` to restore the original.

    Raises:
        UnsupportedError: genz-llm is not installed (pip install genz-llm==0.0.16), or is patched already.
    """
    try:
        operators = importlib.import_module("GenZ.operators")
        attention = importlib.import_module("GenZ.Models.attention")
        builders = importlib.import_module("GenZ.Models.get_language_model")
    except ImportError as error:
        raise UnsupportedError(
            f"patch_genz needs genz-llm: {error}; install it with pip install genz-llm"
        ) from None
    if hasattr(operators.Logit.get_num_ops, "_corrected"):
        raise UnsupportedError("genz-llm is patched already; undo that patch first")
    saved: list[tuple[object, str, object]] = []

    def replace(owner: object, name: str, value: object) -> None:
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for operator in (operators.Logit, operators.Attend):
        original = operator.get_num_ops

        def corrected(self, original=original):
            return original(self) * softmax_constant

        corrected._corrected = True  # type: ignore[attr-defined]
        replace(operator, "get_num_ops", corrected)
    for name in ("mha_flash_attention_prefill", "mha_flash_attention_decode"):
        full = _with_full_keys(getattr(attention, name))
        for module in (attention, builders):
            replace(module, name, full)
    return Patch(saved)


def _with_full_keys(build):
    """`build` with the key length of its prompt rows undivided by sequence parallelism."""

    def corrected(model_config, parallelism_config, input_sequence_length, *rest):
        rows = build(model_config, parallelism_config, input_sequence_length, *rest)
        for row in rows:
            if row[0] in ("Logit", "Attend", "Logit Pre", "Attend Pre"):
                row[3] = input_sequence_length
        return rows

    return corrected
