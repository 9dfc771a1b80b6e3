"""When few query rows meet many keys: whether to split the keys, over how many programs, in which tiles.

Pure arithmetic on the problem and the device: lengths live on the device, so capacities stand in for them.
"""

from functools import lru_cache

from flash_attn.problem import Problem
from flash_attn.tuning.config import FwdConfig
from flash_attn.utils.device import DeviceInfo

MAX_SPLITS = 128
TILE_BYTES = 64 * 1024  # shared memory for one tile of keys and values
RESIDENT = 3  # programs of light tiles (half of that, two of them on their way) that registers leave room for
LIGHT_BYTES = TILE_BYTES + 10 * 1024  # shared memory of such a program, its queries included
BYTES_PER_US = 33_000  # that a multiprocessor reads when all do
START_US, MERGE_US = (
    6.0,
    4.0,
)  # lost by a wave of programs, on starting and on waiting for the last; by merging
MAX_ROWS = 64  # of a tile: the rows of one kv head up to which a decode program holds all of them


@lru_cache(maxsize=1024)
def wants(problem: Problem, device: DeviceInfo | None) -> bool:
    """Whether splitting and head packing serve `problem` better than a program per query head and block of rows."""
    if problem.dropout_p or problem.max_k < 256:
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


@lru_cache(maxsize=1024)
def configs(problem: Problem, shared_memory: int, multiprocessors: int) -> tuple[FwdConfig, ...]:
    """Tiles that should fit, best first; block_m counts rows of a kv head: queries times the heads of a group.

    Chosen by sweeps of bench/decode.py's rows, head dims 64 and 96 and fp32 on an H200 (docs/perf/kvcache.md): with
    more programs than multiprocessors several share one and hide each other's latency; a single one must have many
    loads in flight.
    With num_splits 1 the choice leaves the batch out, so that a sequence gives the same bits in any batch.
    """
    # a matrix unit takes 16 rows at least; fp32 has none, and there every row costs as much as the others
    block_m = min(MAX_ROWS, max(16 if problem.dtype.itemsize < 4 else 1, _power(rows(problem))))
    d, dv = (max(16, _power(x)) for x in (problem.head_dim, problem.head_dim_v))
    itemsize = problem.dtype.itemsize
    large, light = (_keys(size, (d + dv) * itemsize) for size in (TILE_BYTES, TILE_BYTES // 2))
    small = max(16, large // 2)
    wide = problem.head_dim + problem.head_dim_v >= 512 and itemsize < 4
    share = programs(problem, block_m) / multiprocessors
    if problem.num_splits == 1:
        first = (large, 3)
    elif share > 1:
        # light tiles where all programs fit on the machine together: those on a crowded multiprocessor then read as
        # fast as the others
        all_fit = light >= 64 and share * LIGHT_BYTES <= shared_memory and share <= RESIDENT
        first = (light, 3) if all_fit else (large, 2)
    elif share * problem.max_k >= 2048 and 2 * large * (d + dv) * itemsize <= TILE_BYTES and itemsize < 4:
        # short rows, many steps, and no other program that hides the latency of one
        first = (2 * large, 3)
    elif problem.paged and share * problem.max_k >= 2048:
        first = (large, 3)  # longer steps, since each looks pages up
    elif small < 64 or (problem.head_dim + problem.head_dim_v) * itemsize * small < TILE_BYTES // 2:
        # a step takes its time however little it reads: few keys, or few bytes a key, want larger steps
        first = (large, 4 if (d + dv) * itemsize * large <= TILE_BYTES // 2 else 3)
    else:
        first = (small, 4)
    found = []
    for block_n, stages in (first, (large, 3), (small, 3), (small, 2), (16, 2), (16, 1)):
        warps = 8 if block_m * dv > 64 * 128 or wide or block_n > large else 4
        used = max(stages - 1, 1) * block_n * (d + dv) + block_m * (d + block_n)
        if used * itemsize <= shared_memory or stages == 1:
            found.append(FwdConfig(block_m, block_n, warps, stages))
    return tuple(found)


def programs(problem: Problem, block_m: int) -> int:
    """Programs without splits."""
    return problem.batch * problem.kv_heads * -(-rows(problem) // block_m)


@lru_cache(maxsize=1024)
def num_splits(problem: Problem, config: FwdConfig, multiprocessors: int) -> int:
    """Spans to cut the keys of a sequence into: those that should take the least time.

    Programs run in waves of one per multiprocessor. The constants are of an H200; only their ratios matter.
    """
    if problem.num_splits:
        return min(problem.num_splits, MAX_SPLITS)
    units = programs(problem, config.block_m)
    if multiprocessors < units <= _resident(problem, config) * multiprocessors:
        return 1  # all run at once
    keys = visible_keys(problem)
    read_us = keys * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize / BYTES_PER_US

    def time_us(spans: int) -> float:
        waves = -(-units * spans // multiprocessors)
        return waves * (read_us / spans + START_US) + (MERGE_US if spans > 1 else 0.0)

    return min(range(1, max(1, min(MAX_SPLITS, keys // config.block_n)) + 1), key=time_us)


def _resident(problem: Problem, config: FwdConfig) -> int:
    """Programs that share a multiprocessor: of `light` tiles (see `configs`) several, else one counts as filling it."""
    row = (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    return RESIDENT if config.num_stages == 3 and 2 * config.block_n * row <= TILE_BYTES else 1


def visible_keys(problem: Problem) -> int:
    """Most keys that the rows of one sequence can see together."""
    if problem.left is None:
        return problem.max_k
    right = 0 if problem.right is None else problem.right
    return min(problem.max_k, problem.left + 1 + problem.max_q + right)


def _keys(size: int, row: int) -> int:
    """The largest power of two (a tile has no other length) of keys of `row` bytes that fit, between 16 and 128."""
    return max(16, min(128, _power(size // row + 1) // 2))


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()
