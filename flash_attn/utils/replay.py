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
from functools import partial
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


class Fresh(NamedTuple):
    """Memory that every call needs anew."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Launches(NamedTuple):
    """A recorded call. Roles number its tensors: those given that are not None, then those made."""

    repeat: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None] | None]  # see `_write`
    steps: list[Step]
    keep: Any  # what the key refers to by id


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
    return Launches(_write(steps, roles, tensors, returned, first, knobs.runtime), steps, keep)


class _Text:
    """Source of a function, and the values its names stand for."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.lines: list[str] = []

    def name(self, x: Any) -> str:
        if x is None or type(x) in (int, bool) or (type(x) is tuple and all(type(y) is int for y in x)):
            return repr(x)
        self.values[f"c{len(self.values)}"] = x
        return f"c{len(self.values) - 1}"

    def make(self, made: "Fresh | Callable[[], Tensor]") -> str:
        if not isinstance(made, Fresh):
            return f"{self.name(made)}()"
        walk, dtype = f"{made.shape}, {made.stride}", self.name(made.dtype)
        if _fast is not None and made.device.type == "cuda":  # on the current device, which is the one
            return f"{self.name(_fast)}({walk}, {dtype})"
        # not `torch.empty`, which takes the host half as long again
        return f"{self.name(torch.empty_strided)}({walk}, dtype={dtype}, device={self.name(made.device)})"

    def launch(self, step: Step) -> str:
        args = [self.name(x) for x in step.args]
        args[_STREAM] = "stream"
        for hole in step.pointers:
            args[hole.at] = _address(hole)
        for i, rest, holes in step.tuples:
            inside = [self.name(x) for x in rest]
            for hole in holes:
                inside[hole.at] = _address(hole)
            args[i] = f"({', '.join(inside)},)"
        for d in step.descriptors:
            kept, at = self.name(d.encoded), _address(d)
            args[d.at] = f"{kept}.get({at}) or encoded({kept}, {self.name(d.encode)}, {at})"
        return f"{self.name(step.launch)}({', '.join(args)})"


def _address(hole: "Hole | Descriptor") -> str:
    return f"a{hole.role} + {hole.offset}" if hole.offset else f"a{hole.role}"


def _write(
    steps: list[Step], roles: "_Roles", tensors: Sequence[Tensor | None], returned: list[int | None], binary: Any,
    runtime: Any,
) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor | None] | None]:  # fmt: skip
    """The function that repeats `steps` on tensors with the strides they had then, and gives the results.

    It gives None, for the call to be made as usual, when a tensor is not aligned to 16 bytes or is there where there
    was none, when one tensor had two roles and two have them now, when another device is current, or when a profiler
    listens to launches. It is written out because a walk over `steps` touches far more memory, of which autograd's
    thread finds nothing in the caches of its core.
    """
    text = _Text(runtime=runtime, current_device=binary.current_device, encoded=_encode)
    there = [f"t{i}" for i, x in enumerate(tensors) if x is not None]
    wrong = [f"t{i} is {'not ' if x is None else ''}None" for i, x in enumerate(tensors)]
    wrong += [f"t{i} is not t{j}" for i, j in roles.same]
    text.lines = [
        "enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook",
        "if getattr(enter, 'calls', enter) or getattr(leave, 'calls', leave): return None",
        f"if current_device() != {binary.device}: return None",
        f"{''.join(f't{i}, ' for i in range(len(tensors)))} = tensors",
        f"if {' or '.join(wrong)}: return None",
        *[f"a{role} = {t}.data_ptr()" for role, t in enumerate(there)],
        f"if ({' | '.join(f'a{role}' for role in range(len(there)))}) & 15: return None",
    ]
    for role, made in enumerate(roles.made, len(there)):
        there.append(f"m{role}")
        text.lines += [f"m{role} = {text.make(made)}", f"a{role} = m{role}.data_ptr()"]
    text.lines.append(f"stream = {text.name(binary.current_stream)}({binary.device})")
    text.lines += [text.launch(step) for step in steps]
    text.lines.append(f"return ({''.join('None, ' if r is None else there[r] + ', ' for r in returned)})")
    exec("def repeat(tensors):\n    " + "\n    ".join(text.lines), text.values)
    return text.values["repeat"]


# What compiled graphs allocate with: past the dispatcher, a third of the time of `torch.empty_strided`.
_fast = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)


class _Roles:
    """Which tensor of a call an argument of a launch is, or which part of one that the call allocated."""

    def __init__(
        self, tensors: Sequence[Tensor | None], allocated: list[Tensor], results: Sequence[Tensor | None],
        provided: list[tuple[Tensor, Callable[[], Tensor]]],
    ) -> None:  # fmt: skip
        self.whole: dict[int, int] = {}  # by id
        self.same: list[tuple[int, int]] = []
        self.made: list[Fresh | Callable[[], Tensor]] = []  # what each call needs; what was `provided`
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
            self.made.append(Fresh(tuple(x.shape), x.stride(), x.dtype, x.device))
            role += 1
        size = 0
        for address, x in storages.items():
            self.parts[address] = role, size
            size += -(-x.untyped_storage().nbytes() // _LINE) * _LINE
        if size:
            self.made.append(Fresh((size,), (1,), torch.uint8, allocated[0].device))
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
