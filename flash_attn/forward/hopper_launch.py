"""From a Problem and its tensors to a launch of `attn_fwd_hopper`."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from flash_attn.forward.hopper import attn_fwd_hopper
from flash_attn.forward.hopper_config import Config
from flash_attn.problem import Operands, Problem
from flash_attn.tile.hopper import RAGGED_ROWS
from flash_attn.tile.score import factors
from flash_attn.tuning.hopper import forward_tile, split_dim
from flash_attn.utils import device, launcher, replay

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_UNIT = 8  # elements of 16 bits in the 16 bytes that TMA counts in
_MAX_INT = 0x7FFF0000
L2_KEYS = 32 << 20  # bytes of K and V that one group of heads may keep in L2 (50 MB on H100 and H200)
SWIZZLE = 16  # programs in step read the same keys at the same time: groups of this size need not fit


class Box(NamedTuple):
    """What Triton's launcher reads of a TMA descriptor; Triton's own class takes microseconds to build."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any
    padding: str = "zero"
    round_f32_to_tf32: bool = False


class Plan(NamedTuple):
    """All of a launch that does not depend on the tensors."""

    config: Config
    registers: tuple[int, int]  # per thread of a consumer and of the producer
    parts: tuple  # ((block shape, layout) or None) of q0, q1, k0, k1, v0, v1, o0, o1
    swizzle: int
    blocks: int  # query blocks of the longest sequence
    constants: dict[str, Any]


