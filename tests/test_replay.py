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
    block_shape: tuple = ()


def _plain(x):
    """Tensors as their addresses."""
    if type(x) is tuple:
        return tuple(_plain(y) for y in x)
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


class Machine:
    """A compiled launcher that notes what it is given, and descriptors that say what they were made of."""

    def __init__(self, boxes=(), short=True, signature=()):
        self.launched, self.encoded, self.device = [], 0, 0
        about = tuple((i, "about") for i in boxes)
        way = launcher.Shortcut(self.launch, (False, True, None, None), about, self.encode, {})
        self.binary = launcher.Binary(
            None,
            self.launch,
            11,
            "packed",
            0,
            lambda device: 99,
            lambda: self.device,
            way if short else None,
            signature,
        )

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


def run(key, tensors, call):
    """("again" or "launched", the results), as `attention._run` does it."""
    found = replay.find(key)
    results = None if found is None else found.repeat(tensors)
    if results is not None:
        return "again", results
    return "launched", replay.record(key, tensors, call)


def call(machine, key, x, y, lengths=None, between=None):
    """As a backend's: a result and a workspace are allocated, and parts of the latter used."""

    def launches():
        out = torch.empty(4, 2)
        work = torch.empty(80)
        first, second = work.split((64, 16))
        machine.binary.launch((4, 1, 1), (x, Box(y, [2, 8], [8, 1]), (lengths, None, second), 0.5, first))
        if between is not None:
            between(first)
        machine.binary.launch((2, 1, 1), (torch.empty(3), Box(second, [8], [1]), (3,), 1, out))
        return out, None, x

    return run(key, (x, y, lengths), launches)


def test_the_third_call_repeats_the_launches_at_its_own_addresses():
    machine, lengths = Machine([1]), aligned(4)
    for i in range(5):
        x, y = aligned(4, 8), aligned(4, 8)
        how, (out, nothing, given) = call(machine, "key", x, y, lengths)
        assert how == ("launched" if i < 2 else "again")
        assert nothing is None and given is x
        assert (out.shape, out.stride(), out.dtype) == ((4, 2), (2, 1), torch.float32)
        first, second = machine.launched[-2:]
        x, y, lengths_at = x.data_ptr(), y.data_ptr(), lengths.data_ptr()
        work, other = first[-1], second[13]
        fixed = [99, 11, False, True, None, None, "packed", None, None, None]
        about = ("descriptor", y, "about")
        assert first == [4, 1, 1, *fixed, x, about, 2, 8, 8, 1, (lengths_at, None, work + 256), 0.5, work]
        box = ("descriptor", work + 256, "about")
        assert second == [2, 1, 1, *fixed, other, box, 8, 1, (3,), 1, out.data_ptr()]
        assert len({x, y, lengths_at, work, other, out.data_ptr(), 0}) == 7
        assert not work <= other < work + 320


def test_results_are_not_shared_between_calls():
    machine, x, y = Machine([1]), aligned(4, 8), aligned(4, 8)
    outs = [call(machine, "key", x, y)[1][0] for _ in range(5)]
    assert len({out.data_ptr() for out in outs}) == 5


def test_a_descriptor_is_encoded_once_for_an_address():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)

    def launches():
        machine.binary.launch((1, 1, 1), (x, Box(y, [2, 8], [8, 1])))
        return ()

    for _ in range(3):
        run("key", (x, y), launches)
    before = machine.encoded
    for _ in range(3):
        assert run("key", (x, y), launches)[0] == "again"
    assert machine.encoded == before
    x, y = x, aligned(4, 8)
    assert run("key", (x, y), launches)[0] == "again" and machine.encoded == before + 1


def test_recordings_are_dropped_when_they_hold_too_many_descriptors(monkeypatch):
    machine, x = Machine([1]), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, aligned(4, 8))
    monkeypatch.setattr(replay, "MOST_ENCODED", replay._encoded + 4)
    memory = aligned(64 * 32)
    for i in range(64):
        y = memory[32 * i :][:32].view(4, 8)
        call(machine, "key", x, y)
        assert machine.launched[-2][14] == ("descriptor", y.data_ptr(), "about")
        held = [
            len(d.encoded)
            for launches in replay._kept.values()
            for s in launches.steps
            for d in s.descriptors
        ]
        assert sum(held) <= replay.MOST_ENCODED


