"""Time of attention kernels on a GPU: tiles, waves, exps, traffic and launches, with five constants a family.

A call is a few *passes* (kernels). A pass is a list of work items (a tile of rows, or of keys in the backward) that
the processors take one after the other, the longest first; an item is a number of *steps* over the other side, each a
block of scores. One step on one processor takes the longer of its L2 traffic and

    products / (c.matrix x data-sheet rate) + exps x c.exp / data-sheet exp rate + c.step (+ c.mask where masked)

and an item costs c.tile on top, for its first loads and its epilogue. The pass lasts as long as its busiest processor,
and at least as long as its traffic to memory. `c` comes from `data/kernels.json`, where `fit.py` puts it.
"""

import heapq
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from flash_attn.cost.counts import Work, count, tile_steps, visible_keys
from flash_attn.cost.hardware import SUSTAINED_BANDWIDTH, SUSTAINED_L2, Hardware, get_hardware
from flash_attn.cost.tiles import Tile, Tiles, dims, info, resident, tiles_of
from flash_attn.errors import ArgumentValueError
from flash_attn.kvcache import splits
from flash_attn.problem import Problem

BACKENDS = ("hopper", "triton", "cpu")
KINDS = ("forward", "backward", "decode")
HOPPERS = ("h100", "h200")
SIMULATED = 30_000  # work items above which the schedule is estimated instead of played through


class Constants(NamedTuple):
    """What the data sheet does not say about a forward or backward family; see the module's formula."""

    matrix: float  # share of the data-sheet matrix rate that the products reach
    exp: float  # exposed time of the softmax, in units of the exps' data-sheet time
    step: float  # s a step
    mask: float  # s a masked step, on top
    tile: float  # s a work item


class DecodeConstants(NamedTuple):
    """The same for the split kernel of decode."""

    bandwidth: float  # share of the data-sheet memory rate that is reached
    tile: float  # s a key tile takes one program when bandwidth is free
    merge: float  # s to merge the spans, a second kernel
    start: float  # s a call


AnyConstants = Constants | DecodeConstants


class Pass(NamedTuple):
    """One kernel: `items` are (steps, masked steps, how many items have that many)."""

    name: str
    items: tuple[tuple[int, int, int], ...] = ()
    resident: int = 1  # programs that share a processor, each hiding the others' waits
    step_flops: float = 0
    step_exps: float = 0
    step_bytes: float = 0  # through L2
    memory_bytes: float = 0
    in_order: bool = False  # items are taken as they are listed, not the longest first


class Estimate(NamedTuple):
    """Predicted time of one call."""

    time_s: float
    bound: str  # the largest of `parts`
    parts: dict[str, float]  # seconds; they add up to time_s
    backend: str
    kind: str
    hardware: str
    tile: Tile
    matmul_flops: int  # of the visible pairs
    bytes: int  # that must move

    @property
    def tflops(self) -> float:
        return self.matmul_flops / self.time_s / 1e12

    @property
    def gbs(self) -> float:
        return self.bytes / self.time_s / 1e9


@cache
def _stored() -> dict[str, AnyConstants]:
    text = (Path(__file__).parent / "data" / "kernels.json").read_text()
    return {
        name: (DecodeConstants if name.endswith("decode") else Constants)(**values)
        for name, values in json.loads(text)["families"].items()
    }


def constants(backend: str, kind: str) -> AnyConstants:
    family = f"{backend}/{kind}"
    known = _stored()
    if family not in known:
        raise ArgumentValueError(f"kernel family must be one of {', '.join(known)}, got {family}")
    return known[family]


def _is_cpu(hardware: Hardware) -> bool:
    return "fp64" in hardware.matrix


def choose(problem: Problem, hardware: Hardware, direction: str) -> str:
    """The backend that serves `problem` on `hardware` when none is asked for."""
    if _is_cpu(hardware):
        return "cpu"
    half = problem.dtype.itemsize == 2
    features = problem.dropout_p or problem.alibi or problem.leftpad
    if (
        hardware.name in HOPPERS
        and half
        and max(problem.head_dim, problem.head_dim_v) <= 256
        and not features
    ):
        return "hopper"
    return "triton"


def kind_of(problem: Problem, direction: str, hardware: Hardware) -> str:
    """Which family of kernels serves the call."""
    if direction == "backward":
        return "backward"
    return "decode" if splits.wants(problem, info(hardware)) else "forward"


