"""Host side of the Hopper backward: what it can run, how it is cut, and the three launches.

Before: row statistics (`hopper_pre.bwd_before`). Main: `hopper.attn_bwd_hopper`. Then dQ: up to head dimension 128 from
the fp32 sums of the main kernel to the caller's tensor (`hopper_pre.bwd_after`), above by `hopper_dq.attn_bwd_dq`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Gradients, Operands, Problem

LOG2E = 1.4426950408889634
_UNIT = 8  # elements of 16 bits in the 16 bytes that TMA counts in
_AHEAD = 264  # programs between zeroing a sum of dQ and adding to it: two for each SM of an H200
_MAX_INT = 0x7FFF0000  # the largest extent that TMA was seen to take


class Features(NamedTuple):
    """What the mask, the score and the storage ask of the code; compile time."""

    left: bool  # a bound on the keys left of the diagonal
    right: bool  # a bound on the keys right of it (causal: 0)
    softcap: bool
    ragged: bool  # lengths are read from the device: TMA does not know where a sequence ends


class Schedule(NamedTuple):
    """How the work is cut; compile time. `schedule` below says which and why."""

    D: int  # head dimension of q and k, padded to 64, 128 or 256
    DV: int  # head dimension of v, padded likewise, at most D
    BLOCK_M: int  # queries a step
    BLOCK_N: int  # keys of a program
    STAGES: int  # ring of Q and dO tiles
    DS_STAGES: int  # pairs of buffers of dS, above 128 of P
    FOLD: bool = False  # products, not additions, start S and dP from the row statistics
    DEFER: bool = False  # dQ of a step is computed in the next one
    ORDERED: bool = False  # programs add to dQ in a fixed order; above 128 none adds to another's
    SINGLE: bool = False  # one warpgroup a program, two programs a processor (`hopper_single.py`)
    DELAY: int = 0  # debug build: warps sleep up to so many nanoseconds here and there, to provoke races


def supports(problem: Problem) -> str | None:
    """Why the Hopper backward cannot run `problem`; None when it can."""
    checks = (
        (
            problem.dtype not in (torch.bfloat16, torch.float16),
            f"needs float16 or bfloat16, got {problem.dtype}",
        ),
        (problem.head_dim > 256 or problem.head_dim_v > 256, "head dimension above 256"),
        (problem.head_dim % 8 or problem.head_dim_v % 8, "head dimension not a multiple of 8 (TMA rows)"),
        (
            max(problem.head_dim, problem.head_dim_v) <= 32,
            "head dimension of at most 32 wastes half of a 64-wide tile",
        ),
        (problem.max_q == 0 or problem.max_k == 0, "no queries or no keys"),
        (problem.batch > 65535, "more than 65535 sequences (a dimension of a grid)"),
        (problem.scale <= 0, "softmax scale not positive (masking multiplies -inf by it)"),
        (problem.dropout_p > 0, "dropout"),
        (problem.alibi, "ALiBi"),
        (problem.paged, "paged keys have no backward"),
        (problem.leftpad, "left-padded keys"),
        (problem.batch_idx, "cache_batch_idx"),
    )  # fmt: skip
    return next((reason for refused, reason in checks if refused), None)


def _padded(dim: int) -> int:
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


@lru_cache(maxsize=1024)
def features(problem: Problem) -> Features:
    ragged = problem.varlen_q or problem.varlen_k or problem.seqused_q or problem.seqused_k
    return Features(problem.left is not None, problem.right is not None, problem.softcap > 0, ragged)


@lru_cache(maxsize=1024)
def schedule(problem: Problem) -> Schedule:
    """How to cut `problem`; other cuts were slower or did not fit, see docs/perf/hopper-backward.md."""
    D = _padded(max(problem.head_dim, problem.head_dim_v))
    DV = _padded(problem.head_dim_v)
    # queries a step, keys of a program, ring of Q and dO, buffers of dS: what registers and shared memory hold
    tile = {64: (128, 128, 2, 2), 128: (64, 128, 2, 2), 256: (64, 64, 2, 1)}[D]
    T = Schedule(D, DV, *tile, ORDERED=problem.deterministic and D < 256)
    # with a softcap the lse is needed after the cap
    T = T._replace(FOLD=D == 128 and problem.softcap == 0)
    # with few steps a key tile, the step more that this costs is not won back: causal 1k 596 -> 612 us, 2k 959 -> 924
    if D == 64 and (problem.right is None or problem.max_q > 1024):
        T = T._replace(DEFER=True, DS_STAGES=3)
    # a program of few steps spends a third of its time at its start and end: causal 256 421 -> 376 us, 1k 594 -> 564;
    # the steps themselves are slower, so with twice as many it loses. A softcap lacks the registers
    few = problem.max_q * problem.group <= (512 if problem.right is None else 1024)
    if D == 64 and few and not problem.deterministic and problem.softcap == 0:
        T = Schedule(D, DV, BLOCK_M=64, BLOCK_N=128, STAGES=2, DS_STAGES=1, SINGLE=True)
    return T


def group_width(problem: Problem) -> int:
    """(batch, kv head) pairs whose key tiles alternate: as many as keep their Q and dO in 16 MiB of L2.

    Ordered sums want more where a mask makes key tiles short: a tile cannot start faster after the one before in its
    pair than turns are passed on. See docs/perf/hopper-backward.md for the times behind the other numbers.
    """
    ordered = schedule(problem).ORDERED
    if problem.right is None and not ordered:
        return 1
    bytes_of_pair = problem.max_q * (problem.head_dim + problem.head_dim_v) * 2 * problem.group

    def fit(mebibytes: int) -> int:
        return max(1, (mebibytes << 20) // bytes_of_pair)

    most = fit(16)
    if ordered and problem.right is not None:
        most = min(fit(64), max(16, most))
    elif ordered:
        most = fit(8)
    return _power_of_two(min(most, problem.batch * problem.kv_heads))


def dq_group_width(problem: Problem) -> int:
    """(batch, head) pairs whose query tiles alternate in `attn_bwd_dq`: as many as keep K and V in 16 MiB of L2."""
    if problem.right is None:
        return 1
    bytes_of_pair = problem.max_k * (problem.head_dim + problem.head_dim_v) * 2
    most = max(1, (16 << 20) // bytes_of_pair) * problem.group
    return _power_of_two(min(most, problem.batch * problem.heads))


def _power_of_two(most: int) -> int:
    """The largest power of two up to `most` > 0."""
    return 1 << most.bit_length() - 1


def _waves(T: Schedule, programs: int) -> int:
    """Groups of so many programs that cover `_AHEAD`."""
    return -(-_AHEAD * (2 if T.SINGLE else 1) // programs)


def piece_columns(T: Schedule) -> int:
    """Columns of a piece of dQ, which has 64 rows: what one warpgroup computes at once."""
    return T.D if T.BLOCK_M == 128 or T.SINGLE else T.D // 2


def divider(d: int) -> tuple[int, int]:
    """(multiplier, shift) with which `hopper_tiles.quotient` divides by d > 0; both as signed 32 bits."""
    shift = (d - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // d)
    return multiplier - (multiplier >> 31 << 32), shift


class Plan(NamedTuple):
    """All of a problem's launches that does not depend on its tensors."""

    T: Schedule
    F: Features
    boxes: tuple  # (block shape, layout) of a tile of q, dout, k, v; of the row statistics; of a piece of dQ
    key_tiles: int
    width: int
    blocks: int  # of ROWS padded query rows, for the kernel before
    rows: int
    dividers: tuple  # of a program's number, see `hopper_tiles.order`; of a pair by the kv heads
    pairs: int  # (batch, kv head) pairs; kv heads where the key tiles of all sequences are listed
    ahead: int  # (batch, kv head) pairs whose sums of dQ are zeroed before the main kernel; it zeroes so far ahead
    dq_tiles: int  # tiles of queries of `attn_bwd_dq`; with their own group width and dividers
    dq_width: int
    dq_dividers: tuple