@lru_cache(maxsize=1024)
def plan(problem: Problem, changes: tuple = ()) -> Plan:
    """How `problem` is launched; `changes` are ((field of Config or "registers", value), ...) for experiments."""
    tile = _tile(problem) | dict(changes)
    registers, swizzle = tuple(tile.pop("registers")), tile.pop("swizzle", None)
    D0, D1 = split_dim(problem.head_dim)
    V0, V1 = split_dim(problem.head_dim_v)
    barriers = 2 * tile["STAGES"] + (2 if tile["CHAIN"] else 1) + tile["PINGPONG"] * tile["WARPGROUPS"]
    assert barriers <= 14 - tile["WARPGROUPS"], "not enough named barriers"
    config = Config(
        D0=D0, D1=D1, V0=V0, V1=V1, **tile,
        left=problem.left is not None, right=problem.right is not None, softcap=problem.softcap != 0.0,
        sink=problem.sink, packed_q=problem.varlen_q, packed_k=problem.varlen_k,
        used_q=problem.seqused_q, used_k=problem.seqused_k,
    )  # fmt: skip
    ragged_q, ragged_k = problem.varlen_q, problem.varlen_k or problem.seqused_k

    def part(rows: int, dim: int, ragged: bool):
        if not dim:
            return None
        block = [1, 1, 1, rows, dim] if ragged else [1, 1, rows, dim]
        return block, gl.NVMMASharedLayout.get_default_for(block, _GLUON[problem.dtype])

    parts = (
        part(64, D0, ragged_q), part(64, D1, ragged_q),
        part(config.BN, D0, ragged_k), part(config.BN, D1, ragged_k),
        part(config.BN, V0, ragged_k), part(config.BN, V1, ragged_k),
        part(64, V0, ragged_q), part(64, V1, ragged_q),
    )  # fmt: skip
    constants = {
        "C": config,
        "CONSUMER_REGS": registers[0],
        "PRODUCER_REGS": registers[1],
        "DV": problem.head_dim_v,
    }
    blocks = -(-problem.max_q // (64 * config.WARPGROUPS))
    return Plan(config, registers, parts, swizzle or _swizzle(problem), blocks, constants)


def _tile(problem: Problem) -> dict[str, Any]:
    tile = forward_tile(problem, device.info())
    # measured with Triton 3.6; ptxas of 3.9 spills 160 bytes with Q in registers at D = 256
    if problem.head_dim > 192 and not triton.__version__.startswith("3.6."):
        tile = tile | dict(QREG=0)
    return tile


def _swizzle(problem: Problem) -> int:
    """(sequence, head) pairs worked on together: as many as keep their keys in L2, if blocks differ in length."""
    if problem.right is None:
        return 1
    keys = problem.max_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    fit = max(SWIZZLE, L2_KEYS // keys) * problem.group
    pairs = problem.batch * problem.heads
    swizzle = 1
    while swizzle * 2 <= min(fit, pairs):
        swizzle *= 2
    return swizzle


def addressable(x: Tensor) -> bool:
    """Whether TMA can walk `x`: 16-byte aligned base and strides, last dimension contiguous, nothing broadcast."""
    strides = x.stride()
    if x.data_ptr() % 16 or strides[-1] != 1:
        return False
    return all(s % _UNIT == 0 and (s > 0 or n == 1) for s, n in zip(strides[:-1], x.shape[:-1], strict=True))


def _template(shape: tuple, strides: tuple, packed: bool, ragged: bool) -> tuple[list[int], list[int]]:
    """(shape, strides) of the TMA descriptor of a tensor."""
    if packed:
        (rows, heads, dim), (row_stride, head_stride, _) = shape, strides
    else:
        (batch, rows, heads, dim), (batch_stride, row_stride, head_stride, _) = shape, strides
    # a dimension of size 1 may have any stride; TMA wants a multiple of 16 bytes all the same
    head_stride = head_stride if heads > 1 else _UNIT
    if ragged:
        wrap = (1 << 34) - row_stride
        return [_MAX_INT, _MAX_INT, heads, RAGGED_ROWS.value, dim], [wrap, _UNIT, head_stride, row_stride, 1]
    row_stride = row_stride if rows > 1 else _UNIT
    batch_stride = batch_stride if batch > 1 else _UNIT
    return [batch, heads, rows, dim], [batch_stride, head_stride, row_stride, 1]


def _units(strides: tuple, packed: bool) -> tuple[int, int]:
    """(batch, row) strides in units of 16 bytes."""
    return (0, strides[0] // _UNIT) if packed else (strides[0] // _UNIT, strides[1] // _UNIT)


class Prepared(NamedTuple):
    """All of a call that depends on shapes and strides but not on addresses."""

    boxes: tuple  # of q0, q1, k0, k1, v0, v1, out0, out1: (shape, strides, block shape, layout) or None
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    packed: bool
    tail: tuple  # arguments from `sizes` on, then the constants
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    draws: bool  # there are more tiles than programs


def prepare(problem: Problem, ops: Operands, changes: tuple = ()) -> Prepared:
    """What to launch for `problem` with operands of these shapes and strides."""
    p = plan(problem, changes)
    q, k, v = ops[:3]
    H, Dv = problem.heads, problem.head_dim_v
    packed_q, packed_k = problem.varlen_q, problem.varlen_k
    ragged_k = packed_k or problem.seqused_k
    out_shape = (*q.shape[:-1], Dv)
    out_strides = (H * Dv, Dv, 1) if packed_q else (q.shape[1] * H * Dv, H * Dv, Dv, 1)
    lse_shape = (H, q.shape[0]) if packed_q else (problem.batch, H, problem.max_q)
    lse_strides = (0, q.shape[0]) if packed_q else (H * problem.max_q, problem.max_q)
    total = q.shape[0] if packed_q else 0
    tiles = (
        total // (64 * p.config.WARPGROUPS) + problem.batch if packed_q else p.blocks * problem.batch
    ) * H
    walks = (
        (q.shape, q.stride(), packed_q, packed_q), (k.shape, k.stride(), packed_k, ragged_k),
        (v.shape, v.stride(), packed_k, ragged_k), (out_shape, out_strides, packed_q, packed_q),
    )  # fmt: skip
    boxes = tuple(
        None if part is None else (*_template(*walks[i // 2]), *part) for i, part in enumerate(p.parts)
    )
    units = None
    if packed_q or ragged_k:
        units = tuple(u for _, strides, packed, _ in walks for u in _units(strides, packed))
    tail = (
        (problem.max_q, problem.max_k, H, problem.group, problem.batch, p.swizzle, p.blocks, tiles, total,
         *lse_strides),
        (problem.left or 0, problem.right or 0), units, factors(problem.scale, problem.softcap),
        *p.constants.values(),
    )  # fmt: skip
    info = device.info(q.device.index)
    assert info is not None
    programs = min(tiles, info.multiprocessors)
    return Prepared(
        boxes, out_shape, lse_shape, packed_q, tail, p.constants, (programs, 1, 1), tiles > programs
    )


def arguments(ready: Prepared, ops: Operands, out: Tensor, lse: Tensor, counter: Tensor | None) -> tuple:
    """The arguments of the kernel, constants included."""
    q, k, v = ops[:3]
    q0, q1, k0, k1, v0, v1, o0, o1 = ready.boxes
    return (
        Box(q, *q0), None if q1 is None else Box(q, *q1), Box(k, *k0), None if k1 is None else Box(k, *k1),
        Box(v, *v0), None if v1 is None else Box(v, *v1), Box(out, *o0), None if o1 is None else Box(out, *o1),
        lse, out if ready.packed else None, ops.sink, counter, ops[3:7], *ready.tail,
    )  # fmt: skip


_counters: dict[tuple[int, int], Tensor] = {}
GRAPHS = 8192  # captured launches with a counter zeroed beforehand; later ones zero theirs in the graph
_spare: dict[int, tuple[Tensor, list[int]]] = {}  # per device: zeros, and which of them are free


def _counter(index: int, on: torch.device) -> Tensor:
    """Two zeros for the tile scheduler, which the kernel leaves at zero: launches that may overlap must not share them.

    Launches of one stream follow each other. A captured graph may be replayed on any stream, so each of its launches
    gets its own, zeroed by an earlier call: filling it in the graph would cost each replay 2 us.
    """
    if torch.cuda.is_current_stream_capturing():
        spare = _spare.get(index)
        if spare and spare[1]:
            return spare[0][spare[1].pop()]
        return torch.zeros(2, dtype=torch.int32, device=on)
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(2, dtype=torch.int32, device=on)
        if index not in _spare:
            _spare[index] = torch.zeros(GRAPHS, 2, dtype=torch.int32, device=on), list(range(GRAPHS))
    return counter


MOST = 4096  # calls remembered; packed batches bring ever new lengths
_ready: dict[Any, tuple[Prepared, launcher.Binary]] = {}


def _key(problem: Problem, ops: Operands, changes: tuple) -> tuple:
    q, k, v, sink = ops.q, ops.k, ops.v, ops.sink
    dtype = None if sink is None else sink.dtype
    return problem, q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.device.index, dtype, changes


def forward(problem: Problem, ops: Operands, changes: tuple = ()) -> tuple[Tensor, Tensor]:
    """(out, lse) of `problem`; q, k and v that TMA cannot walk are copied first."""
    key = _key(problem, ops, changes)
    found = _ready.get(key)
    unsure = found is None or (ops.q.data_ptr() | ops.k.data_ptr() | ops.v.data_ptr()) % 16
    if unsure and not all(addressable(x) for x in ops[:3]):
        walkable = (x if addressable(x) else x.clone(memory_format=torch.contiguous_format) for x in ops[:3])
        ops = ops._replace(**dict(zip(("q", "k", "v"), walkable, strict=True)))
        key = _key(problem, ops, changes)
        found = _ready.get(key)
    q = ops.q
    ready = found[0] if found is not None else prepare(problem, ops, changes)
    out = torch.empty(ready.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(ready.lse_shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or ops.k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    counter = replay.provided(_counter, q.device.index, q.device) if ready.draws else None
    args = arguments(ready, ops, out, lse, counter)
    if found is None:
        values = args[: -len(ready.constants)]
        binary = launcher.prepare(attn_fwd_hopper, values, ready.constants, problem=problem)
        if len(_ready) >= MOST:
            _ready.clear()
        found = _ready[key] = ready, binary
    found[1].launch(ready.grid, args)
    return out, lse