def estimate(
    problem: Problem,
    direction: str = "forward",
    hardware: "str | Hardware" = "h200",
    backend: str | None = None,
    lens_q: Sequence[int] | None = None,
    lens_k: Sequence[int] | None = None,
    tile: "Tile | Tiles | None" = None,
    c: AnyConstants | None = None,
    kind: str | None = None,
) -> Estimate:
    """Predicted time of `problem`, and what it is spent on.

    Args:
        direction: "forward" or "backward" (the backward alone).
        backend: "hopper", "triton" or "cpu"; None: the one that would run it.
        lens_q, lens_k: length of every sequence; default: all are max_q, max_k long.
        tile: other tile sizes than the tuning table's, to rank choices. c: other constants.
        kind: the family of kernels, "forward", "backward" or "decode"; None: the one that would serve.

    Raises:
        ArgumentValueError: a size is wrong, or hardware, backend or direction is unknown.
    """
    hw = get_hardware(hardware)
    work = count(problem, direction, lens_q, lens_k)
    backend = backend or choose(problem, hw, direction)
    if backend not in BACKENDS:
        raise ArgumentValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if (backend == "cpu") != _is_cpu(hw):
        raise ArgumentValueError(f"backend {backend} does not run on {hw.title}")
    if backend == "hopper" and hw.name not in HOPPERS:
        raise ArgumentValueError(f"backend hopper runs on {' and '.join(HOPPERS)}, not on {hw.title}")
    kind = direction if backend == "cpu" else kind or kind_of(problem, direction, hw)
    family = "triton" if kind == "decode" else backend  # one split kernel serves every GPU
    c = c or constants(family, kind)
    if kind == "decode":
        assert isinstance(c, DecodeConstants)
        return _decode(problem, _shapes(problem, (lens_q, lens_k)), work, hw, c)
    assert isinstance(c, Constants)
    if backend == "cpu":
        return _on_cpu(work, hw, c, hw.matrix_rate(str(problem.dtype).removeprefix("torch.")), kind)
    tiles = Tiles(tile, tile) if isinstance(tile, Tile) else tile or tiles_of(problem, backend, kind, hw)
    lens = tuple(None if lens is None else tuple(lens) for lens in (lens_q, lens_k))
    passes = plan(problem, direction, backend, tiles, lens)
    return estimate_passes(passes, c, hw, problem, backend, kind, tiles.main, work)


def estimate_passes(
    passes: Sequence[Pass], c: Constants, hw: Hardware, problem: Problem, backend: str, kind: str, tile: Tile,
    work: Work,
) -> Estimate:  # fmt: skip
    """The time of kernels that run one after the other."""
    rate = hw.matrix_rate(str(problem.dtype).removeprefix("torch."))
    names = ("matrix", "softmax", "overhead", "imbalance", "memory", "l2")
    parts: dict[str, float] = dict.fromkeys(names, 0.0)
    for one in passes:
        for name, value in _pass_time(one, hw, c, rate).items():
            parts[name] += value
    parts["launch"] = hw.launch * len(passes)
    return _result(parts, backend, kind, hw, tile, work)


@lru_cache(maxsize=4096)
def plan(problem: Problem, direction: str, backend: str, tiles: Tiles, lens: tuple) -> tuple[Pass, ...]:
    """The kernels of a call; what does not depend on the constants."""
    work = count(problem, direction, *lens)
    return (_forward if direction == "forward" else _backward)(
        problem, _shapes(problem, lens), work, tiles, backend
    )


def _shapes(problem: Problem, lens: tuple) -> tuple[tuple[int, int], ...]:
    """(queries, keys) of every packed sequence in turn, or of the only shape there is."""
    q, k = lens
    if q is None and k is None:
        return ((problem.max_q, problem.max_k),)
    lens_q, lens_k = q or (problem.max_q,) * problem.batch, k or (problem.max_k,) * problem.batch
    return tuple(zip(lens_q, lens_k, strict=True))


def _result(parts: dict[str, float], backend: str, kind: str, hw: Hardware, tile: Tile, work) -> Estimate:
    bound = max(parts, key=lambda name: parts[name])
    total = sum(parts.values())
    return Estimate(total, bound, parts, backend, kind, hw.name, tile, work.matmul_flops, work.flash_bytes)


