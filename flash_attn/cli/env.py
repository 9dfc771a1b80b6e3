"""`flash-attn env`: versions, GPU and what is missing, ready to paste into a bug report."""

import importlib
import importlib.metadata
import os
import platform
import sys

import torch
import typer

import flash_attn
from flash_attn import dispatch
from flash_attn.utils import device as devices

OPTIONAL = ("triton", "numpy", "typer", "rich", "matplotlib", "transformers", "flag_gems")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, str]:
    """Everything a bug report needs, as printable lines."""
    found = {
        "flash-attn": f"{version('flash-attn') or 'a checkout, not installed'} (module {flash_attn.__version__})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
    }
    found |= {name: version(name) or "missing" for name in OPTIONAL}
    gpu = devices.info()
    if gpu is None:
        found["gpu"] = "none that torch can use"
    else:
        major, minor = gpu.capability
        found["gpu"] = (
            f"{gpu.name}, sm_{major}{minor}, {gpu.multiprocessors} multiprocessors, "
            f"{gpu.shared_memory // 1024} KiB shared memory a program"
        )
    found["cpu"] = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}"
    )
    found |= {name: os.environ.get(name, "not set") for name in ("FLASH_ATTN_BACKEND", "FLASH_ATTN_CHECK")}
    return found


def missing() -> list[str]:
    """What would make more of the package work here, one sentence each."""
    notes = []
    if version("triton") is None:
        notes.append("triton is missing: GPU kernels cannot run (torch's CUDA builds for Linux bring it)")
    if devices.info() is None:
        notes.append("no GPU: attention runs on the CPU backend")
    elif devices.info().capability < (7, 5) and not devices.info().hip:  # type: ignore[union-attr]
        notes.append("this GPU is older than sm_75: no GPU kernel supports it")
    for name in dispatch.BACKENDS | dispatch.FORCED_ONLY:
        try:
            dispatch.load(name)
        except ImportError as error:
            notes.append(f"backend {name} cannot be loaded: {error}")
    return notes


def register(app: typer.Typer) -> None:
    @app.command()
    def env() -> None:
        """Versions, GPU and what is missing: paste this into a bug report."""
        found = collect()
        width = max(map(len, found))
        for name, value in found.items():
            typer.echo(f"{name:<{width}}  {value}")
        for note in missing():
            typer.echo(f"{'note':<{width}}  {note}")
