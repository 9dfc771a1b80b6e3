"""Repeat what an equal call launched: the same kernels and numbers at other addresses.

Finding out what to launch takes the host longer than launching it. Calls of a training or decoding loop are equal but
for their addresses, so a call seen twice is recorded (`record`) and from then on repeated (`find`, `Launches.repeat`):
a dictionary entry is looked up, memory allocated, addresses are written between the recorded numbers and the compiled
launchers called. Backends know nothing of it.

What makes calls equal is the caller's key. A recording that a repetition could not reproduce is not kept: a torch
operator besides allocations and views, a tensor of unknown origin, a kernel that Triton launched by itself.
"""

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOST = 1024  # recorded calls
MOST_ENCODED = 2**16  # descriptors of them all, of some 400 bytes
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_VIEWS = {
    "aten::view", "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::unbind",
    "aten::as_strided", "aten::transpose", "aten::detach", "aten::alias",
}  # fmt: skip
_STREAM = 3  # position of the stream among the arguments of a compiled launcher: behind the grid
_LINE = 256  # bytes; parts of the scratch memory start at multiples

_seen: set[Hashable] = set()
_kept: dict[Hashable, "Launches | Never"] = {}
find = _kept.get  # (key): the recording kept for it, or None
_encoded = 0  # descriptors since the last `forget`


class Recording:
    """What is collected while a call runs."""

    def __init__(self) -> None:
        # (binary, grid, arguments) of each launch; no binary: launched by Triton
        self.calls: list[tuple[Any, tuple, tuple]] = []
        self.provided: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self.paused = False  # torch operators are not part of the call


recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Never(NamedTuple):
    """A call that cannot be repeated."""

    keep: Any

    def repeat(self, tensors: Sequence[Tensor | None]) -> None:
        return None


class Address(NamedTuple):
    """Stands for a tensor where only its address is read."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class Hole(NamedTuple):
    """Where an address goes: that of the tensor with this role, or of a part of it."""

    at: int  # position among the arguments of the compiled launcher, or in a tuple among them
    role: int
    offset: int  # bytes


class Descriptor(NamedTuple):
    """A TMA descriptor that moves with its tensor."""

    at: int
    role: int
    offset: int
    encoded: dict[int, Any]  # by address
    encode: Callable[[int], Any]  # the descriptor at an address

    @classmethod
    def of(cls, hole: Hole, box: Any, encode: Callable[[Any], Any]) -> "Descriptor":
        """Of a description that was launched, and what encodes such a one."""
        box = box._replace(base=None)
        return cls(*hole, {}, lambda address: encode(box._replace(base=Address(address))))


class Step(NamedTuple):
    """One launch; arguments as the compiled launcher takes them, with holes for the stream and for addresses."""

    launch: Callable[..., None]
    args: list
    pointers: list[Hole]
    tuples: list[tuple[int, tuple, list[Hole]]]  # (position, tuple with holes, the holes)
    descriptors: list[Descriptor]


class Launches(NamedTuple):
    """A recorded call. Roles number its tensors: those given that are not None, then those made."""

    steps: list[Step]
    device: int
    current_stream: Callable[[int], int]
    given: int  # number of tensors given
    same: list[tuple[int, int]]  # places where one tensor stood twice (both cu_seqlens), and must stand again
    made: list[
        Callable[[], Tensor]
    ]  # what each call needs anew: results, scratch memory, what was `provided`
    results: list[int | None]  # roles
    runtime: Any  # triton.knobs.runtime: who listens to launches
    current_device: Callable[[], int]
    keep: Any  # what the key refers to by id

    def repeat(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Repeat the launches on `tensors`, which have the strides they had then; the results. None: call as usual.

        That is when a tensor is not aligned to 16 bytes, when one tensor had two roles and two have them now, when
        another device is current, or when a profiler listens to launches.
        """
        enter, leave = self.runtime.launch_enter_hook, self.runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return None
        if self.current_device() != self.device:
            return None
        everything = [x for x in tensors if x is not None]
        addresses = [x.data_ptr() for x in everything]
        if reduce(or_, addresses) & 15 or len(addresses) != self.given:
            return None
        if self.same and any([tensors[i] is not tensors[j] for i, j in self.same]):
            return None
        for make in self.made:
            x = make()
            everything.append(x)
            addresses.append(x.data_ptr())
        stream = self.current_stream(self.device)
        for launch, template, pointers, tuples, descriptors in self.steps:
            args = template.copy()
            args[_STREAM] = stream
            for i, role, offset in pointers:
                args[i] = addresses[role] + offset
            for i, holes, inside in tuples:
                filled = list(holes)
                for j, role, offset in inside:
                    filled[j] = addresses[role] + offset
                args[i] = tuple(filled)
            for i, role, offset, encoded, encode in descriptors:
                address = addresses[role] + offset
                args[i] = encoded.get(address) or _encode(encoded, encode, address)
            launch(*args)
        return [None if role is None else everything[role] for role in self.results]