def _pass_time(one: Pass, hw: Hardware, c: Constants, rate: float) -> dict[str, float]:
    """Seconds by cause; L2 and memory appear only as far as they exceed the rest."""
    matrix = one.step_flops / (c.matrix * rate / hw.processors)
    softmax = one.step_exps * c.exp / (hw.exps / hw.processors)
    # Programs that share a processor work on the same head, and find each other's keys in its L1. Few programs spread
    # over the processors first.
    share = max(1, min(one.resident, -(-sum(copies for *_, copies in one.items) // hw.processors)))
    l2 = one.step_bytes / share / (hw.l2_bandwidth * SUSTAINED_L2 / hw.processors)
    step = max(matrix + softmax + c.step, l2)
    workers = hw.processors * share
    items = [((steps * step + masked * c.mask) * share + c.tile, n) for steps, masked, n in one.items]
    total = sum(cost * copies for cost, copies in items) / workers
    steps = sum(steps * copies for steps, _, copies in one.items) / hw.processors
    busy = makespan(items, workers, one.in_order)
    parts = {
        "matrix": steps * matrix,
        "softmax": steps * softmax,
        "l2": steps * (step - matrix - softmax - c.step),
    }
    parts["overhead"] = total - sum(parts.values())
    parts["imbalance"] = busy - total
    parts["memory"] = max(0.0, one.memory_bytes / (hw.bandwidth * SUSTAINED_BANDWIDTH) - busy)
    return parts


def makespan(items: Sequence[tuple[float, int]], workers: int, in_order: bool = False) -> float:
    """When the last of `workers` finishes, if each takes the next item as soon as it is free.

    Args:
        items: (cost, copies). in_order: the next is the first that is left, not the longest.
    """
    items = [item for item in items if item[1]]
    if not items:
        return 0.0
    if not in_order:
        items.sort(reverse=True)
    total, longest = sum(cost * copies for cost, copies in items), max(items)[0]
    number = sum(copies for _, copies in items)
    if number <= workers:
        return longest
    if len({cost for cost, _ in items}) == 1:
        return -(-number // workers) * longest
    if number > SIMULATED:
        return total / workers + items[-1][0] / 2
    free = [0.0] * workers
    for cost, copies in items:
        for _ in range(copies):
            heapq.heapreplace(free, free[0] + cost)
    return max(free)


Item = tuple[int, int, int]


def in_turn(
    shapes: Sequence[tuple[int, int]],
    tile: Tile,
    left: int | None,
    right: int | None,
    copies: int = 1,
    each: int = 1,
) -> tuple[Item, ...]:
    """Work items of all sequences from the first tile of rows to the last.

    Args:
        copies: of each item (heads). each: how often an item goes over its steps.
    """
    return tuple(
        (steps * each, masked * each, copies)
        for m, n in shapes
        for steps, masked in tile_steps(m, n, left, right, tile.block_m, tile.block_n)
    )


def _merged(items: Sequence[Item], times: int) -> tuple[Item, ...]:
    """The same items `times` over, equal ones counted together."""
    found: Counter[tuple[int, int]] = Counter()
    for steps, masked, copies in items:
        found[steps, masked] += copies * times
    return tuple((*item, copies) for item, copies in found.items())


def _forward(problem: Problem, shapes, work, tiles: Tiles, backend: str) -> tuple[Pass, ...]:
    p, tile, packed = problem, tiles.main, len(shapes) > 1
    items: Sequence[Item]
    if not packed:  # the longest first, as far as L2 holds their keys
        items = _merged(in_turn(shapes, tile, p.left, p.right), p.batch * p.heads)
    elif backend == "hopper":  # one sequence after the other
        of_sequence = [in_turn([shape], tile, p.left, p.right, p.heads) for shape in shapes]
        items = [item for each in of_sequence for item in (each if p.right is None else each[::-1])]
    else:
        items = in_turn(shapes, tile, p.left, p.right, p.heads)[::-1]
    block = tile.block_m * tile.block_n
    token = (p.head_dim + p.head_dim_v) * p.dtype.itemsize  # K and V of one head
    flops = 2 * block * sum(dims(p, backend))
    share = 1 if backend == "hopper" else resident(tile, dims(p, backend), p.dtype.itemsize)
    moved = tile.block_n * token
    return (Pass("forward", tuple(items), share, flops, block, moved, work.flash_bytes, packed),)


def _backward(problem: Problem, shapes, work, tiles: Tiles, backend: str) -> tuple[Pass, ...]:
    p, (d, dv), packed = problem, dims(problem, backend), len(shapes) > 1
    tile, t = tiles.main, work.tensors
    block = tile.block_m * tile.block_n
    # A work item is a tile of keys of one kv head with the queries of the whole group. Seen from the keys the mask is
    # the same band with its sides exchanged.
    turned = [(n, m) for m, n in shapes]
    keys = in_turn(turned, Tile(tile.block_n, tile.block_m), p.right, p.left, 1, p.group)
    reads = t["q"] + t["k"] + t["v"] + t["dout"]
    token = (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    query = tile.block_m * (token + 8)  # Q, dO and the row statistics that a step loads
    before = Pass("row statistics", memory_bytes=t["out"] + t["dout"] + 3 * t["lse"])
    heads = 1 if packed else p.batch
    if backend == "hopper":
        keys = (
            tuple((*item[:2], p.kv_heads) for item in keys) if packed else _merged(keys, heads * p.kv_heads)
        )
        if max(d, dv) > 128:  # dQ by a kernel of its own
            rows = in_turn(shapes, Tile(128, tile.block_n), p.left, p.right)
            rows = rows * p.heads if packed else _merged(rows, heads * p.heads)
            exps, moved = 128 * tile.block_n, tile.block_n * token
            return (
                before,
                Pass("dk dv", keys, 1, 4 * block * (d + dv), block, query, reads + t["dk"] + t["dv"], packed),
                Pass("dq", rows, 1, 2 * exps * (2 * d + dv), exps, moved, reads + t["dq"], packed),
            )
        wide = work.rows * p.head_dim * 4  # dQ in fp32, added up in L2
        flops = 2 * block * (3 * d + 2 * dv)
        moved = query + tile.block_m * p.head_dim * 4
        main = Pass("dk dv dq", keys, 1, flops, block, moved, reads + t["dk"] + t["dv"], packed)
        before = before._replace(memory_bytes=before.memory_bytes + wide)
        return before, main, Pass("dq", memory_bytes=wide + t["dq"])
    other = tiles.rows or tile
    rows = in_turn(shapes, other, p.left, p.right)
    if packed:  # head after head
        keys, rows = keys * p.kv_heads, (rows if p.right is None else rows[::-1]) * p.heads
    else:
        keys, rows = _merged(keys, heads * p.kv_heads), _merged(rows, heads * p.heads)
    share = [resident(x, (d, dv), p.dtype.itemsize, backward=True) for x in (tile, other)]
    exps_dq = other.block_m * other.block_n
    flops, flops_dq = 4 * block * (d + dv), 2 * exps_dq * (2 * d + dv)
    return (
        before,
        Pass("dk dv", keys, share[0], flops, block, query, reads + t["dk"] + t["dv"], packed),
        Pass("dq", rows, share[1], flops_dq, exps_dq, other.block_n * token, reads + t["dq"], packed),
    )


def _decode(problem: Problem, shapes, work, hw: Hardware, c: DecodeConstants) -> Estimate:
    """Reading K and V once: at the rate of the memory or as fast as so many programs can ask for it, and as long as the
    processor with the most to read."""
    p, device = problem, info(hw)
    config = splits.configs(p, device.shared_memory, hw.processors)[0]
    spans = splits.num_splits(p, config, hw.processors)
    programs = p.kv_heads * spans * -(-splits.rows(p) // config.block_m)
    # All spans are planned for the longest sequence, so those of shorter ones hold fewer tiles.
    keys = [visible_keys(m, n, p.left, p.right) for m, n in shapes]
    tiles = [math.ceil(math.ceil(count / config.block_n) / spans) for count in keys]
    if len(shapes) == 1:
        tiles *= p.batch
    rate = hw.bandwidth * c.bandwidth
    asking = min(len(tiles) * programs, hw.processors)
    tile_bytes = config.block_n * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    each = max(c.tile, tile_bytes * asking / rate)
    share = max(1, device.shared_memory // (config.num_stages * tile_bytes))
    most = _most_loaded([count for count in tiles for _ in range(programs)], hw.processors, share)
    partial = 2 * spans * work.rows * (p.head_dim_v + 1) * 4 if spans > 1 else 0
    memory = (work.flash_bytes + partial) / rate
    parts = {
        "memory": memory,
        "latency": max(0.0, most * each - memory),
        "combine": c.merge if spans > 1 else 0.0,
        "launch": c.start,
    }
    return _result(parts, "triton", "decode", hw, Tile(config.block_m, config.block_n), work)


def _most_loaded(costs: Sequence[int], processors: int, share: int) -> int:
    """The largest load of a processor: the first `share` programs of each are dealt out in turn, before anything is
    known of their lengths; the rest go where there is least to do."""
    loads = [sum(costs[i : share * processors : processors]) for i in range(processors)]
    heapq.heapify(loads)
    for cost in costs[share * processors :]:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def _on_cpu(work, hw: Hardware, c: Constants, rate: float, kind: str) -> Estimate:
    """No tiles worth modelling: products at a share of the peak, exps, memory; `c.tile` is the cost of a call."""
    matrix, softmax = work.matmul_flops / (c.matrix * rate), work.exps * c.exp / hw.exps
    memory = max(0.0, work.flash_bytes / (hw.bandwidth * SUSTAINED_BANDWIDTH) - matrix - softmax)
    parts = {"matrix": matrix, "softmax": softmax, "memory": memory, "launch": c.tile}
    return _result(parts, "cpu", kind, hw, Tile(0, 0), work)