@lru_cache(maxsize=1024)
def plan(problem: Problem, T: Schedule | None = None) -> Plan:
    """How `problem` is launched; `T` replaces the schedule for experiments."""
    from triton.experimental.gluon import language as gl

    T = T or schedule(problem)
    F = features(problem)
    kind = gl.bfloat16 if problem.dtype == torch.bfloat16 else gl.float16

    def box(rows: int, dim: int):
        block = [1, 1, 1, rows, dim] if F.ragged else [1, 1, rows, dim]
        return block, gl.NVMMASharedLayout.get_default_for(block, kind)

    def flat(*block: int):
        return list(block), gl.NVMMASharedLayout(0, 32, rank=len(block))

    keys = 64 if T.D <= 128 else T.BLOCK_N
    piece = 64 * piece_columns(T) // 256
    stats = flat(T.BLOCK_M * 2 if T.SINGLE else T.BLOCK_M)  # both rows at once, or one
    if T.FOLD:
        stats = [T.BLOCK_M, 16], gl.NVMMASharedLayout(32, 16, rank=2)
    boxes = (
        box(T.BLOCK_M, T.D), box(T.BLOCK_M, T.DV), box(keys, T.D), box(keys, T.DV), stats, flat(piece, 256),
    )  # fmt: skip
    rows = 64 if T.D <= 128 else 32
    blocks = -(-problem.max_q // T.BLOCK_M) * T.BLOCK_M // rows
    key_tiles, width = -(-problem.max_k // T.BLOCK_N), group_width(problem)
    ahead = _waves(T, key_tiles * width) * width
    if F.ragged:  # all before, unless `listed`
        ahead = problem.batch * problem.kv_heads
    dq_tiles, dq_width = -(-problem.max_q // 128), dq_group_width(problem)
    return Plan(
        T, F, boxes, key_tiles, width, blocks, rows, _dividers(key_tiles, width, problem.batch, problem.kv_heads),
        problem.batch * problem.kv_heads, ahead, dq_tiles, dq_width,
        _dividers(dq_tiles, dq_width, problem.batch, problem.heads),
    )  # fmt: skip


def _dividers(tiles: int, width: int, batch: int, heads: int) -> tuple:
    """`Plan.dividers` for `tiles` programs of each of batch * heads pairs."""
    return tuple(divider(d) for d in (tiles * width, width, batch * heads % width or width, heads))


def listed(p: Plan, problem: Problem, slots: int) -> Plan:
    """`p` for packed lengths: programs walk through a list of `slots` key tiles of all sequences, head by head."""
    pairs = problem.kv_heads
    dividers = _dividers(slots, 1, 1, pairs)
    return p._replace(key_tiles=slots, width=1, dividers=dividers, ahead=_waves(p.T, slots), pairs=pairs)


def addressable(x: Tensor) -> bool:
    """Whether TMA can walk `x`: 16-byte aligned base and strides, last dimension contiguous, nothing broadcast."""
    strides = x.stride()
    return (
        strides[-1] == 1
        and x.data_ptr() % 16 == 0
        and all(s % _UNIT == 0 and (s > 0 or n == 1) for s, n in zip(strides[:-1], x.shape, strict=False))
    )


def for_tma(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy of it if TMA cannot address its strides (as FlashAttention-2 copies such inputs)."""
    return x if addressable(x) else x.clone(memory_format=torch.contiguous_format)


def _tiles_of(x: Tensor, ragged: bool, part):
    """Descriptor of a (B, S, H, D) or packed (S, H, D) tensor, in tiles of one head.

    Dense: (B, H, S, D). Ragged, so that TMA clips at the end of any sequence: see `tile/hopper.py`; the end of the
    sequence counts in 16 bytes.
    """
    from flash_attn.forward.hopper_launch import Box

    shape, strides = x.shape, x.stride()
    heads, dim = shape[-2:]
    seq, head = strides[-3:-1]
    # the stride of a dimension of size 1 is free, and may be one that TMA refuses
    head = head if heads > 1 else _UNIT
    if ragged:
        return Box(x, [_MAX_INT, _MAX_INT, heads, 2**30, dim], [2**34 - seq, _UNIT, head, seq, 1], *part)
    seq = seq if shape[1] > 1 else _UNIT
    return Box(
        x, [shape[0], heads, shape[1], dim], [strides[0] if shape[0] > 1 else _UNIT, head, seq, 1], *part
    )


def _unit(x: Tensor, packed: bool) -> tuple[int, int]:
    """(batch stride, row stride) in 16 bytes."""
    return (0, x.stride(0) // _UNIT) if packed else (x.stride(0) // _UNIT, x.stride(1) // _UNIT)


def _strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """(batch, seq, head); the batch stride of a packed tensor is 0."""
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _row_strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """(batch, head, row) of lse or dlse."""
    if x is None:
        return (0, 0, 0)
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _target(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if given is None else given


def query_tiles(problem: Problem, total_q: int, block: int) -> int:
    """Padded query tiles a head; sequence b of a packed tensor starts at tile cu_seqlens_q[b] // block + b."""
    if problem.varlen_q:
        return total_q // block + problem.batch
    return problem.batch * -(-problem.max_q // block)


def backward(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:  # fmt: skip
    """Gradients of `problem` from the passed out and lse.

    Args:
        out, dout: like q with the head dimension of v. lse, dlse: fp32 (B, H, M), packed (H, total_q).
        into: where to write dq, dk, dv; strided views allowed, last dimension contiguous; None: allocated here.
    """
    dq, dk, dv = (_target(given, like) for given, like in zip(into, (ops.q, ops.k, ops.v), strict=True))
    if ops.q.numel() == 0 or ops.k.numel() == 0:
        for x in (dq, dk, dv):
            x.zero_()
        return Gradients(dq, dk, dv, None if ops.sink is None else torch.zeros_like(ops.sink))
    # the kernel before sums delta in an order that depends on how wide it may load: only one is compiled
    out, dout = for_tma(out), for_tma(dout)
    ops = ops._replace(q=for_tma(ops.q), k=for_tma(ops.k), v=for_tma(ops.v))
    p = plan(problem)
    work_list = None
    if problem.varlen_q and problem.varlen_k and p.T.D <= 128:
        p = listed(p, problem, ops.k.shape[0] // p.T.BLOCK_N + problem.batch)
        work_list = torch.empty(p.key_tiles * 8, dtype=torch.int32, device=ops.q.device)
    T, where = p.T, ops.q.device
    tiles = query_tiles(problem, ops.q.shape[0], T.BLOCK_M)
    padded = problem.heads * tiles * T.BLOCK_M
    numbers, kind = (16, torch.bfloat16) if T.FOLD else (2, torch.float32)
    stats = torch.empty(padded * numbers, dtype=kind, device=where)
    work = Workspace(stats, None, None, None, tiles, work_list)
    if T.D <= 128:
        turns = torch.empty(problem.heads * tiles * 2, dtype=torch.int32, device=where) if T.ORDERED else None
        work = work._replace(
            dq_acc=torch.empty(padded * T.D, dtype=torch.float32, device=where),
            zeroed=torch.empty(p.pairs, dtype=torch.int32, device=where),
            turns=turns,
        )
    dsink_parts = _before(problem, p, ops, out, lse, dout, dlse, work)
    _main(problem, p, ops, dout, work, dk, dv)
    if T.D <= 128:
        _after(problem, p, ops, work, dq)
    else:
        _dq(problem, p, ops, dout, work, dq)
    if problem.varlen_q or problem.varlen_k:
        _zero_rest(problem, ops, dq, dk, dv)
    dsink = None if dsink_parts is None else dsink_parts.sum(1).to(ops.sink.dtype)  # type: ignore[union-attr]
    return Gradients(dq, dk, dv, dsink)


class Workspace(NamedTuple):
    stats: Tensor  # fp32 per padded query tile: BLOCK_M of -lse, BLOCK_M of -delta; or bf16, each `hopper_pre.thirds`
    # up to head dimension 128
    dq_acc: Tensor | None  # fp32 sums of dQ, padded query tiles in the order of an accumulator
    zeroed: Tensor | None  # int32 per (batch, kv head): programs that have zeroed their share of its sums
    turns: Tensor | None  # int32 (heads, tiles, 2): programs that have added to a piece of dQ, if ordered
    tiles: int  # padded query tiles a head
    work_list: Tensor | None  # int32 (entries, 8), see `hopper_pre.list_key_tiles`


_binaries: dict[Any, Any] = {}


def _launch(kernel, grid, args, constants, problem, key=None) -> None:
    """Launch; `key` says all that decides between compiled kernels, so that finding it again costs one lookup."""
    from flash_attn.utils import launcher

    if key is None:
        launcher.launch(kernel, grid, args, constants, problem=problem)
        return
    binary = _binaries.get(key)
    if binary is None:
        binary = _binaries[key] = launcher.prepare(kernel, args, constants, problem=problem)
    binary.launch(grid, (*args, *constants.values()))


def _before(problem, p, ops, out, lse, dout, dlse, work) -> Tensor | None:
    from flash_attn.backward.hopper_pre import bwd_before

    packed, T = problem.varlen_q, p.T
    parts = None
    grid = (p.blocks, problem.heads, problem.batch)
    if work.work_list is not None:
        grid = ((out.shape[0] // T.BLOCK_M + problem.batch) * (T.BLOCK_M // p.rows), problem.heads, 1)
    if ops.sink is not None:
        parts = torch.empty(problem.heads, grid[0] * grid[2], dtype=torch.float32, device=dout.device)
    zeroing = 4 if T.SINGLE else 1  # warps of a program, see `hopper_tiles.zeroing_warps`
    # the main kernel adds outer * (q.k + initial value), or with a softcap uses the base-2 lse itself
    lse_scale = LOG2E if problem.softcap > 0 else 1.0 / problem.scale
    args = (
        out, dout, lse, dlse, ops.sink, work.stats, work.dq_acc, work.zeroed, work.turns, parts,
        _strides(out, packed), _strides(dout, packed),
        _row_strides(lse, packed), _row_strides(dlse, packed),
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, work.work_list),
        (problem.max_q, work.tiles, problem.kv_heads, p.ahead, p.key_tiles * zeroing,
         out.shape[0], problem.batch, p.key_tiles), lse_scale,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=T.BLOCK_M, BLOCK_N=T.BLOCK_N, ROWS=p.rows, D=T.D, DV=T.DV, DIM_V=problem.head_dim_v, FOLD=T.FOLD
    )  # fmt: skip
    sink = None if ops.sink is None else ops.sink.dtype
    key = (
        "before", p.T, problem.head_dim_v, problem.dtype, out.device.index, dlse is None, sink,
        problem.varlen_q, problem.varlen_k, problem.seqused_q, problem.seqused_k,
    )  # fmt: skip
    _launch(bwd_before, grid, args, constants, problem, key)
    return parts


def main_arguments(
    problem: Problem, p: Plan, ops: Operands, dout: Tensor, work: Workspace, dk: Tensor, dv: Tensor
):  # fmt: skip
    """(grid, arguments, constants) of the main kernel; ops, dout, dk and dv must be `addressable`."""
    from flash_attn.forward.hopper_launch import Box
    from flash_attn.tile.score import factors

    F, packed_q, packed_k = p.F, problem.varlen_q, problem.varlen_k
    q, k, v = ops[:3]
    of_q, of_dout, of_k, of_v, of_stats, of_sums = p.boxes
    units: tuple = (None,) * 6
    if F.ragged:
        units = (_unit(q, packed_q), _unit(dout, packed_q), *(_unit(x, packed_k) for x in (k, v, dk, dv)))
    sums = None
    if work.dq_acc is not None:
        sums = Box(work.dq_acc, [work.dq_acc.numel() // 256, 256], [256, 1], *of_sums)
    stats = Box(work.stats, [work.stats.numel()], [1], *of_stats)
    if p.T.FOLD:
        stats = Box(work.stats, [work.stats.numel() // 8, 8], [8, 1], *of_stats)
    args = (
        _tiles_of(q, F.ragged, of_q), _tiles_of(dout, F.ragged, of_dout), _tiles_of(k, F.ragged, of_k),
        _tiles_of(v, F.ragged, of_v), stats, sums,
        _tiles_of(dk, F.ragged, of_k), _tiles_of(dv, F.ragged, of_v), units,
        work.dq_acc, work.zeroed, work.turns,
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, work.work_list),
        (problem.max_q, problem.max_k, problem.heads, problem.kv_heads, p.pairs, p.width, p.key_tiles, work.tiles,
         p.ahead, *p.dividers, problem.group),
        (problem.left or 0, problem.right or 0), factors(problem.scale, problem.softcap), problem.scale,
    )  # fmt: skip
    return (p.key_tiles * p.pairs, 1, 1), args, dict(F=F, T=p.T)


def _main(problem, p, ops, dout, work, dk, dv) -> None:
    if p.T.SINGLE:
        from flash_attn.backward.hopper_single import attn_bwd_hopper_single as kernel
    else:
        from flash_attn.backward.hopper import attn_bwd_hopper as kernel

    # TMA writes dk and dv: into tensors it can address, copied where the caller's are not
    dk_to, dv_to = for_tma(dk), for_tma(dv)
    grid, args, constants = main_arguments(problem, p, ops, dout, work, dk_to, dv_to)
    key = (
        "main", p.T, p.F, problem.dtype, dk.device.index, problem.varlen_q, problem.varlen_k,
        problem.seqused_q, problem.seqused_k,
    )  # fmt: skip
    _launch(kernel, grid, args, constants, problem, key)
    if dk_to is not dk:
        dk.copy_(dk_to)
    if dv_to is not dv:
        dv.copy_(dv_to)


def dq_arguments(problem: Problem, p: Plan, ops: Operands, dout: Tensor, work: Workspace, dq: Tensor):
    """(grid, arguments, constants) of `attn_bwd_dq`; ops, dout and dq must be `addressable`."""
    from flash_attn.tile.score import factors

    F, packed_q, packed_k = p.F, problem.varlen_q, problem.varlen_k
    q, k, v = ops[:3]
    of_q, of_dout, of_k, of_v = p.boxes[:4]
    units: tuple = (None,) * 5
    if F.ragged:
        q_units, k_units = (_unit(x, packed_q) for x in (q, dout)), (_unit(x, packed_k) for x in (k, v))
        units = (*q_units, *k_units, _unit(dq, packed_q))
    pairs = problem.batch * problem.heads
    args = (
        _tiles_of(q, F.ragged, of_q), _tiles_of(dout, F.ragged, of_dout), _tiles_of(k, F.ragged, of_k),
        _tiles_of(v, F.ragged, of_v), _tiles_of(dq, F.ragged, of_q), units, work.stats,
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, None),
        (problem.max_q, problem.max_k, problem.heads, problem.heads, pairs, p.dq_width, p.dq_tiles, work.tiles,
         0, *p.dq_dividers, problem.group),
        (problem.left or 0, problem.right or 0), factors(problem.scale, problem.softcap), problem.scale,
    )  # fmt: skip
    return (p.dq_tiles * pairs, 1, 1), args, dict(F=F, T=p.T)


def _dq(problem, p, ops, dout, work, dq) -> None:
    from flash_attn.backward.hopper_dq import attn_bwd_dq

    dq_to = for_tma(dq)
    grid, args, constants = dq_arguments(problem, p, ops, dout, work, dq_to)
    key = (
        "dq", p.T, p.F, problem.dtype, dq.device.index, problem.varlen_q, problem.varlen_k,
        problem.seqused_q, problem.seqused_k,
    )  # fmt: skip
    _launch(attn_bwd_dq, grid, args, constants, problem, key)
    if dq_to is not dq:
        dq.copy_(dq_to)


def _after(problem, p, ops, work, dq) -> None:
    from flash_attn.backward.hopper_pre import bwd_after

    columns = piece_columns(p.T)
    a_tile = p.T.BLOCK_M // 64 * (p.T.D // columns)
    grid = (-(-problem.max_q // p.T.BLOCK_M) * a_tile, problem.heads, problem.batch)
    if work.work_list is not None:
        grid = ((dq.shape[0] // p.T.BLOCK_M + problem.batch) * a_tile, problem.heads, 1)
    args = (
        work.dq_acc, dq, _strides(dq, problem.varlen_q), ops.cu_seqlens_q,
        (problem.max_q, work.tiles, dq.shape[0], problem.batch),
        problem.scale,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=p.T.BLOCK_M, D=p.T.D, DIM=problem.head_dim, COLS=columns, LISTED=work.work_list is not None
    )
    key = (
        "after",
        p.T.BLOCK_M,
        p.T.D,
        columns,
        problem.head_dim,
        problem.dtype,
        dq.device.index,
        addressable(dq),
        problem.varlen_q,
        problem.varlen_k,
    )
    _launch(bwd_after, grid, args, constants, problem, key)


def _zero_rest(problem, ops, dq, dk, dv) -> None:
    from flash_attn.backward.hopper_pre import zero_after_end

    args = (
        dq, dk, dv, _strides(dq, problem.varlen_q), _strides(dk, problem.varlen_k), _strides(dv, problem.varlen_k),
        ops.cu_seqlens_q, ops.cu_seqlens_k, (dq.shape[0], dk.shape[0]), problem.batch,
    )  # fmt: skip
    D, DV = problem.head_dim, problem.head_dim_v
    constants = dict(
        HEADS=problem.heads, KV_HEADS=problem.kv_heads, D=D, DV=DV, PD=_padded(D), PDV=_padded(DV)
    )  # fmt: skip
    _launch(zero_after_end, (64, 1, 1), args, constants, problem)
