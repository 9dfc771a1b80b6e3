"""From a Triton kernel and its arguments to a launch, without the JIT's own argument binding.

`kernel[grid](...)` spends most of its time (19 us on an H200 machine) on finding out which compiled kernel
it wants. Here that question is answered by rules of our own, so that a new length never compiles anything:

* a tensor is a pointer to its dtype, a float is fp32, an int is i32, None is a constant;
* the ints of a parameter named `*_strides` are i64, in elements, without the last dimension's (which is 1);
* nothing is specialised on its value, except one switch: when every tile (a tensor parameter `x` that has an
  `x_strides` of at least three entries) starts at a multiple of 16 bytes and so do all its rows, the kernel is
  compiled for 16-byte accesses;
* everything passed by keyword in `constants` is a constexpr. Arguments may be tuples of these.

Under TRITON_INTERPRET=1, and on a Triton whose launch protocol is not known here, `launch` is `kernel[grid]`.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from flash_attn.errors import FlashAttnError, UnsupportedError
from flash_attn.utils import replay

# CompiledKernel.run(grid..., stream, function, packed_metadata, launch_metadata, hooks, *args) is read in the
# source of 3.6 to 3.9.
KNOWN_TRITON = ((3, 6), (3, 9))
KNOWN = KNOWN_TRITON[0] <= tuple(int(x) for x in triton.__version__.split(".")[:2]) <= KNOWN_TRITON[1]

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip

_cache: dict[Any, "Binary"] = {}
_lock = threading.Lock()
_compilations = 0


class KernelError(FlashAttnError):
    """A kernel of ours did not compile; the message names the kernel and the problem."""


class SharedMemoryError(UnsupportedError):
    """A compiled kernel wants more shared memory, registers or tensor memory than the device has."""


class Shortcut(NamedTuple):
    """The way to Triton's compiled launcher past the Python around it, which costs more than the launch itself.

    Triton encodes every TMA descriptor anew at every launch. A descriptor is a value made of an address, a shape and
    strides, and training meets the same ones again and again: here those of earlier launches are kept.
    """

    launch: Callable[..., None]
    before: tuple  # arguments between the function and the kernel's packed metadata
    boxes: tuple[tuple[int, Any], ...]  # (position among the arguments, what Triton knows) of each descriptor
    encode: Callable[[Any, Any], list]  # a descriptor as arguments of the compiled launcher
    encoded: dict[tuple, list]

    def flat(self, args: tuple) -> list:
        """args with each descriptor replaced by what the compiled launcher takes."""
        result: list = []
        begin = 0
        for i, about in self.boxes:
            box = args[i]
            key = (i, box.base.data_ptr(), *box.shape, *box.strides)
            found = self.encoded.get(key)
            if found is None:
                if len(self.encoded) >= MOST_DESCRIPTORS:
                    self.encoded.clear()
                found = self.encoded[key] = self.encode(box, about)
            result += args[begin:i]
            result += found
            begin = i + 1
        result += args[begin:]
        return result


MOST_DESCRIPTORS = 1024  # of one kernel


def shortcut(run: Any) -> Shortcut | None:
    """The shortcut for `run` (CompiledKernel.run), or None where Triton's launcher is not the one of 3.6."""
    if not triton.__version__.startswith("3.6.") or type(run).__name__ != "CudaLauncher":
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # needs memory at each launch
    from triton.backends.nvidia.driver import make_tensordesc_arg

    before, launch = (run.launch_cooperative_grid, run.launch_pdl, None, None), run.launch
    inner = getattr(launch, "__closure__", None)
    if inner is None:  # no descriptors: Triton has not wrapped it
        return Shortcut(launch, before, (), make_tensordesc_arg, {})
    parts = dict(zip(launch.__code__.co_freevars, (cell.cell_contents for cell in inner), strict=True))
    if set(parts) != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return None
    boxes = tuple(zip(sorted(parts["tensordesc_indices"]), parts["tensordesc_meta"], strict=True))
    return Shortcut(parts["launcher"], before, boxes, make_tensordesc_arg, {})


