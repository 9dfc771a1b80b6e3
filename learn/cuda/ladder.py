"""The CUDA ladder from Python: build a step, load it with ctypes, call it on torch tensors.

No torch extension is built: a step is a shared library that takes raw pointers (the C interface is in common.cuh), from
nvcc, or from the host's C++ compiler for the emulator, which runs the same source on CPU tensors.
"""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
POINTERS = ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "delta", "stream")
INTEGERS = ("batch", "heads", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class FlashArgs(ctypes.Structure):
    """struct FlashArgs of common.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_longlong) for name in ("seed", "offset")]
        + [("dropout_p", ctypes.c_double)]
        + [(name, ctypes.c_int) for name in INTEGERS]
        + [("scale", ctypes.c_float)]
    )


def steps() -> list[str]:
    """Names of all steps, in order: flash_attn_minimal, step_02_..., ..."""
    return ["flash_attn_minimal", *sorted(path.stem for path in HERE.glob("step_*.cu"))]


def first_line(step: str) -> str:
    with open(HERE / f"{step}.cu", encoding="utf-8") as file:
        return file.readline().removeprefix("//").strip()


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@cache
def gpu_arch() -> str:
    """The GPU of this machine like "sm_90"; sm_80 without one: that code runs on every newer GPU too."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        words = subprocess.run(query, capture_output=True, text=True).stdout.split()
        if words:
            return "sm_" + words[0].replace(".", "")
    return "sm_80"


def compile_command(step: str, target: Path, head_dim: int, arch: str | None, *more: str) -> list[str]:
    """The command that builds a step for a GPU (arch like "sm_90") or a CPU (None)."""
    common = [
        f"-DHEAD_DIM={head_dim}",
        "-std=c++17",
        "-shared",
        *more,
        str(HERE / f"{step}.cu"),
        "-o",
        str(target),
    ]
    if arch:
        return [find_nvcc() or "nvcc", "-O3", f"-arch={arch}", "-Xcompiler", "-fPIC", *common]
    flags = ["-O1", "-fPIC", "-fno-strict-aliasing", "-DFLASH_EMULATE", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-Wl,-z,defs"]
    return [os.environ.get("CXX", "g++"), *flags, "-x", "c++", *common]


def build(step: str, head_dim: int = 64, arch: str | None = None, folder: Path = HERE / "build") -> Path:
    """Compiles a step for `arch`, or for the emulator (None), unless it is newer than the sources; its path."""
    target = folder / (arch or "cpu") / str(head_dim) / f"{step}.so"
    sources = [HERE / f"{step}.cu", *HERE.glob("*.cuh"), HERE / "emulator.h"]
    if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run(compile_command(step, part, head_dim, arch), check=True)
        part.replace(target)
    return target


@cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("flash_idea", "flash_forward", "flash_backward"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _arguments(q, k, v, out, lse, scale, causal, dropout_p, rng, **more: Tensor) -> FlashArgs:
    for name, tensor in {"q": q, "k": k, "v": v, **more}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous (batch, seqlen, heads, head_dim)")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q, k, v must agree in all but seqlen, got {q.shape}, {k.shape}, {v.shape}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"q, k, v must have one of {list(DTYPES)}, got {q.dtype}, {k.dtype}, {v.dtype}")
    b, m, h, d = q.shape
    pointers = {"q": q, "k": k, "v": v, "out": out, "lse": lse, **more}
    return FlashArgs(
        **{name: tensor.data_ptr() for name, tensor in pointers.items()},
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0,
        seed=rng[0], offset=rng[1], batch=b, heads=h, seqlen_q=m, seqlen_k=k.shape[1], head_dim=d,
        dtype=DTYPES[q.dtype], causal=causal, scale=d**-0.5 if scale is None else scale, dropout_p=dropout_p,
    )  # fmt: skip


def _run(function, arguments: FlashArgs) -> None:
    message = function(ctypes.byref(arguments))
    if message is not None:
        raise RuntimeError(message.decode())


def forward(library, q, k, v, scale=None, causal=False, dropout_p=0.0, rng=(0, 0)) -> tuple[Tensor, Tensor]:
    """(out, lse) of one step; q (B, M, H, D), k and v (B, N, H, D), rng = (seed, offset) of the dropout mask."""
    out = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=q.device)
    _run(library.flash_forward, _arguments(q, k, v, out, lse, scale, causal, dropout_p, rng))
    return out, lse


def backward(
    library, q, k, v, out, lse, dout, scale=None, causal=False, dropout_p=0.0, rng=(0, 0)
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one step."""
    grads = {f"d{name}": torch.full_like(x, float("nan")) for name, x in (("q", q), ("k", k), ("v", v))}
    delta = torch.full_like(lse, float("nan"))
    more = {"dout": dout, "delta": delta, **grads}
    _run(library.flash_backward, _arguments(q, k, v, out, lse, scale, causal, dropout_p, rng, **more))
    return grads["dq"], grads["dk"], grads["dv"]