def one(machine, key, *args):
    """A call that launches `args` and gives nothing back."""
    tensors = [x[0] if isinstance(x, tuple) else x for x in args]

    def launches():
        machine.binary.launch((1, 1, 1), args)
        return ()

    return run(key, tensors, launches)[0]


def test_one_tensor_in_two_roles_is_not_two_tensors():
    """Recorded with one cu_seqlens for queries and keys, the recording cannot tell them apart."""
    machine = Machine()
    x, y = aligned(4), aligned(4)
    assert [one(machine, "key", x, x) for _ in range(3)] == ["launched", "launched", "again"]
    assert one(machine, "key", x, y) == "launched"
    assert machine.launched[-1][-2:] == [x.data_ptr(), y.data_ptr()]
    assert one(machine, "key", y, y) == "again" and machine.launched[-1][-2:] == [y.data_ptr(), y.data_ptr()]


def test_two_tensors_that_are_one_now_are_launched_at_its_address_twice():
    machine = Machine()
    x, y = aligned(4), aligned(4)
    assert [one(machine, "key", x, y) for _ in range(3)] == ["launched", "launched", "again"]
    assert one(machine, "key", y, y) == "again" and machine.launched[-1][-2:] == [y.data_ptr(), y.data_ptr()]


def test_another_key_is_another_call():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    assert call(machine, "other", x, y)[0] == "launched"


def test_a_tensor_more_or_less_than_recorded_is_another_call():
    machine, x, y = Machine([1]), aligned(4, 8), aligned(4, 8)
    assert [call(machine, "key", x, y)[0] for _ in range(3)] == ["launched", "launched", "again"]
    assert call(machine, "key", x, y, aligned(4))[0] == "launched"
    assert call(machine, "key", x, y)[0] == "again"


def test_a_torch_operator_between_launches_is_never_left_out():
    machine = Machine([1])
    x, y, zeroed = aligned(4, 8), aligned(4, 8), []
    for _ in range(5):
        assert call(machine, "key", x, y, between=lambda w: zeroed.append(w.zero_()))[0] == "launched"
    assert len(zeroed) == 5


def test_a_tensor_of_unknown_origin_is_never_kept():
    machine, x, other = Machine(), aligned(4, 8), aligned(4)

    def launches(*args):
        def launch():
            machine.binary.launch((1, 1, 1), args)
            return ()

        return launch

    for _ in range(4):
        assert run("other", (x,), launches(x, other))[0] == "launched"
        assert run("view", (x,), launches(x[0]))[0] == "launched"
        assert run("nested", (x,), launches(x, ((x, 1), 2)))[0] == "launched"


def test_a_result_of_unknown_origin_is_never_kept():
    machine, x, other = Machine(), aligned(4, 8), aligned(4)

    def launches(result):
        def launch():
            machine.binary.launch((1, 1, 1), (x,))
            return (result(),)

        return launch

    for _ in range(4):
        assert run("other", (x,), launches(lambda: other))[0] == "launched"
        assert run("part", (x,), launches(lambda: torch.empty(8)[:4]))[0] == "launched"


def test_an_address_that_is_not_a_tensors_is_never_kept():
    """A backend that launches on x.data_ptr() would else be repeated on the memory of the recorded call."""
    machine, x = Machine(signature=("*fp32", ("*i32", "i64"), "i32")), aligned(4)

    def launches(*args):
        def launch():
            machine.binary.launch((1, 1, 1), args)
            return ()

        return launch

    for i in range(4):
        assert run("bare", (x,), launches(x.data_ptr(), (x, 5), 7))[0] == "launched"
        assert run("nested", (x,), launches(x, (x.data_ptr(), 5), 7))[0] == "launched"
        assert run("tensors", (x,), launches(x, (x, 5), 7))[0] == ("launched" if i < 2 else "again")
        assert run("none", (x,), launches(x, (None, 5), 7))[0] == ("launched" if i < 2 else "again")