class Binary(NamedTuple):
    """A compiled kernel, loaded on one device."""

    kernel: Any  # triton.compiler.CompiledKernel
    run: Any
    function: int
    packed: Any
    device: int
    current_stream: Callable[[int], int]
    current_device: Callable[[], int]
    short: Shortcut | None = None
    signature: tuple = ()  # type of each run-time argument, as of `describe`

    def template(
        self, grid: tuple[int, int, int]
    ) -> tuple[Callable[..., None], list, Callable[[int, Any], Any]]:
        """What a repeated launch calls; what stands before the kernel's arguments, None for the stream; and what
        makes argument i, a descriptor, of its description."""
        short = self.short
        if short is None:
            return self.run, [*grid, None, self.function, self.packed, None, None, None], lambda i, box: box
        about = dict(short.boxes)
        before = [*grid, None, self.function, *short.before, self.packed, None, None, None]
        return short.launch, before, lambda i, box: short.encode(box, about[i])[0]

    def behind_descriptor(self, box: Any) -> list:
        """What the compiled launcher takes behind a descriptor."""
        return [] if self.short is None else [*box.shape, *box.strides]

    def launch(self, grid: tuple[int, int, int], args: tuple) -> None:
        """Launch on the current stream of its device, which must be current.

        `args` are the run-time arguments and then the constants, in the kernel's order; a tensor may be given as its
        address, which saves the driver a call.
        """
        collected = replay.recording.get()
        if collected is not None:
            collected.calls.append((self, grid, args))
        stream = self.current_stream(self.device)
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            about = self.kernel.launch_metadata(grid, stream, *args)
            self.run(*grid, stream, self.function, self.packed, about, enter, leave, *args)
        elif self.short is not None:
            short = self.short
            rest = short.flat(args) if short.boxes else args
            short.launch(*grid, stream, self.function, *short.before, self.packed, None, None, None, *rest)
        else:
            self.run(*grid, stream, self.function, self.packed, None, None, None, *args)


def compilations() -> int:
    """How many kernels this process has compiled or loaded from disk; a new length must not add one."""
    return _compilations


def direct(kernel) -> bool:
    """Whether `kernel` can be prepared: not under the interpreter, nor on a Triton that is not known here."""
    return KNOWN and isinstance(kernel, JITFunction)


