"""The direct launcher's rules, without a GPU: types, alignment, hooks, the way back to the JIT's own launch."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from flash_attn.utils import launcher  # noqa: E402

compiled_only = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")


class Kernel:
    """Stands for a JITFunction: records how it is launched."""

    __name__ = "kernel"

    def __init__(self, *names):
        self.arg_names, self.calls = list(names), []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


def describe(aligned=True, **args):
    signature, all_aligned = launcher.describe(Kernel(*args), tuple(args.values()))
    assert all_aligned == aligned
    return signature


def test_types_follow_the_rules():
    x = torch.zeros(4, dtype=torch.bfloat16)
    assert describe(a=x, a_strides=(1, 2), n=3, s=0.5, none=None, t=(torch.zeros(1), None, 7)) == (
        "*bf16", ("i64", "i64"), "i32", "fp32", "constexpr", ("*fp32", "constexpr", "i32"),
    )  # fmt: skip


def test_value_one_and_multiples_of_16_are_ordinary():
    assert describe(n=1, m=16, a_strides=(1, 16)) == describe(n=7, m=5, a_strides=(3, 9))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_an_int_that_does_not_fit_raises(value):
    with pytest.raises(OverflowError, match="32-bit"):
        describe(n=value)
    assert describe(n_strides=(value,)) == (("i64",),)


def test_other_kinds_raise():
    with pytest.raises(TypeError, match="got str"):
        describe(n="x")
    with pytest.raises(TypeError, match="got bool"):
        describe(n=True)


@pytest.mark.parametrize(
    "offset, row, aligned", [(0, 64, True), (8, 64, True), (4, 64, False), (0, 36, False)]
)
def test_alignment_is_of_starts_and_rows(offset, row, aligned):
    x = torch.zeros(4096, dtype=torch.float16)
    assert x.data_ptr() % 16 == 0
    describe(aligned, x=x[offset:], x_strides=(1024, row, 128))


def test_vectors_do_not_count_for_alignment():
    lse = torch.zeros(64)
    describe(True, lse=lse[1:], lse_strides=(33, 3))


def test_empty_grid_launches_nothing():
    kernel = Kernel("a")
    launcher.launch(kernel, (0, 1, 1), (1,), {})
    assert kernel.calls == []


def test_what_is_no_known_jit_function_launches_the_usual_way():
    kernel = Kernel("a", "B")
    launcher.launch(kernel, (2, 1, 1), (5,), {"B": 16}, num_warps=8, num_stages=3)
    assert kernel.calls == [((2, 1, 1), (5,), {"B": 16, "num_warps": 8, "num_stages": 3})]


@compiled_only
def test_an_unknown_triton_launches_the_usual_way(monkeypatch):
    from flash_attn.forward.kernel import attn_fwd

    assert launcher.direct(attn_fwd)
    monkeypatch.setattr(launcher, "KNOWN", False)
    assert not launcher.direct(attn_fwd)


def test_launch_hooks_see_every_launch(monkeypatch):
    """A profiler (proton) installs hooks; the direct launch must not go past them."""
    calls = []

    class Compiled:
        def launch_metadata(self, grid, stream, *args):
            return {"stream": stream, "args": args}

    def run(*args):
        calls.append(args)

    binary = launcher.Binary(Compiled(), run, 11, "packed", 0, lambda device: 99, lambda: 0)
    binary.launch((4, 1, 1), ("a", "b"))
    assert calls == [(4, 1, 1, 99, 11, "packed", None, None, None, "a", "b")]
    runtime = triton.knobs.runtime
    hook = print
    runtime.launch_enter_hook.add(hook)
    try:
        binary.launch((4, 1, 1), ("a", "b"))
    finally:
        runtime.launch_enter_hook.remove(hook)
    about, enter, leave = calls[1][6:9]
    assert about == {"stream": 99, "args": ("a", "b")}
    assert enter is runtime.launch_enter_hook and leave is runtime.launch_exit_hook


class Box:
    def __init__(self, base, shape, strides):
        self.base, self.shape, self.strides, self.padding = base, shape, strides, "zero"


@compiled_only
def test_shortcut_gives_the_compiled_launcher_what_triton_gives_it(monkeypatch):
    """Triton's own wrapper, round a launcher that records; descriptors are encoded once for an address and shape."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip("the shortcut is for Triton 3.6")
    from triton.backends.nvidia import driver

    encodings = []

    class Utils:
        def fill_tma_descriptor(self, *args):
            encodings.append(args)
            return ("descriptor", *args[:1])

    monkeypatch.setattr(type(triton.runtime.driver), "active", type("Active", (), {"utils": Utils()})())
    meta = dict(swizzle=1, elem_size=2, elem_type=9, block_size=[8, 8], fp4_padded=False)
    signature = {
        0: "*fp32",
        1: "tensordesc<bf16[8, 8]>",
        2: ("i32", "i64"),
        3: "tensordesc<bf16[8, 8]>",
        4: "constexpr",
    }
    calls = []

    class CudaLauncher:
        """What of Triton's class is read."""

        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = False, True
        launch = staticmethod(
            driver.wrap_handle_tensordesc(lambda *args: calls.append(args), signature, [meta, meta])
        )

        def __call__(self, gx, gy, gz, stream, function, *args):
            self.launch(gx, gy, gz, stream, function, False, True, None, None, *args)

    run = CudaLauncher()
    x, y = torch.zeros(64), torch.zeros(64)
    one, two = Box(x, [4, 16], [16, 1]), Box(y, [2, 16], [32, 1])
    for first, second in ((one, two), (two, one), (one, two)):
        args = (x, first, (3, 4), second, 128)
        short = launcher.Binary(
            None, run, 11, "packed", 0, lambda device: 99, lambda: 0, launcher.shortcut(run)
        )
        assert short.short is not None
        for binary in (short, short._replace(short=None)):
            binary.launch((4, 1, 1), args)
        assert calls[-1] == calls[-2] and len(calls[-1]) == 13 + 1 + 5 + 1 + 5 + 1
    encodings.clear()
    for _ in range(3):
        short.launch((4, 1, 1), args)
    assert encodings == [], "an equal descriptor is not encoded again"
    short.launch((4, 1, 1), (x, one, (3, 4), Box(x[16:], [2, 16], [32, 1]), 128))
    assert len(encodings) == 1 and encodings[0][0] == x.data_ptr() + 64
    CudaLauncher.global_scratch_size = 8
    assert launcher.shortcut(run) is None
