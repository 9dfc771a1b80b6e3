"""`flash-attn demo`: checks exactness, shows time and memory, trains and runs a small GPT on real text."""

import sysconfig
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from flash_attn import flash_attn_func
from flash_attn.cli.gpt import GPT, Shape, flash_attention, naive_attention
from flash_attn.cli.plots import line_plot
from flash_attn.cli.problem_args import default_device
from flash_attn.utils.benchmarks import measure

console = Console()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention on our layout: it wants (B, H, S, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-causal attention that stores the score matrix, in the dtype of its inputs."""
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v)


def check_exactness(device: str) -> bool:
    """The seed's call, forward and gradients, against fp64 and beside torch; True if ours is as exact as torch's."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 512, 16, 64, device=device, dtype=torch.float16) for _ in range(4))

    def run(attention, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def ours(q, k, v):
        return flash_attn_func(
            q=q, k=k, v=v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip

    want = run(plain, torch.float64)
    results = {
        "flash_attn_func": run(ours, torch.float16),
        "F.scaled_dot_product_attention": run(sdpa, torch.float16),
        "plain torch, fp16": run(plain, torch.float16),
    }
    table = Table(title=f"1. Exact: relative error against fp64 (B=2, S=512, H=16, D=64, fp16, {device})")
    table.add_column("")
    for name in ("out", "dq", "dk", "dv"):
        table.add_column(name, justify="right")
    errors = {}
    for name, got in results.items():
        errors[name] = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
        table.add_row(name, *(f"{e:.1e}" for e in errors[name]))
    console.print(table)
    return all(
        e <= 2 * t for e, t in zip(errors["flash_attn_func"], errors["plain torch, fp16"], strict=True)
    )


class Point(NamedTuple):
    length: int
    standard: tuple[float, float] | None  # (milliseconds, MB) forward and backward; None: not tried
    flash: tuple[float, float]


def scaling(device: str, out: Path) -> list[Point]:
    """Time and peak extra memory of forward plus backward over sequence length, standard against flash."""
    lengths = [256, 512, 1024, 2048, 4096] if device == "cpu" else [1024, 2048, 4096, 8192, 16384, 32768]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    longest_standard = lengths[-2]
    points = []
    with progress("standard against flash attention") as bar:
        task = bar.add_task("", total=len(lengths))
        for length in lengths:
            leaves = [
                torch.randn(1, length, 8, 64, device=device, dtype=dtype, requires_grad=True)
                for _ in range(3)
            ]

            def step(attention, leaves=leaves):
                out = attention(*leaves)
                torch.autograd.grad(out, leaves, torch.ones_like(out))

            flash = measure(lambda: step(flash_attention), device, warmup=1, repeats=5)  # noqa: B023
            standard = None
            if length <= longest_standard:
                standard = measure(lambda: step(naive_attention), device, warmup=1, repeats=5)  # noqa: B023
            points.append(Point(length, standard, flash))
            bar.advance(task)
    table = Table(
        title=f"2. Less memory: forward + backward, causal, B=1, H=8, D=64, {str(dtype)[6:]}, {device}"
    )
    for name in ("sequence", "standard ms", "flash ms", "faster", "standard MB", "flash MB", "smaller"):
        table.add_column(name, justify="right")
    for p in points:
        ours = (f"{p.flash[0]:.1f}", f"{p.flash[1]:.1f}")
        if p.standard is None:
            table.add_row(str(p.length), "-", ours[0], "", "-", ours[1], "")
        else:
            time_ratio, memory_ratio = p.standard[0] / p.flash[0], p.standard[1] / max(p.flash[1], 0.1)
            table.add_row(
                str(p.length), f"{p.standard[0]:.1f}", ours[0], f"{time_ratio:.1f}x",
                f"{p.standard[1]:.1f}", ours[1], f"{memory_ratio:.0f}x",
            )  # fmt: skip
    console.print(table)
    both = [p for p in points if p.standard]
    for index, unit in enumerate(("time, ms", "peak extra memory, MB")):
        name = ("time", "memory")[index]
        line_plot(
            out / f"scaling_{name}.png", f"Attention forward + backward: {name}", "sequence length", unit,
            {
                "standard": ([p.length for p in both], [p.standard[index] for p in both]),  # type: ignore[index]
                "flash": ([p.length for p in points], [p.flash[index] for p in points]),
            }, log=True,
        )  # fmt: skip
    return points


def library_text(limit: int = 1_000_000) -> str:
    """The sources of the Python standard library found on this machine, ASCII part, at most `limit` characters."""
    text = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="ascii", errors="ignore")
        text.append(source)
        size += len(source)
        if size >= limit:
            break
    return "".join(text)[:limit]


def train(model: GPT, data: Tensor, steps: int, attention, label: str, batch: int = 8) -> list[float]:
    """Cross entropy, nats a character, of every step; the batches depend on the step only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    chooser = torch.Generator().manual_seed(1)
    losses = []
    with progress(label) as bar:
        task = bar.add_task("", total=steps)
        for _ in range(steps):
            starts = torch.randint(len(data) - model.shape.context - 1, (batch,), generator=chooser)
            rows = torch.stack([data[s : s + model.shape.context + 1] for s in starts.tolist()])
            loss = F.cross_entropy(model(rows[:, :-1], attention).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.advance(task)
            bar.update(task, description=f"loss {losses[-1]:.3f}")
    return losses


def language_model(device: str, out: Path, steps: int) -> bool:
    """Train with flash and with naive attention, compare; generate with and without the cache, compare."""
    text = library_text()
    letters = sorted(set(text))
    index = {c: i for i, c in enumerate(letters)}
    data = torch.tensor([index[c] for c in text], device=device)
    # the GPU kernels' natural type; on the CPU everything stays fp32
    attention_dtype = None if device == "cpu" else torch.bfloat16
    curves, models = {}, {}
    for name, attention in (("flash", flash_attention), ("naive", naive_attention)):
        torch.manual_seed(0)
        model = models[name] = GPT(Shape(len(letters)), attention_dtype).to(device)
        curves[name] = train(model, data, steps, attention, f"training, {name} attention")
    gap = max(abs(a - b) for a, b in zip(curves["flash"], curves["naive"], strict=True))
    # rounding differs, and training amplifies it: fp32 stays within 1e-2 over a short run, bf16 attention within 5e-2
    same_curve = gap < (1e-2 if attention_dtype is None else 5e-2)
    line_plot(
        out / "loss.png", "Training a small GPT on the standard library", "step", "loss, nats a character",
        {name: (list(range(1, steps + 1)), curve) for name, curve in curves.items()},
    )  # fmt: skip
    prompt_text = "def __init__(self, "
    prompt = torch.tensor([[index[c] for c in prompt_text]], device=device)
    count = 96
    models["flash"].eval()
    begin = time.perf_counter()
    cached = models["flash"].generate(prompt, count)
    between = time.perf_counter()
    uncached = models["flash"].generate_uncached(prompt, count)
    end = time.perf_counter()
    same_text = torch.equal(cached, uncached)
    table = Table(
        title=f"3. Useful: a {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameter GPT, {device}"
    )
    table.add_column("check")
    table.add_column("result")
    table.add_row("text", f"{len(text):,} characters of the standard library, {len(letters)} different")
    table.add_row(
        "loss, flash attention",
        f"{curves['flash'][0]:.3f} -> {curves['flash'][-1]:.3f} nats in {steps} steps",
    )
    table.add_row(
        "loss, naive attention",
        f"{curves['naive'][0]:.3f} -> {curves['naive'][-1]:.3f}, largest gap {gap:.1e}",
    )
    table.add_row(
        "cached equals uncached", f"{same_text}: {between - begin:.2f} s against {end - between:.2f} s"
    )
    console.print(table)
    console.print(f"generated: {prompt_text + ''.join(letters[i] for i in cached[0].tolist())!r}")
    return same_curve and same_text


def progress(label: str) -> Progress:
    return Progress(
        TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    @app.command()
    def demo(
        device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one")] = "",
        output: Annotated[Path, typer.Option(help="folder for the plots")] = Path("demo-output"),
        steps: Annotated[int, typer.Option(min=2, help="training steps")] = 100,
    ) -> None:
        """Check exactness, show time and memory, train and run a small GPT: the main job."""
        device = device or default_device()
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise typer.BadParameter(f"--device must be cpu, or cuda where torch sees a GPU, got {device!r}")
        output.mkdir(parents=True, exist_ok=True)
        checks = {"as exact as torch": check_exactness(device)}
        scaling(device, output)
        checks["loss curve and cached text equal"] = language_model(device, output, steps)
        for name, passed in checks.items():
            console.print(f"{'[green]passed[/]' if passed else '[red]FAILED[/]'}: {name}")
        console.print(f"plots: {', '.join(str(p) for p in sorted(output.glob('*.png')))}")
        if not all(checks.values()):
            raise typer.Exit(1)