def _encode(encoded: dict[int, Any], encode: Callable[[int], Any], address: int) -> Any:
    """A descriptor that its recording does not have yet; when all have too many, they are dropped."""
    global _encoded
    if _encoded >= MOST_ENCODED:
        forget()
    _encoded += 1
    found = encoded[address] = encode(address)
    return found


def record(
    key: Hashable,
    tensors: Sequence[Tensor | None],
    call: Callable[[], Sequence[Tensor | None]],
    keep: Any = None,
) -> Sequence[Tensor | None]:
    """call(), whose launches are kept for `key` where a repetition can do the same.

    Args:
        key: all that decides what is launched but addresses: description, shapes, strides, which tensors are None.
        tensors: every tensor that the call reads or writes beside those it allocates itself.
        keep: what the key refers to by id; kept alive.
    """
    if key in _kept or key not in _seen:  # most packed batches never come again
        if len(_seen) >= 4 * MOST:
            _seen.clear()
        _seen.add(key)
        return call()
    collected = Recording()
    token = recording.set(collected)
    try:
        with _Watch(collected) as watch:
            results = call()
    finally:
        recording.reset(token)
    if any(x is not None and x.data_ptr() % 16 for x in tensors):
        return results  # what was launched may be special to these addresses
    if len(_kept) >= MOST:
        _kept.clear()
    launches = None if watch.other else _launches(collected, watch.allocated, tensors, results, keep)
    _kept[key] = launches or Never(keep)
    return results


def provided(make: Callable[..., Tensor], *args: Any) -> Tensor:
    """make(*args), a tensor that outlives the call; a repetition asks for it again."""
    collected = recording.get()
    if collected is None:
        return make(*args)
    collected.paused = True
    x = make(*args)
    collected.paused = False
    collected.provided.append((x, partial(make, *args)))
    return x


def forget() -> None:
    """Drop every recording."""
    global _encoded
    _encoded = 0
    _seen.clear()
    _kept.clear()


class _Watch(TorchDispatchMode):
    """Notes what is allocated, and whether there is a torch operator that a repetition would leave out."""

    def __init__(self, collected: Recording) -> None:
        super().__init__()
        self.collected = collected
        self.allocated: list[Tensor] = []
        self.other = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if self.collected.paused:
            pass
        elif name in _ALLOCATIONS:
            self.allocated.append(result)
            self.other |= result.device != self.allocated[0].device
        elif name not in _VIEWS:
            self.other = True
        return result


def _launches(
    collected: Recording, allocated: list[Tensor], tensors: Sequence[Tensor | None],
    results: Sequence[Tensor | None], keep: Any,
) -> Launches | None:  # fmt: skip
    """Templates of the launches, or None where one cannot be repeated."""
    from triton import knobs

    first = collected.calls[0][0] if collected.calls else None
    if first is None:
        return None
    try:
        roles = _Roles(tensors, allocated, results, collected.provided)
        steps = [_step(binary, grid, args, roles) for binary, grid, args in collected.calls]
        returned = [None if x is None else roles.whole[id(x)] for x in results]
    except KeyError:  # a tensor of unknown origin, or a launch of another kind
        return None
    return Launches(
        steps, first.device, first.current_stream, roles.given, roles.same, roles.made, returned, knobs.runtime,
        first.current_device, keep,
    )  # fmt: skip