def test_what_outlives_a_call_is_asked_for_again():
    machine, x = Machine(), aligned(8)
    counters = [torch.zeros(64)[i:] for i in range(2, 7)]
    asked = []

    def counter(name):
        asked.append(name)
        torch.ones(2).add_(1)  # no part of the call
        return counters[len(asked) - 1]

    def launches():
        machine.binary.launch((1, 1, 1), (x, replay.provided(counter, "name")))
        return ()

    assert [run("key", (x,), launches)[0] for _ in range(5)] == ["launched"] * 2 + ["again"] * 3
    assert asked == ["name"] * 5
    assert [args[-1] for args in machine.launched] == [c.data_ptr() for c in counters]


def test_equal_calls_at_every_alignment_launch_at_their_own_addresses():
    """A launch is repeated only where 16-byte accesses are allowed, whatever an address is a multiple of."""
    machine = Machine([1])
    for _ in range(3):
        call(machine, "key", aligned(4, 8), aligned(4, 8))
    memory = aligned(256)
    for shift in (*range(12), 0, 1, 4):
        for x, y in ((memory[shift:][:32], memory[64:96]), (memory[64:96], memory[shift:][:32])):
            x, y = x.view(4, 8), y.view(4, 8)
            assert call(machine, "key", x, y)[0] == ("launched" if shift % 4 else "again")
            first = machine.launched[-2]
            assert first[13] == x.data_ptr() and first[14] == ("descriptor", y.data_ptr(), "about")


def test_a_call_first_seen_unaligned_is_recorded_when_it_is_aligned():
    machine, memory = Machine([1]), aligned(64)
    x, y = memory[1:33].view(4, 8), aligned(4, 8)
    assert [call(machine, "key", x, y)[0] for _ in range(4)] == ["launched"] * 4
    x = memory[:32].view(4, 8)
    assert [call(machine, "key", x, y)[0] for _ in range(3)] == ["launched", "again", "again"]


def test_profilers_see_every_launch():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(print)
    try:
        assert replay.find("key").repeat((x, y, None)) is None
    finally:
        runtime.launch_enter_hook.remove(print)
    assert call(machine, "key", x, y)[0] == "again"


def test_on_another_device_a_call_is_launched_as_usual():
    machine = Machine([1])
    x, y = aligned(4, 8), aligned(4, 8)
    for _ in range(3):
        call(machine, "key", x, y)
    machine.device = 1
    assert call(machine, "key", x, y)[0] == "launched"
    machine.device = 0
    assert call(machine, "key", x, y)[0] == "again"


def test_without_a_shortcut_tritons_own_launcher_is_called():
    """Triton from 3.7 on, and every launcher that is not CUDA's."""
    machine = Machine(short=False)
    for i in range(4):
        x, y = aligned(8), aligned(8)
        assert one(machine, "key", x, (y, 3), Box(x, [8], [1])) == ("launched" if i < 2 else "again")
        *before, at_x, tuple_y, box = machine.launched[-1]
        assert before == [1, 1, 1, 99, 11, "packed", None, None, None]
        assert (at_x, tuple_y, box.base.data_ptr()) == (x.data_ptr(), (y.data_ptr(), 3), x.data_ptr())


def test_a_kernel_launched_by_triton_itself_is_never_kept():
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    x = aligned(4)

    def launches():
        launcher.launch(Kernel(), (1, 1, 1), (x,), {})
        return ()

    assert [run("key", (x,), launches)[0] for _ in range(4)] == ["launched"] * 4


def test_an_error_keeps_nothing():
    x = aligned(4)

    def fails():
        raise RuntimeError

    for _ in range(3):
        with pytest.raises(RuntimeError):
            run("key", (x,), fails)
    assert replay.recording.get() is None and replay.find("key") is None