def launch(
    kernel, grid: tuple[int, int, int], args: tuple, constants: dict[str, Any], num_warps: int = 4,
    num_stages: int = 2, problem: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Launch `kernel` on the current device and stream: `args` are its run-time arguments in order.

    Raises:
        KernelError: it does not compile. SharedMemoryError: it does not fit the device.
    """
    if 0 in grid:
        return
    if not direct(kernel):
        collected = replay.recording.get()
        if collected is not None:
            collected.calls.append((None, grid, args))
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, **options)
        return
    binary = prepare(kernel, args, constants, num_warps, num_stages, problem, **options)
    binary.launch(grid, (*args, *constants.values()))


def prepare(
    kernel, args: tuple, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 2, problem: Any = None,
    **options: Any,
) -> Binary:  # fmt: skip
    """The compiled kernel for arguments of these kinds on the current device; compiles it at first."""
    global _compilations
    device = triton.runtime.driver.active.get_current_device()
    signature, aligned = describe(kernel, args)
    key = (
        kernel,
        device,
        signature,
        aligned,
        tuple(constants.values()),
        num_warps,
        num_stages,
        tuple(options.items()),
    )
    binary = _cache.get(key)
    if binary is None:
        with _lock:
            binary = _cache.get(key)
            if binary is None:
                compiled = build(kernel, args, constants, num_warps, num_stages, problem, **options)
                binary = _load(compiled, kernel, problem)._replace(signature=signature)
                _cache[key] = binary
                _compilations += 1
    return binary


def build(
    kernel, args: tuple, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 2, problem: Any = None,
    target: Any = None, **options: Any,
):  # fmt: skip
    """Compile for `target` (default: the current device); needs no GPU when one is given. Tensors may be on "meta"."""
    signature, aligned = describe(kernel, args)
    names = kernel.arg_names
    types = dict(zip(names, signature, strict=False)) | dict.fromkeys(constants, "constexpr")
    if tuple(types) != tuple(names):
        raise TypeError(f"{kernel.__name__} takes {names}, got {tuple(types)}")
    folded = {(len(args) + i,): value for i, value in enumerate(constants.values())}
    attrs: dict[tuple[int, ...], list] = {}
    tiles = {name for name, _ in _tiles(names, args)}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        _fold_none(value, (i,), folded)
        if aligned and name in tiles:
            attrs[(i,)] = [["tt.divisibility", 16]]
            at = names.index(f"{name}_strides")
            for d in range(len(args[at])):
                attrs[(at, d)] = [["tt.divisibility", 16 // value.element_size()]]
    source = _source_class(kernel)(kernel, types, folded, attrs)
    # the exp2 argument is one fused multiply-add; Triton 3.10 will not fuse unless told to
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True) | options
    try:
        return triton_compile(source, target=target, options=options)
    except Exception as error:  # Triton raises its own, LLVM's and ptxas' errors without a common base
        about = f" for {problem}" if problem is not None else ""
        raise KernelError(f"{kernel.__name__} does not compile{about} ({constants}): {error}") from error


def describe(kernel, args: tuple) -> tuple[tuple, bool]:
    """(type of each argument, nested as the arguments are; whether every tile is aligned to 16 bytes)."""
    names = kernel.arg_names
    signature = tuple(
        _type(value, "i64" if name.endswith("_strides") else "i32")
        for name, value in zip(names, args, strict=False)
    )
    aligned = all(
        t.data_ptr() % 16 == 0
        and all(s * t.element_size() % 16 == 0 for s in args[names.index(f"{name}_strides")])
        for name, t in _tiles(names, args)
    )
    return signature, aligned


def _tiles(names: list[str], args: tuple):
    """(name, tensor) of each tensor parameter that has `<name>_strides` of at least three entries."""
    by_name = dict(zip(names, args, strict=False))
    for name, value in by_name.items():
        if isinstance(value, torch.Tensor) and len(by_name.get(f"{name}_strides", ())) >= 3:
            yield name, value


def _type(value: Any, integer: str) -> Any:
    kind = type(value)
    if kind is int:
        if integer == "i32" and not -(2**31) <= value < 2**31:
            raise OverflowError(f"{value} does not fit the kernel's 32-bit integer")
        return integer
    if kind is tuple:
        return tuple(_type(x, integer) for x in value)
    if value is None:
        return "constexpr"
    if kind is float:
        return "fp32"
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if hasattr(value, "block_shape"):  # a host-side TensorDescriptor; Gluon's carries a layout
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
    raise TypeError(
        f"a kernel argument must be a tensor, int, float, None or a tuple of these, got {kind.__name__}"
    )


def _fold_none(value: Any, path: tuple[int, ...], folded: dict) -> None:
    if value is None:
        folded[path] = None
    elif type(value) is tuple:
        for i, x in enumerate(value):
            _fold_none(x, (*path, i), folded)


def _source_class(kernel):
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def _load(compiled, kernel, problem) -> Binary:
    try:
        run = compiled.run  # loads the module
    except OutOfResources as error:
        about = f" for {problem}" if problem is not None else ""
        raise SharedMemoryError(f"{kernel.__name__} does not fit this GPU{about}: {error}") from error
    driver = triton.runtime.driver.active
    return Binary(
        compiled,
        run,
        compiled.function,
        compiled.packed_metadata,
        driver.get_current_device(),
        driver.get_current_stream,
        current_device=getattr(torch._C, "_cuda_getDevice", driver.get_current_device),
        short=shortcut(run),
    )
