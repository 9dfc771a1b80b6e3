"""`flash-attn explain`: which backend would run a described problem, and why each other would not."""

import importlib.util
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flash_attn import dispatch
from flash_attn.cli import problem_args as args
from flash_attn.problem import Problem


def register(app: typer.Typer) -> None:
    @app.command()
    def explain(
        batch: args.Batch = 2,
        heads: args.Heads = 16,
        kv_heads: args.KvHeads = None,
        seqlen: args.SeqQ = 4096,
        seqlen_k: args.SeqK = None,
        head_dim: args.HeadDim = 128,
        dtype: args.Dtype = "bf16",
        causal: args.Causal = False,
        window: args.Window = "-1,-1",
        softcap: args.Softcap = 0.0,
        dropout: args.Dropout = 0.0,
        alibi: Annotated[bool, typer.Option("--alibi")] = False,
        page_size: Annotated[int, typer.Option("--page-size", min=0, help="0: not paged")] = 0,
        deterministic: Annotated[bool, typer.Option("--deterministic")] = False,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, or a GPU that need not be here: h200, a100, ...")
        ] = "",
    ) -> None:
        """Which backend would run this problem, and why each other would not."""
        kind, context = args.on_device(device or args.default_device())
        with context:
            problem = args.describe(
                batch=batch, heads=heads, kv_heads=kv_heads, seqlen=seqlen, seqlen_k=seqlen_k, head_dim=head_dim,
                dtype=dtype, causal=causal, window=window, softcap=softcap, dropout=dropout, device=kind,
                alibi=alibi, page_size=page_size, seqused_k=page_size > 0, deterministic=deterministic,
            )  # fmt: skip
            console = Console()
            console.print(described(problem), highlight=True, soft_wrap=True)
            for direction in dispatch.DIRECTIONS:
                console.print(render(problem, direction))
            if kind == "cuda" and importlib.util.find_spec("triton") is None:
                console.print(
                    "Without Triton the GPU backends cannot say more. Install it here, no GPU needed: "
                    f"{sys.executable} -m pip install --constraint constraints.txt triton numpy",
                    soft_wrap=True,
                )


def described(problem: Problem) -> str:
    """The problem without what is as it is by default."""
    usual = Problem._field_defaults
    given = [f"{name}={value}" for name, value in problem._asdict().items() if value != usual.get(name, ())]
    return f"Problem({', '.join(given)})"


def render(problem, direction: str) -> Table:
    table = Table(title=direction, title_justify="left")
    table.add_column("backend")
    table.add_column("verdict", overflow="fold")
    chosen = False
    for name, reason in dispatch.explain(problem, direction):
        if reason is not None:
            verdict = f"[red]no[/]: {reason}"
        elif name in dispatch.FORCED_ONLY:
            verdict = f'[yellow]can[/], only when asked for: use_backend("{name}")'
        elif chosen:
            verdict = "[green]can[/]"
        else:
            verdict, chosen = "[bold green]runs it[/]", True
        table.add_row(name, verdict)
    return table
