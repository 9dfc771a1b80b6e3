"""Command-line options that describe a problem, shared by every command that takes one."""

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
import typer

from flash_attn.errors import FlashAttnError
from flash_attn.problem import Problem, window_bounds
from flash_attn.utils import device as devices

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="sequences")]
Heads = Annotated[int, typer.Option("--heads", "-H", min=1, help="query heads")]
KvHeads = Annotated[
    int | None, typer.Option("--kv-heads", min=1, help="key/value heads; default: as many as query heads")
]
SeqQ = Annotated[int, typer.Option("--seqlen", "-s", min=1, help="queries a sequence")]
SeqK = Annotated[
    int | None, typer.Option("--seqlen-k", min=1, help="keys a sequence; default: as many as queries")
]
HeadDim = Annotated[int, typer.Option("--head-dim", "-d", min=1, max=512)]
Dtype = Annotated[str, typer.Option("--dtype", help=", ".join(DTYPES))]
Causal = Annotated[bool, typer.Option("--causal/--full")]
Window = Annotated[str, typer.Option("--window", help="LEFT,RIGHT visible keys; -1 is unbounded")]
Softcap = Annotated[float, typer.Option("--softcap", min=0.0)]
Dropout = Annotated[float, typer.Option("--dropout", min=0.0, max=0.999)]


def choose(name: str, value: str, known: dict):
    """`known[value]`, or an error that lists what is known."""
    if value not in known:
        raise typer.BadParameter(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def integers(name: str, text: str) -> list[int]:
    """The positive integers of a list such as 512,2048."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{name} must be positive integers such as 512,2048, got {text!r}")
    return values


def parse_window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--window must be LEFT,RIGHT, two integers, got {text!r}") from None
    return left, right


def describe(
    *, batch: int, heads: int, kv_heads: int | None, seqlen: int, seqlen_k: int | None, head_dim: int, dtype: str,
    causal: bool, window: str, softcap: float, dropout: float, device: str, **extra: Any,
) -> Problem:  # fmt: skip
    """The dense Problem that the options describe; `extra` are further Problem fields."""
    kv_heads, seqlen_k = kv_heads or heads, seqlen_k or seqlen
    if heads % kv_heads:
        raise typer.BadParameter(f"--kv-heads must divide --heads, got {heads} and {kv_heads}")
    left, right = window_bounds(causal, parse_window(window), seqlen, seqlen_k)
    return Problem(
        batch=batch, heads=heads, kv_heads=kv_heads, max_q=seqlen, max_k=seqlen_k, head_dim=head_dim,
        head_dim_v=head_dim, dtype=choose("--dtype", dtype, DTYPES), device=device, left=left, right=right,
        scale=head_dim**-0.5, softcap=softcap, dropout_p=dropout, **extra,
    )  # fmt: skip


def on_device(name: str) -> tuple[str, AbstractContextManager]:
    """(device type, context in which the package plans for it) for "cpu", "cuda" or a known GPU's name."""
    if name in ("cpu", "cuda"):
        return name, nullcontext()
    if name not in devices.KNOWN:
        known = ", ".join(["cpu", "cuda", *devices.KNOWN])
        raise typer.BadParameter(f"--device must be one of {known}, got {name!r}")
    return "cuda", devices.assume(devices.KNOWN[name])


def this_device(name: str) -> str:
    """`name` ("cpu" or "cuda"; empty: the GPU if there is one), on which something is to be measured here."""
    name = name or default_device()
    choose("--device", name, dict.fromkeys(("cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device is cuda, and torch sees no GPU here")
    return name


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fail(error: FlashAttnError) -> typer.Exit:
    """Print an error of ours as one line, without a traceback, and stop."""
    typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
    return typer.Exit(1)
