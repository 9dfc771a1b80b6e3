"""The benchmarks that claims rest on: `make bench`, or `python -m bench.run forward backward decode ...`.

Each suite times ours and every peer that this machine has in one run, prints a table and writes
bench/results/<suite>-<gpu>-<commit>.json. A wrong result is not timed.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from bench import decode, features, host
from bench.peers import flash_attn_3
from flash_attn import use_backend
from flash_attn.cli.bench import show
from flash_attn.problem import Problem
from flash_attn.utils import race
from flash_attn.utils.peers import FLEX, GPU_PEERS

RESULTS = Path(__file__).parent / "results"
TOKENS, WIDTH = 16384, 2048


def dense(head_dim: int, seqlen: int, right: int | None, **fields) -> Problem:
    heads = WIDTH // head_dim
    return Problem(
        batch=TOKENS // seqlen, heads=heads, kv_heads=fields.pop("kv_heads", heads), max_q=seqlen, max_k=seqlen,
        head_dim=head_dim, head_dim_v=head_dim, dtype=fields.pop("dtype", torch.bfloat16), device="cuda", right=right,
        scale=head_dim**-0.5, **fields,
    )  # fmt: skip


def grid() -> Iterator[Problem]:
    """The 18 cells: 16k tokens, heads x head dim = 2048."""
    for head_dim in (64, 128, 256):
        for right in (None, 0):
            for seqlen in (1024, 4096, 16384):
                yield dense(head_dim, seqlen, right)


def costs() -> Iterator[Problem]:
    """What windows, softcap, dropout and grouped heads cost, each beside the plain problem."""
    yield dense(128, 16384, 0)
    yield dense(128, 16384, 0, left=1023)
    for seqlen in (4096,):
        yield dense(128, seqlen, 0)
        yield dense(128, seqlen, 0, softcap=30.0)
        yield dense(128, seqlen, 0, dropout_p=0.1)
        yield dense(128, seqlen, 0, kv_heads=4)
        yield dense(128, seqlen, 0, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = ("forward", "backward", "features", "costs", "decode", "host")
    parser.add_argument("suites", nargs="*", default=suites, choices=(*suites, []), help=", ".join(suites))
    parser.add_argument("--seconds", type=float, default=0.1, help="time spent on each measurement")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention")
    parser.add_argument("--fa3-library", help="path of vLLM's _vllm_fa3_C.abi3.so, to race FlashAttention-3")
    parser.add_argument("--backend", help="force one of ours, such as triton: the portable kernels")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write where this is not a git checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use; on a CPU run: flash-attn bench")
    peers = GPU_PEERS + ((FLEX,) if options.flex else ())
    if options.fa3_library:
        peers += (flash_attn_3(options.fa3_library),)
    console = Console(width=180)
    where = race.provenance() | ({"commit": options.commit} if options.commit else {})
    for suite in options.suites:
        with use_backend(options.backend) if options.backend else nullcontext():
            if suite == "decode":
                rows = decode.rows(options.fa3_library is not None)
            elif suite == "host":
                rows = host.rows()
            elif suite == "features":
                rows = features.rows(options.fa3_library is not None)
            elif suite == "costs":
                cells = race.run_grid(costs(), ("forward", "backward"), peers, options.seconds)
                rows = [r for cell in cells for r in cell]
            else:
                rows = [r for cell in race.run_grid(grid(), (suite,), peers, options.seconds) for r in cell]
        show(rows, console)
        gpu, backend = where["gpu"].split()[-1].lower(), f"-{options.backend}" if options.backend else ""
        race.save(rows, options.output / f"{suite}{backend}-{gpu}-{where['commit']}.json", where)


if __name__ == "__main__":
    main()
