"""Launch again what an equal call launched: the same kernels and numbers at other addresses.

A backward pass of a small problem takes the GPU less time than the Python that finds out what to launch. Calls of a
training loop are equal but for their addresses, so a call seen twice is recorded (`record`) and from then on repeated
(`again`), which reads strides, looks up one dictionary entry and calls Triton's compiled launcher.

What makes calls equal is the caller's key. A recording that a repetition could not reproduce is not kept: a torch
operator besides allocations, a tensor the caller did not name, a kernel without `launcher.Shortcut`.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn.utils import launcher

MOST = 1024  # recorded calls, and addresses of one descriptor
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")

_seen: set[Hashable] = set()
_kept: dict[Hashable, "Launches | None"] = {}  # None: cannot be repeated


class Address(NamedTuple):
    """Stands for a tensor where only its address is read."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class Descriptor(NamedTuple):
    """A TMA descriptor that moves with its tensor."""

    at: int  # position among the arguments of the compiled launcher
    role: int  # of the tensor
    box: Any  # the description that was launched, without its tensor
    about: Any
    encode: Callable[[Any, Any], list]
    encoded: dict[int, Any]

    def move(self, address: int) -> Any:
        if len(self.encoded) >= MOST:
            self.encoded.clear()
        found = self.encoded[address] = self.encode(self.box._replace(base=Address(address)), self.about)[0]
        return found


class Step(NamedTuple):
    """One launch; arguments as the compiled launcher takes them, with holes for addresses."""

    launch: Callable[..., None]
    grid: tuple[int, int, int]
    fixed: tuple  # what stands between the stream and the arguments
    args: list
    pointers: list[tuple[int, int]]  # (position, role)
    tuples: list[
        tuple[int, tuple, list[tuple[int, int]]]
    ]  # (position, tuple with holes, (index, role) of each)
    descriptors: list[Descriptor]


class Launches(NamedTuple):
    steps: list[Step]
    device: int
    current_stream: Callable[[int], int]
    same: list[
        tuple[int, int]
    ]  # roles that one tensor had (q and k, both cu_seqlens), and one must have again
    keep: Any  # what the key refers to by id

    def at(self, tensors: Sequence[Tensor | None]) -> bool:
        """Repeat the launches on `tensors`, which have the roles and strides they had then; False: launch as usual.

        That is when a tensor is not aligned to 16 bytes, when one tensor had two roles and two have them now, or when
        a profiler listens to launches.
        """
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return False
        addresses, bits = [], 0
        for x in tensors:
            address = 0 if x is None else x.data_ptr()
            bits |= address
            addresses.append(address)
        if bits % 16 or any([tensors[i] is not tensors[j] for i, j in self.same]):
            return False
        self._run(addresses)
        return True

    def _run(self, addresses: list[int]) -> None:
        stream = self.current_stream(self.device)
        for launch, grid, fixed, given, pointers, tuples, descriptors in self.steps:
            args = given.copy()
            for i, role in pointers:
                args[i] = addresses[role]
            for i, holes, roles in tuples:
                filled = list(holes)
                for j, role in roles:
                    filled[j] = addresses[role]
                args[i] = tuple(filled)
            for d in descriptors:
                address = addresses[d.role]
                args[d.at] = d.encoded.get(address) or d.move(address)
            launch(*grid, stream, *fixed, *args)


def again(key: Hashable, tensors: Sequence[Tensor | None]) -> bool:
    """Repeat the launches kept for `key`; False when there are none, or `Launches.at` refuses."""
    found = _kept.get(key)
    return found is not None and found.at(tensors)


