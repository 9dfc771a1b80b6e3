"""`flash-attn tune`: measure tile sizes on this GPU and write the fastest as rows of the tuning table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flash_attn.cli import problem_args as args


def register(app: typer.Typer) -> None:
    @app.command()
    def tune(
        out: Annotated[Path, typer.Option(help="table file to add rows to, for flash_attn/tuning/data")],
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
        backward: Annotated[bool, typer.Option("--backward", help="also the two backward kernels")] = False,
    ) -> None:
        """Measure every tile for one problem on this GPU. Not needed to use the package: calls never tune."""
        from flash_attn.tuning import search
        from flash_attn.utils import device

        console = Console()
        if device.info() is None:
            console.print("tune needs a GPU, none is visible to torch")
            raise typer.Exit(2)
        problem = args.describe(
            batch=batch, heads=heads, kv_heads=kv_heads, seqlen=seqlen, seqlen_k=seqlen_k, head_dim=head_dim,
            dtype=dtype, causal=causal, window=window, softcap=softcap, dropout=dropout, device="cuda",
        )  # fmt: skip
        rows = [search.search(problem, d) for d in (search.DIRECTIONS if backward else search.DIRECTIONS[:1])]
        search.write(rows, out)
        for row in rows:
            console.print(row["direction"], row["config"], f"{row['tflops']} TFLOP/s")
