"""Other people's attention kernels from data sheets alone: nothing here is fitted to an attention measurement.

The formula is that of `kernels`, with constants that follow from the data sheet and from how the kernel is built:

- products that read shared memory themselves (wgmma: FA3, FA4, cuDNN on Hopper) run at the matrix peak; others
  (mma.sync: FA2, Triton's older kernels) at 62.9 % of it on Hopper (arXiv:2402.13499, its mean over shapes), at the
  peak elsewhere, and every warp first loads its operands from shared memory at 128 bytes a clock and SM;
- the exps take their data-sheet time and hide behind nothing: ping-pong overlaps them, but only by letting both sides
  draw power that the clock then pays for;
- the backward has more plain arithmetic a score (two conversions, dS, masks: 6 instructions on 128 lanes), and its
  products move 1.13 times more shared memory than the tensor cores' time allows at head dim 128 (see
  docs/cost-model.md);
- a work item waits two memory latencies (0.6 us each) for its first tiles and its epilogue; a call costs one launch.
"""

from typing import NamedTuple

from flash_attn.cost.hardware import Hardware, get_hardware
from flash_attn.cost.kernels import Constants, Estimate, estimate
from flash_attn.cost.tiles import Tile
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

MMA_SYNC_ON_HOPPER = 0.629
LATENCY = 0.6e-6
BACKWARD_INSTRUCTIONS = 6
BACKWARD_SHARED = 1.13


class Peer(NamedTuple):
    wgmma: bool
    forward: dict[int, Tile]
    backward: dict[int, Tile]
    warps: int  # that load operands themselves; without meaning for wgmma


_FA2 = {64: Tile(128, 128), 128: Tile(128, 64), 256: Tile(128, 64)}
_FA3 = {
    64: Tile(192, 128),
    128: Tile(128, 128),
    256: Tile(128, 64),
}  # 176 and 80 keys where ours has powers of two
_BWD = {64: Tile(128, 128), 128: Tile(64, 128), 256: Tile(64, 64)}
PEERS = {
    "fa2": Peer(False, _FA2, _BWD, 4),
    "triton": Peer(False, _FA2, _BWD, 4),
    "fa3": Peer(True, _FA3, _BWD, 0),
    "fa4": Peer(True, _FA3, _BWD, 0),
    "cudnn": Peer(True, _FA3, _BWD, 0),
}


def estimate_peer(
    problem: Problem, peer: str, direction: str = "forward", hardware: "str | Hardware" = "h100"
) -> Estimate:
    """Predicted time of `problem` on a peer's kernel.

    Raises:
        ArgumentValueError: unknown peer or hardware.
    """
    if peer not in PEERS:
        raise ArgumentValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    hw, how = get_hardware(hardware), PEERS[peer]
    dim = max(64, 1 << (max(problem.head_dim, problem.head_dim_v) - 1).bit_length())
    tile = (how.forward if direction == "forward" else how.backward)[min(dim, 256)]
    c = Constants(1.0, 1.0, 0.0, 0.0, 2 * LATENCY)
    if direction == "backward":
        scores = tile.block_m * tile.block_n
        c = c._replace(matrix=1 / BACKWARD_SHARED, step=scores * BACKWARD_INSTRUCTIONS / 128 / hw.clock)
    if not how.wgmma:
        products = 4 if direction == "forward" else 10
        operands = products // 2 * how.warps * (tile.block_n * dim * problem.dtype.itemsize)
        c = c._replace(
            matrix=MMA_SYNC_ON_HOPPER if hw.wgmma else 1.0,
            step=c.step + operands / (hw.shared_bandwidth * hw.clock),
        )
    return estimate(problem, direction, hw, "hopper", tile=tile, c=c, kind=direction)
