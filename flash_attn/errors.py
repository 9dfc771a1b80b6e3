"""The errors a user can meet. All are RuntimeErrors too, which is what FlashAttention-2 raises."""


class FlashAttnError(RuntimeError):
    """Base of every error this package raises on purpose."""


class ArgumentValueError(FlashAttnError, ValueError):
    """An argument has the right kind and a wrong value: shape, range, order, device."""


class ArgumentTypeError(FlashAttnError, TypeError):
    """An argument has the wrong kind: dtype, not a tensor, not an integer."""


class UnsupportedError(FlashAttnError, NotImplementedError):
    """The request is right but nothing here can serve it; the message says who refused and why."""
