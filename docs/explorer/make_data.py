"""Writes data.js, the numbers of the explorer's page, from `flash_attn.cost`: python docs/explorer/make_data.py

The page counts operations and bytes itself (counts.js) and plays the same schedules as `flash_attn.cost.kernels`. What
it cannot work out is here: the data sheets, the fitted constants and the tiles that the tuning table gives.
"""

import json
from pathlib import Path
from typing import Any

import torch

from flash_attn.cost import counts, hardware, kernels
from flash_attn.cost.tiles import dims, resident, tiles_of
from flash_attn.problem import Problem

TARGET = Path(__file__).with_name("data.js")
DTYPE = torch.bfloat16
LENGTHS = [2**n for n in range(9, 18)]
HEAD_DIMS = [64, 128, 256]
BATCHES = [1, 2, 4, 8, 16, 32]
# From 16 heads on no known GPU splits the keys of a forward over programs, which the page does not model.
HEADS = [16, 32, 64, 128]
MASKS = {"full": None, "causal": 0}  # name: keys visible to the right of the diagonal
GPUS = [name for name, hw in hardware.HARDWARE.items() if "fp64" not in hw.matrix]


def problem(batch: int, heads: int, length: int, head_dim: int, mask: str) -> Problem:
    """The self-attention that the page calls by these settings."""
    return Problem(batch, heads, heads, length, length, head_dim, head_dim, DTYPE, "cuda", right=MASKS[mask])


def _gpu(name: str) -> dict[str, Any]:
    hw = hardware.HARDWARE[name]
    one = problem(1, HEADS[0], LENGTHS[0], HEAD_DIMS[0], "full")
    backend = kernels.choose(one, hw, "forward")
    return {
        "title": hw.title,
        "backend": backend,
        "matrix": hw.matrix_rate("bf16"),
        "exps": hw.exps,
        "bandwidth": hw.bandwidth,
        "l2_bandwidth": hw.l2_bandwidth,
        "memory": hw.memory,
        "processors": hw.processors,
        "launch": hw.launch,
        "tiles": {
            direction: {
                mask: {d: [_tiles(hw, backend, direction, mask, d, n) for n in LENGTHS] for d in HEAD_DIMS}
                for mask in MASKS
            }
            for direction in counts.DIRECTIONS
        },
    }


def _tiles(
    hw: hardware.Hardware, backend: str, direction: str, mask: str, d: int, length: int
) -> list[list[int]]:
    """[queries, keys, programs that share a processor] of each kernel of a call; tiles depend on no other setting."""
    for batch, heads in ((BATCHES[0], HEADS[0]), (BATCHES[-1], HEADS[-1])):
        one = problem(batch, heads, length, d, mask)
        assert kernels.choose(one, hw, direction) == backend
        assert kernels.kind_of(one, direction, hw) == direction, "split over keys: see HEADS"
    found = []
    for tile in tiles_of(one, backend, direction, hw):
        if tile is not None:
            share = resident(tile, dims(one, backend), DTYPE.itemsize, direction == "backward")
            found.append([tile.block_m, tile.block_n, 1 if backend == "hopper" else share])
    return found


def data() -> dict[str, Any]:
    return {
        "itemsize": DTYPE.itemsize,
        "sustained": {"bandwidth": hardware.SUSTAINED_BANDWIDTH, "l2": hardware.SUSTAINED_L2},
        "simulated": kernels.SIMULATED,
        "softmax_ops": {direction: len(counts.SOFTMAX_OPS[direction]) for direction in counts.DIRECTIONS},
        "sizes": {"batch": BATCHES, "heads": HEADS, "length": LENGTHS, "head_dim": HEAD_DIMS},
        "families": {
            backend: {kind: kernels.constants(backend, kind)._asdict() for kind in counts.DIRECTIONS}
            for backend in ("hopper", "triton")
        },
        "gpus": {name: _gpu(name) for name in GPUS},
    }


def text() -> str:
    """What data.js has to hold."""
    everything = data()
    gpus = everything.pop("gpus")
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in everything.items()]
    lines += (
        ['  "gpus": {']
        + [f"    {json.dumps(name)}: {json.dumps(gpu)}," for name, gpu in gpus.items()]
        + ["  },"]
    )
    head = "// Written by make_data.py from flash_attn.cost; do not edit. Rates a second, sizes in bytes."
    return "\n".join([head, '"use strict";', "const FLASH_DATA = {", *lines, "};", ""])


if __name__ == "__main__":
    TARGET.write_text(text())
