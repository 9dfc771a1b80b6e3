"""`flash-attn tune`: measure tile sizes of the portable kernels on the GPU at hand and keep the fastest."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from flash_attn.cli import problem_args as args
from flash_attn.errors import FlashAttnError


def register(app: typer.Typer) -> None:
    @app.command()
    def tune(
        output: Annotated[
            Path, typer.Option(help="table file that rows are added to, one JSON object a line")
        ],
        head_dims: Annotated[str, typer.Option(help="head dimensions")] = "64,128,256",
        seqlens: Annotated[
            str, typer.Option(help="sequence lengths; 16384 tokens a batch")
        ] = "1024,4096,16384",
        dtype: args.Dtype = "bf16",
    ) -> None:
        """Search tile sizes on this GPU and write the rows of the fastest."""
        import torch

        if not torch.cuda.is_available():
            raise typer.BadParameter("tune measures on a GPU, and torch sees none here")
        from flash_attn.tuning import search

        problems = [
            args.describe(
                batch=max(1, 16384 // length),
                heads=max(1, 2048 // head_dim),
                kv_heads=None,
                seqlen=length,
                seqlen_k=None,
                head_dim=head_dim,
                dtype=dtype,
                causal=causal,
                window="-1,-1",
                softcap=0.0,
                dropout=0.0,
                device="cuda",
            )  # fmt: skip
            for head_dim in args.integers("--head-dims", head_dims)
            for length in args.integers("--seqlens", seqlens)
            for causal in (False, True)
        ]
        work = [(problem, direction) for problem in problems for direction in search.DIRECTIONS]
        rows = []
        try:
            for problem, direction in track(work, "searching", console=Console()):
                rows.append(search.search(problem, direction))
        except FlashAttnError as error:
            raise args.fail(error) from error
        search.write(rows, output)
        typer.echo(f"{len(rows)} rows written to {output}")
