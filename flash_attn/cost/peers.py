"""Other people's attention kernels from data sheets alone: nothing here is fitted to an attention measurement.

The formula is that of `kernels`, with constants that follow from the data sheet and from how the kernel is built:

- products that read shared memory themselves (wgmma: FA3, FA4, cuDNN and Triton on Hopper) run at the matrix peak;
  others (mma.sync: FA2) at 62.9 % of it on Hopper (arXiv:2402.13499, its mean over shapes), at the peak elsewhere, and
  every warp first loads its operands from shared memory at 128 bytes a clock and SM;
- the exps take their data-sheet time and hide behind nothing: ping-pong overlaps them, but only by letting both sides
  draw power that the clock then pays for. Without ping-pong the softmax's other arithmetic shows too;
- a masked step adds a comparison and a selection a score;
- the backward has more plain arithmetic a score (two conversions, dS, masks: 6 instructions on 128 lanes), and its
  products move 1.13 times more shared memory than the tensor cores' time allows at head dim 128 (see
  docs/cost-model.md);
- a work item waits two memory latencies (0.6 us each) and for its own tile (Q; in the backward K and V) at its
  processor's share of the memory rate; a call costs one launch;
- kernels that take their tiles in the order of the grid, not the longest first, end causal calls with idle processors;
- FA3 shares the keys of two neighbouring tiles through a cluster when there is no mask and the head dim is 128 or more.
"""

from typing import NamedTuple

from flash_attn.cost import kernels
from flash_attn.cost.counts import count
from flash_attn.cost.hardware import SUSTAINED_BANDWIDTH, Hardware, get_hardware
from flash_attn.cost.kernels import Constants, Estimate
from flash_attn.cost.tiles import Tile, Tiles
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

MMA_SYNC_ON_HOPPER = 0.629
LATENCY = 0.6e-6
# Lane cycles a score on 128 lanes: multiply-add and add at full rate, maximum at half of it, a conversion of two scores
# at half of it; comparing and selecting at half of it (CUDA C++ programming guide, throughput of arithmetic).
SOFTMAX_LANES = 1 + 1 + 2 + 1
MASK_LANES = 2 + 2
BACKWARD_LANES = 6
BACKWARD_SHARED = 1.13


class Peer(NamedTuple):
    """How a kernel is built."""

    wgmma: bool
    forward: dict[int, Tile]
    backward: dict[int, Tile]
    overlap: bool  # another group of warps computes while one does softmax arithmetic
    in_order: bool  # tiles are taken in the order of the grid
    cluster: bool = False


_FA2 = {64: Tile(128, 128), 128: Tile(128, 64), 256: Tile(128, 64)}
_FA3 = {
    64: Tile(192, 128),
    128: Tile(128, 128),
    256: Tile(128, 64),
}  # 176 and 80 keys where ours has powers of two
_CUDNN = _FA3 | {64: Tile(128, 128)}  # not published; the powers of two that fit
_BWD = {64: Tile(128, 128), 128: Tile(64, 128), 256: Tile(64, 64)}
PEERS = {
    "fa2": Peer(False, _FA2, _BWD, True, True),
    "fa3-2024": Peer(True, _FA3, _BWD, True, True, True),
    "fa3": Peer(True, _FA3, _BWD, True, False, True),
    "fa4": Peer(True, _FA3, _BWD, True, False),
    "cudnn-2024": Peer(True, _CUDNN, _BWD, False, True),
    "cudnn": Peer(True, _CUDNN, _BWD, True, False),
    "triton": Peer(True, _FA2, _BWD, False, True),
}


def estimate_peer(
    problem: Problem, peer: str, direction: str = "forward", hardware: "str | Hardware" = "h100"
) -> Estimate:
    """Predicted time of `problem` on a peer's kernel; a year in its name is that of the version.

    Raises:
        ArgumentValueError: unknown peer, direction or hardware, or a size is wrong.
    """
    if peer not in PEERS:
        raise ArgumentValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    hw, how = get_hardware(hardware), PEERS[peer]
    work = count(problem, direction)
    dim = min(256, max(64, 1 << (max(problem.head_dim, problem.head_dim_v) - 1).bit_length()))
    tile = (how.forward if direction == "forward" else how.backward)[dim]
    passes = [
        one._replace(items=_in_order(problem, direction, tile), in_order=True)
        if how.in_order and one.items
        else one
        for one in kernels.plan(problem, direction, "hopper", Tiles(tile, tile), (None, None))
    ]
    if (
        how.cluster
        and direction == "forward"
        and dim >= 128
        and problem.left is None
        and problem.right is None
    ):
        passes = [one._replace(step_bytes=one.step_bytes / 2) for one in passes]
    c = _constants(problem, how, direction, hw, tile, dim)
    return kernels.estimate_passes(passes, c, hw, problem, "hopper", direction, tile, work)


def _in_order(problem: Problem, direction: str, tile: Tile) -> tuple[kernels.Item, ...]:
    """The work items of one head after the other, each head's from its first tile to its last."""
    p = problem
    if direction == "forward":
        return kernels.in_turn([(p.max_q, p.max_k)], tile, p.left, p.right) * (p.batch * p.heads)
    turned = Tile(tile.block_n, tile.block_m)
    items = kernels.in_turn([(p.max_k, p.max_q)], turned, p.right, p.left, 1, p.group)
    return items * (p.batch * p.kv_heads)


def _constants(problem: Problem, how: Peer, direction: str, hw: Hardware, tile: Tile, dim: int) -> Constants:
    scores, size = tile.block_m * tile.block_n, problem.dtype.itemsize
    lanes = 128 * hw.clock
    matrix, step = 1.0, 0.0
    own = tile.block_m * dim * size  # Q
    if direction == "backward":
        matrix, step = 1 / BACKWARD_SHARED, scores * BACKWARD_LANES / lanes
        own = 2 * tile.block_n * dim * size  # K and V
    elif not how.overlap:  # with the rescaling of O
        step = (scores * SOFTMAX_LANES + tile.block_m * dim) / lanes
    if not how.wgmma or not hw.wgmma:
        operands = _operands(direction, *tile[:2], dim) * size
        matrix = MMA_SYNC_ON_HOPPER if hw.wgmma else 1.0
        step += operands / (hw.shared_bandwidth * hw.clock)
    share = hw.bandwidth * SUSTAINED_BANDWIDTH / hw.processors
    return Constants(matrix, 1.0, step, scores * MASK_LANES / lanes, 2 * LATENCY + own / share)


def _operands(direction: str, rows: int, keys: int, dim: int) -> int:
    """Elements that the warps of FA2 load from shared memory in a step.

    Forward: four warps one below the other, each loads K and V. Backward: two by four warps; what lies along the rows
    is loaded four times, what lies along the keys twice.
    """
    if direction == "forward":
        return 4 * 2 * keys * dim
    scores = 2 * (4 * rows + 2 * keys) * dim  # S and dP
    return scores + 2 * (2 * keys * rows + 4 * rows * dim) + 4 * rows * keys + 2 * keys * dim  # dV and dK, dQ
