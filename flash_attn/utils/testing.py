"""What makes a result right: as close to the fp64 oracle as twice the error of PyTorch in the same precision.

No tolerance is chosen by hand anywhere in the tests. Plain asserts, so that it serves outside of pytest too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager

_EMPTY = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
]


@contextmanager
def nan_empty() -> Iterator[None]:
    """Fill what torch.empty and its like return with NaN, so that an element that nobody writes shows.

    Affects every thread (autograd runs GPU backwards in its own).
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return empty

    with ExitStack() as stack:
        for owner, name in _EMPTY:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def max_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference where `want` is finite; inf where only one of them is, or an infinity differs."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    same = (got == want) & want.isinf()
    error = (got - want).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
    return error.max().item() if error.numel() else 0.0


def assert_as_close_as_torch(
    got: Tensor,
    want: Tensor,
    same_precision_torch: Tensor,
    factor: float = 2.0,
    name: str = "result",
    step: float = 0.0,
) -> None:
    """Error of `got` <= factor * error of `same_precision_torch` + one rounding step.

    Args:
        want: the same in fp64.
        same_precision_torch: what PyTorch gives in the precision that made `got`.
        step: what rounding the inputs of a cancellation may change. A rounding step is at least the spacing of
            numbers of the type of `got` at the largest element.

    Raises:
        AssertionError: with both errors. NaN, and an infinity where `want` has none, never pass.
    """
    error, allowed = max_error(got, want), max_error(same_precision_torch, want)
    finite = want.detach().double().abs().nan_to_num(posinf=0.0, neginf=0.0)
    step = max(step, torch.finfo(got.dtype).eps * (finite.max().item() if finite.numel() else 0.0))
    if not error <= factor * allowed + step:
        raise AssertionError(
            f"{name}: error {error:.3g} exceeds {factor:g} x {allowed:.3g} (PyTorch in {got.dtype}) + {step:.3g}"
        )


def assert_gradients_as_close_as_torch(
    got: Gradients,
    problem: Problem,
    ops: Operands,
    dout: Tensor,
    dlse: Tensor | None = None,
    factor: float = 2.0,
) -> None:
    """The same for dq, dk, dv and dsink of a whole forward and backward.

    For 16-bit types PyTorch is autograd of a plain attention; for float32 it is the backward formula evaluated in
    that type on whole matrices. A rounding step is at least the most that rounding q, k, v, out, lse and dout to the
    type of the arithmetic changes, in four random directions: autograd forms rowsum(P * dP) instead of
    rowsum(dO * O), which cancels to the bit in a row that sees one key, and nothing that starts from out and lse can
    do that.
    """
    out, lse = oracle.forward(problem, ops)
    want = oracle.backward(problem, ops, out, lse, dout, dlse)
    if problem.dtype.itemsize == 2:
        plain = eager.backward(problem, ops, dout, dlse)
    else:
        plain = oracle.backward(problem, ops, *eager.forward(problem, ops), dout, dlse, problem.dtype)
    nudged = [_nudged_backward(problem, ops, out, lse, dout, dlse, seed) for seed in range(4)]
    steps = [
        0.0 if w is None else max(max_error(_there(n[i]), w) for n in nudged) for i, w in enumerate(want)
    ]
    if want.dsink is not None and problem.dtype.itemsize == 2:
        rounded = oracle.backward(problem, ops, out.to(problem.dtype).double(), lse, dout, dlse)
        steps[3] = max(steps[3], max_error(_there(rounded.dsink), want.dsink))
    for name, g, w, t, step in zip(want._fields, got, want, plain, steps, strict=True):
        if w is None or t is None:
            assert g is None, f"{name}: a gradient that nobody asked for"
        else:
            assert g is not None, f"{name} is missing"
            assert_as_close_as_torch(g, w, t, factor, name, step)


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _nudged_backward(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, seed: int
) -> Gradients:
    """The oracle's gradients when all that enters is one rounding step of the arithmetic larger or smaller."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(torch.promote_types(torch.float32, problem.dtype)).eps

    def nudge(x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        return x.double() * (1 + eps * sign)

    ops = ops._replace(q=nudge(ops.q), k=nudge(ops.k), v=nudge(ops.v))
    return oracle.backward(problem, ops, nudge(out), nudge(lse), nudge(dout), dlse)


def check_backend(backend: ModuleType, problem: Problem, ops: Operands, seed: int = 0) -> None:
    """Run `backend` on a problem with poisoned outputs; compare out, lse and, where it can, every gradient.

    Gradients reach both out and lse, and are written into strided views when the seed is odd.
    """
    with nan_empty():
        out, lse = backend.forward(problem, ops)
    want, want_lse = oracle.forward(problem, ops)
    torch_out, torch_lse = eager.forward(problem, ops)
    assert out.dtype == problem.dtype and lse.dtype == torch.promote_types(torch.float32, problem.dtype)
    assert_as_close_as_torch(out, want, torch_out, name="out")
    assert_as_close_as_torch(lse, want_lse, torch_lse, name="lse")
    if backend.supports(problem, "backward"):
        return
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator).to(out)
    dlse = torch.randn(lse.shape, generator=generator).to(lse).masked_fill_(lse.isinf(), 0.0)
    into = strided_like(ops[:3]) if seed % 2 else (None, None, None)
    with nan_empty():
        got = backend.backward(problem, ops, out, lse, dout, dlse, into)
    for given, g in zip(into, got[:3], strict=True):
        assert given is None or g.data_ptr() == given.data_ptr(), "a gradient is not where it was asked for"
    # The oracle starts from its own out and lse: an error of the forward that spoils a gradient must show.
    assert_gradients_as_close_as_torch(got, problem, ops, dout, dlse)


def strided_like(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """NaN-filled views with the shapes of `tensors`, rows three times as far apart as they need to be."""
    return tuple(
        torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)[..., 1, :]
        for x in tensors
    )
