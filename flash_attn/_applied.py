"""Upstream's autograd function classes, by name: clients import them and call `.apply`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch


def applied(name: str, function: Callable[..., Any]) -> type:
    """A class `name` whose `apply` takes the arguments of `function` by position, then is_grad_enabled (default True).

    Upstream's classes are `torch.autograd.Function`s; these are not, and have no `forward` or `backward` to replace.
    """
    count = len(inspect.signature(function).parameters)

    def apply(*args: Any) -> Any:
        call, rest = args[:count], args[count:]
        if len(rest) > 1:
            raise TypeError(f"{name}.apply takes at most {count + 1} arguments, got {len(args)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and all(rest)):
            return function(*call)

    apply.__doc__ = f"`{function.__name__}`, by position; then is_grad_enabled."
    return type(name, (), {"__doc__": f"`apply` is `{function.__name__}`.", "apply": staticmethod(apply)})
