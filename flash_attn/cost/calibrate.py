"""Measure the machine at hand: matrix rate, memory rate, exp rate, launch cost; keep them in a user file.

What is measured is sustained, what the models are built on is the data sheet: a measured rate is divided by the share
of the data sheet that such a measurement reaches on a known machine.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flash_attn.cost.hardware import HARDWARE, SUSTAINED_BANDWIDTH, SUSTAINED_MATRIX, Hardware
from flash_attn.errors import ArgumentValueError
from flash_attn.utils import device as devices

SUSTAINED_EXP = 0.5  # torch.exp2 on a tensor in cache: half its instructions are loads and stores
MEASURED = ("matrix_flops", "bandwidth", "exps", "launch_s")


def user_file() -> Path:
    """Where the calibration of this machine lies: under XDG_CACHE_HOME, else ~/.cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_attn" / "calibration.json"
    )


def _seconds(call: Callable[[], object], device: str, repeats: int = 5, inner: int = 1) -> float:
    """Best time of `call` over `repeats`, each of `inner` calls."""

    def sync() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    best = float("inf")
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        sync()
        best = min(best, (time.perf_counter() - start) / inner)
    return best


def measure(device: str = "cuda", small: bool = False) -> dict[str, float | str | int]:
    """Sustained rates of `device` ("cuda" or "cpu"); `small`: sizes for a test, less exact.

    Raises:
        ArgumentValueError: no such device here.
    """
    if device not in ("cuda", "cpu"):
        raise ArgumentValueError(f"device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentValueError("device cuda asked for, but torch sees no GPU; use --device cpu")
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    n = (8192 if gpu else 1024) if not small else 256
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matrix = 2 * n**3 / _seconds(lambda: torch.mm(a, b), device)
    elements = (2**30 if gpu else 2**26) // (1024 if small else 1)
    source = torch.empty(elements, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * elements / _seconds(lambda: target.copy_(source), device)
    values = torch.rand(2**22 if gpu else 2**16, device=device)
    result = torch.empty_like(values)
    inner = 20
    exps = values.numel() / _seconds(lambda: torch.exp2(values, out=result), device, inner=inner)
    one = torch.zeros(1, device=device)
    launch = _seconds(lambda: one.add_(1), device, inner=200)
    found = devices.info() if gpu else None
    return {
        "device": device,
        "name": found.name if found else platform.processor() or platform.machine(),
        "processors": found.multiprocessors if found else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_flops": matrix,
        "bandwidth": bandwidth,
        "exps": exps,
        "launch_s": launch,
        "memory": torch.cuda.get_device_properties(0).total_memory if gpu else _host_memory(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on Windows
        return 0


def save(values: dict, path: Path | None = None) -> Path:
    path = path or user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path


def load(path: Path | None = None) -> Hardware:
    """The calibrated machine, as if its data sheet said what was measured.

    Raises:
        ArgumentValueError: there is no calibration, or it lacks fields.
    """
    path = path or user_file()
    if not path.is_file():
        raise ArgumentValueError(f"hardware local needs {path}: run flash-attn cost --calibrate first")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArgumentValueError(f"{path} is not JSON: {error}") from None
    missing = [name for name in (*MEASURED, "name", "device", "processors", "memory") if name not in values]
    if missing:
        raise ArgumentValueError(f"{path} lacks {', '.join(missing)}; run flash-attn cost --calibrate again")
    return hardware_of(values, str(path))


def hardware_of(values: dict, source: str) -> Hardware:
    """What was measured, on top of the data sheet of the same GPU where it is known."""
    name = values["name"].lower().replace(" ", "")
    known = next((h for h in HARDWARE.values() if h.name in name), None)
    gpu = values["device"] == "cuda"
    base = known or HARDWARE["a100" if gpu else "epyc9654"]
    reference = base.matrix["bf16" if gpu else "fp32"]
    scale = values["matrix_flops"] / SUSTAINED_MATRIX / reference
    processors = values["processors"]
    clock = base.clock if gpu else base.clock * scale * base.processors / processors
    exps = values["exps"] / SUSTAINED_EXP
    sources = {
        "matrix": source,
        "bandwidth": source,
        "exps_per_clock": source,
        "launch": source,
        "memory": source,
    }
    inherited = f"not measured, as {base.title}"
    sources = {field: sources.get(field, inherited) for field in base.sources}
    return base._replace(
        name=base.name if known else "local",
        title=f"{values['name']} (measured)",
        matrix={dtype: rate * scale for dtype, rate in base.matrix.items()},
        bandwidth=values["bandwidth"] / SUSTAINED_BANDWIDTH,
        memory=int(values["memory"]),
        processors=processors,
        clock=clock,
        exps_per_clock=exps / processors / clock,
        launch=values["launch_s"],
        sources=sources,
    )