class _Roles:
    """Which tensor of a call an argument of a launch is, or which part of one that the call allocated."""

    def __init__(
        self, tensors: Sequence[Tensor | None], allocated: list[Tensor], results: Sequence[Tensor | None],
        provided: list[tuple[Tensor, Callable[[], Tensor]]],
    ) -> None:  # fmt: skip
        self.whole: dict[int, int] = {}  # by id
        self.same: list[tuple[int, int]] = []
        self.made: list[Callable[[], Tensor]] = []
        self.parts: dict[int, tuple[int, int]] = {}  # by address of a storage: (role, where in it)
        places: dict[int, int] = {}
        role = 0
        for place, x in enumerate(tensors):
            if x is None:
                continue
            self.whole.setdefault(id(x), role)
            if places.setdefault(id(x), place) != place:
                self.same.append((places[id(x)], place))
            role += 1
        self.given = role
        storages = {_storage(x): x for x in allocated}
        for x in results:
            if x is None or id(x) in self.whole:
                continue
            # by its storage: what torch hands out under a mode may be an alias of what was allocated
            memory = storages.pop(_storage(x)).untyped_storage()
            if x.data_ptr() != memory.data_ptr() or x.numel() * x.element_size() != memory.nbytes():
                raise KeyError("a result that is a part of an allocation")
            self.whole[id(x)] = role
            self.parts[_storage(x)] = role, 0
            # not `torch.empty`, which takes the host half as long again
            self.made.append(
                partial(torch.empty_strided, tuple(x.shape), x.stride(), dtype=x.dtype, device=x.device)
            )
            role += 1
        size = 0
        for address, x in storages.items():
            self.parts[address] = role, size
            size += -(-x.untyped_storage().nbytes() // _LINE) * _LINE
        if size:
            where = allocated[0].device
            self.made.append(partial(torch.empty_strided, (size,), (1,), dtype=torch.uint8, device=where))
            role += 1
        for x, again in provided:
            self.whole[id(x)] = role
            self.made.append(again)
            role += 1

    def __call__(self, x: Tensor) -> tuple[int, int]:
        """(role, offset in bytes); KeyError: unknown."""
        if id(x) in self.whole:
            return self.whole[id(x)], 0
        role, begin = self.parts[_storage(x)]
        return role, begin + x.data_ptr() - _storage(x)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _step(binary: Any, grid: tuple, args: tuple, roles: _Roles) -> Step:
    """KeyError: cannot be repeated."""
    if binary is None:
        raise KeyError("launched by Triton itself")
    if any(_bare_address(kind, x) for kind, x in zip(binary.signature, args, strict=False)):
        raise KeyError("an address that is not a tensor's")
    launch, flat, encode = binary.template(grid)
    pointers: list[Hole] = []
    tuples: list[tuple[int, tuple, list[Hole]]] = []
    descriptors: list[Descriptor] = []
    for i, x in enumerate(args):
        at = len(flat)
        if hasattr(x, "block_shape"):
            descriptors.append(Descriptor.of(Hole(at, *roles(x.base)), x, partial(encode, i)))
            flat += [None, *binary.behind_descriptor(x)]
        elif isinstance(x, Tensor):
            pointers.append(Hole(at, *roles(x)))
            flat.append(None)
        elif type(x) is tuple and _holds_tensors(x):
            holes = [Hole(j, *roles(y)) for j, y in enumerate(x) if isinstance(y, Tensor)]
            rest = tuple(None if isinstance(y, Tensor) else y for y in x)
            if _holds_tensors(rest):
                raise KeyError("a tensor in a tuple of a tuple")
            tuples.append((at, rest, holes))
            flat.append(None)
        else:
            flat.append(x)
    return Step(launch, flat, pointers, tuples, descriptors)


def _bare_address(kind: Any, x: Any) -> bool:
    """Whether x, of a parameter of this type, is an address (or holds one): a repetition could not move it."""
    if type(x) is tuple:
        return any(_bare_address(k, y) for k, y in zip(kind, x, strict=True))
    return type(x) is int and kind[0] == "*"


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, Tensor) or (type(x) is tuple and any(_holds_tensors(y) for y in x))
