"""When few query rows meet many keys: whether to split the keys, over how many programs, in which tiles.

Pure arithmetic on the problem and the device: lengths live on the device, so capacities stand in for them.
"""

from flash_attn.problem import Problem
from flash_attn.tuning.config import FwdConfig
from flash_attn.utils.device import DeviceInfo

MAX_SPLITS = 128
MAX_ROWS = 64  # of a tile: the rows of one kv head up to which a decode program holds all of them


def wants(problem: Problem, device: DeviceInfo | None) -> bool:
    """Whether splitting and head packing serve `problem` better than a program per query head and block of rows."""
    if problem.dropout_p or problem.varlen_k or problem.max_k < 256:
        return False
    if problem.num_splits > 1 or rows(problem) <= MAX_ROWS:
        return True
    if problem.num_splits == 1 or device is None:
        return False
    # more rows: worth it only where blocks of 128 queries leave most of the machine idle
    blocks = problem.batch * problem.heads * -(-problem.max_q // 128)
    return 2 * blocks <= device.multiprocessors and problem.max_k >= 2048


def rows(problem: Problem) -> int:
    """Rows that share the keys of one kv head."""
    return problem.max_q * problem.group


def configs(problem: Problem, shared_memory: int) -> list[FwdConfig]:
    """Tiles that should fit, best first; block_m counts rows of a kv head: queries times the heads of a group."""
    block_m = min(MAX_ROWS, max(16, _power(rows(problem))))
    d, dv = (max(16, _power(x)) for x in (problem.head_dim, problem.head_dim_v))
    found = []
    for block_n in (64, 32, 16):
        for stages in (3, 2, 1):
            buffers = max(stages - 1, 1) * block_n * (d + dv) + block_m * (d + block_n)
            # two programs per multiprocessor hide each other's latency
            if problem.dtype.itemsize * buffers <= shared_memory // 2:
                found.append(FwdConfig(block_m, block_n, 4, stages))
    return found or [FwdConfig(block_m, 16, 4, stages) for stages in (2, 1)]


def num_splits(problem: Problem, config: FwdConfig, multiprocessors: int) -> int:
    """Spans to cut the keys of a sequence into.

    The fewest that come within 15 % of the best use of the last wave of programs (the rule of FlashAttention-2).
    """
    if problem.num_splits:
        return min(problem.num_splits, MAX_SPLITS)
    programs = problem.batch * problem.kv_heads * -(-rows(problem) // config.block_m)
    slots = 2 * multiprocessors
    if programs >= 0.8 * slots:
        return 1
    tiles = -(-visible_keys(problem) // config.block_n)
    limit = max(1, min(MAX_SPLITS, slots, tiles // 4))
    efficiency = [programs * s / (slots * -(-programs * s // slots)) for s in range(1, limit + 1)]
    return next(s for s, e in enumerate(efficiency, 1) if e >= 0.85 * max(efficiency))


def visible_keys(problem: Problem) -> int:
    """Most keys that the rows of one sequence can see together."""
    if problem.left is None:
        return problem.max_k
    right = 0 if problem.right is None else problem.right
    return min(problem.max_k, problem.left + 1 + problem.max_q + right)


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()