@contextmanager
def record(key: Hashable, tensors: Sequence[Tensor | None], keep: Any = None) -> Iterator[None]:
    """Run the launches inside the block, and keep them for `key` where a second call can repeat them.

    Args:
        key: all that decides what is launched but addresses: description, strides, shapes of packed tensors.
        tensors: every tensor that the launches use, workspace included. keep: kept alive with the recording.
    """
    if key in _kept or key not in _seen:  # most packed batches never come again
        if len(_seen) >= 4 * MOST:
            _seen.clear()
        _seen.add(key)
        yield
        return
    with watch(tensors, keep) as recording:
        yield
    if not recording.unaligned:
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[key] = recording.launches


class Recording:
    """What `watch` saw, once its block has ended."""

    launches: Launches | None = None  # None: they cannot be repeated
    unaligned = False  # because of these addresses


@contextmanager
def watch(tensors: Sequence[Tensor | None], keep: Any = None) -> Iterator[Recording]:
    """Run the launches inside the block, and make of them what repeats them; arguments as of `record`."""
    result = Recording()
    calls: list[tuple[Any, tuple, tuple]] = []
    token = launcher.recording.set(calls)
    try:
        with _Watch() as seen:
            yield result
    finally:
        launcher.recording.reset(token)
    result.unaligned = any(x is not None and x.data_ptr() % 16 for x in tensors)
    if not seen.other and not result.unaligned:
        result.launches = _launches(calls, tensors, keep)


class _Watch(TorchDispatchMode):
    """Notices a torch operator that a repetition would leave out."""

    other = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name not in _ALLOCATIONS:
            self.other = True
        return func(*args, **(kwargs or {}))


def _launches(calls: list, tensors: Sequence[Tensor | None], keep: Any) -> Launches | None:
    """Templates of the launches, or None where one cannot be repeated."""
    roles: dict[int, int] = {}
    same = []
    for i, x in enumerate(tensors):
        if x is not None and roles.setdefault(id(x), i) != i:
            same.append((roles[id(x)], i))
    try:
        steps = [_step(binary, grid, args, roles) for binary, grid, args in calls]
    except (
        KeyError
    ):  # a tensor that the caller did not name (a copy, most likely), or a launch of another kind
        return None
    first = calls[0][0] if calls else None
    return None if first is None else Launches(steps, first.device, first.current_stream, same, keep)


def _step(binary: Any, grid: tuple, args: tuple, roles: dict[int, int]) -> Step:
    """KeyError: cannot be repeated."""
    short = None if binary is None else binary.short
    if short is None:
        raise KeyError("launched without a shortcut")
    boxes = dict(short.boxes)
    flat: list[Any] = []
    pointers: list[tuple[int, int]] = []
    tuples: list[tuple[int, tuple, list[tuple[int, int]]]] = []
    descriptors: list[Descriptor] = []
    for i, x in enumerate(args):
        at = len(flat)
        if i in boxes:
            role = roles[id(x.base)]
            descriptors.append(Descriptor(at, role, x._replace(base=None), boxes[i], short.encode, {}))
            flat += [None, *x.shape, *x.strides]
        elif isinstance(x, Tensor):
            pointers.append((at, roles[id(x)]))
            flat.append(None)
        elif type(x) is tuple and _holds_tensors(x):
            holes = [(j, roles[id(y)]) for j, y in enumerate(x) if isinstance(y, Tensor)]
            rest = tuple(None if isinstance(y, Tensor) else y for y in x)
            if _holds_tensors(rest):
                raise KeyError("a tensor in a tuple of a tuple")
            tuples.append((at, rest, holes))
            flat.append(None)
        else:
            flat.append(x)
    fixed = (binary.function, *short.before, binary.packed, None, None, None)
    return Step(short.launch, grid, fixed, flat, pointers, tuples, descriptors)


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, Tensor) or (type(x) is tuple and any(_holds_tensors(y) for y in x))


def layout(tensors: Sequence[Tensor | None]) -> tuple:
    """The strides of each tensor, for a key."""
    return tuple([None if x is None else x.stride() for x in tensors])


def forget() -> None:
    """Drop every recording."""
    _seen.clear()
    _kept.clear()
