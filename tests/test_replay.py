"""Recorded launches, without a GPU: equal arguments at other addresses, and what is never recorded."""

import os
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
from flash_attn.utils import launcher, replay  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")


class Box(NamedTuple):
    base: Any
    shape: list
    strides: list
    padding: str = "zero"


def _plain(x):
    """Tensors as their addresses."""
    if type(x) is tuple:
        return tuple(_plain(y) for y in x)
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


class Machine:
    """A compiled launcher that notes what it is given, and descriptors that say what they were made of."""

    def __init__(self, boxes=()):
        self.launched, self.encoded = [], 0
        about = tuple((i, "about") for i in boxes)
        short = launcher.Shortcut(self.launch, (False, True, None, None), about, self.encode, {})
        self.binary = launcher.Binary(None, None, 11, "packed", 0, lambda device: 99, short)

    def launch(self, *args):
        self.launched.append([_plain(x) for x in args])

    def encode(self, box, about):
        self.encoded += 1
        return [("descriptor", box.base.data_ptr(), about), *box.shape, *box.strides]


@pytest.fixture(autouse=True)
def _fresh():
    replay.forget()
    yield
    replay.forget()


def aligned(*shape):
    x = torch.zeros(*shape)
    assert x.data_ptr() % 16 == 0
    return x


def call(machine, key, x, y, lengths=None, between=None):
    """As a backend's: repeat, or launch and record. The workspace is allocated in both cases."""
    work = torch.empty(16)
    tensors = (x, y, lengths, work)
    if replay.again(key, tensors):
        return "again"
    with replay.record(key, tensors):
        machine.binary.launch((4, 1, 1), (x, Box(y, [2, 8], [8, 1]), (lengths, None, 7), 0.5, work))
        if between is not None:
            between(work)
        machine.binary.launch((2, 1, 1), (work, Box(x, [8], [1]), (3,), 1, y))
    return "launched"


def test_the_third_call_repeats_the_launches_at_its_own_addresses():
    machine, lengths = Machine([1]), aligned(4)
    for i in range(5):
        x, y = aligned(4, 8), aligned(4, 8)
        assert call(machine, "key", x, y, lengths) == ("launched" if i < 2 else "again")
        first, second = machine.launched[-2:]
        x, y, lengths_at = x.data_ptr(), y.data_ptr(), lengths.data_ptr()
        work = first[-1]
        fixed = [99, 11, False, True, None, None, "packed", None, None, None]
        about = ("descriptor", y, "about")
        assert first == [4, 1, 1, *fixed, x, about, 2, 8, 8, 1, (lengths_at, None, 7), 0.5, work]
        assert second == [2, 1, 1, *fixed, work, ("descriptor", x, "about"), 8, 1, (3,), 1, y]
        assert work not in (x, y, lengths_at, 0)


def test_a_descriptor_is_encoded_once_for_an_address():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    before = machine.encoded
    for _ in range(3):
        assert call(machine, "key", x, y) == "again"
    assert machine.encoded == before
    call(machine, "key", aligned(4, 8), y)
    assert machine.encoded == before + 1


def test_one_tensor_in_two_roles_is_not_two_tensors():
    """Recorded with one cu_seqlens for queries and keys, the recording cannot tell them apart."""
    machine = Machine()
    x, y = aligned(4), aligned(4)

    def two(a, b):
        if replay.again("key", (a, b)):
            return "again"
        with replay.record("key", (a, b)):
            machine.binary.launch((1, 1, 1), (a, b))
        return "launched"

    assert [two(x, x) for _ in range(3)] == ["launched", "launched", "again"]
    assert two(x, y) == "launched" and machine.launched[-1][-2:] == [x.data_ptr(), y.data_ptr()]
    assert two(y, y) == "again" and machine.launched[-1][-2:] == [y.data_ptr(), y.data_ptr()]


def test_another_key_is_another_call():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    assert call(machine, "other", x, y) == "launched"


def test_a_torch_operator_between_launches_is_never_left_out():
    machine = Machine([1])
    x, y, zeroed = aligned(4, 8), aligned(4, 8), []
    for _ in range(5):
        assert call(machine, "key", x, y, between=lambda w: zeroed.append(w.zero_())) == "launched"
    assert len(zeroed) == 5


def test_a_tensor_that_was_not_named_is_never_kept():
    machine = Machine()
    x = aligned(4, 8)
    for _ in range(4):
        tensors = (x,)
        assert not replay.again("key", tensors)
        with replay.record("key", tensors):
            machine.binary.launch((1, 1, 1), (x, torch.empty(8)))
        assert not replay.again("nested", tensors)
        with replay.record("nested", tensors):
            machine.binary.launch((1, 1, 1), (x, ((x, 1), 2)))


def test_unaligned_tensors_and_profilers_launch_the_usual_way():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    assert call(machine, "key", torch.zeros(40)[1:33].view(4, 8), y) == "launched"
    assert call(machine, "key", x, y) == "again"
    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(print)
    try:
        assert not replay.again("key", (x, y, None, aligned(16)))
    finally:
        runtime.launch_enter_hook.remove(print)


def test_a_kernel_launched_by_triton_itself_is_never_kept():
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    x = aligned(4)
    for _ in range(3):
        assert not replay.again("key", (x,))
        with replay.record("key", (x,)):
            launcher.launch(Kernel(), (1, 1, 1), (x,), {})
    assert not replay.again("key", (x,))


def test_an_error_keeps_nothing():
    x = aligned(4)
    for _ in range(3):
        with pytest.raises(RuntimeError), replay.record("key", (x,)):
            raise RuntimeError
    assert launcher.recording.get() is None and not replay.again("key", (x,))
