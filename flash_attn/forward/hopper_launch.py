"""From a Problem and its tensors to a launch of `attn_fwd_hopper`."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from flash_attn.forward.hopper import Config, attn_fwd_hopper
from flash_attn.problem import Operands, Problem
from flash_attn.tile.hopper import RAGGED_ROWS
from flash_attn.tile.score import factors
from flash_attn.tuning import table
from flash_attn.utils import device, launcher

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_UNIT = 8  # elements of 16 bits in the 16 bytes that TMA counts in
_MAX_INT = 0x7FFF0000
L2_KEYS = 32 << 20  # bytes of K and V that one group of heads may keep in L2 (50 MB on H100 and H200)


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


def split_dim(d: int) -> tuple[int, int]:
    """`d` as one or two powers of two that a wgmma and a swizzled box can have; TMA pads the rest with zeros."""
    for whole in (64, 128, 256):
        if d <= whole:
            half = whole // 2
            for rest in (32, 64):
                if half >= 64 and rest < half and d <= half + rest:
                    return half, rest
            return whole, 0
    raise ValueError(f"head dim {d} > 256")


@lru_cache(maxsize=1024)
def plan(problem: Problem, changes: tuple = ()) -> Plan:
    """How `problem` is launched; `changes` are ((field of Config or "registers", value), ...) for experiments."""
    tile = _tile(problem) | dict(changes)
    registers = tile.pop("registers")
    D0, D1 = split_dim(problem.head_dim)
    V0, V1 = split_dim(problem.head_dim_v)
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

    second = (config.BN2, D0) if config.BN2 else (config.BN, D1)
    second_v = (config.BN2, V0) if config.BN2 else (config.BN, V1)
    parts = (
        part(64, D0, ragged_q), part(64, D1, ragged_q),
        part(config.BN, D0, ragged_k), part(*second, ragged_k),
        part(config.BN, V0, ragged_k), part(*second_v, ragged_k),
        part(64, V0, ragged_q), part(64, V1, ragged_q),
    )  # fmt: skip
    constants = {
        "C": config,
        "CONSUMER_REGS": registers[0],
        "PRODUCER_REGS": registers[1],
        "DV": problem.head_dim_v,
    }
    blocks = -(-problem.max_q // (64 * config.WARPGROUPS))
    return Plan(config, registers, parts, _swizzle(problem), blocks, constants)


def _tile(problem: Problem) -> dict[str, Any]:
    """The measured row nearest to `problem`, else a rule."""
    info = device.info()
    row = table.nearest(problem, info, "hopper forward") if info is not None else None
    if row is not None:
        return dict(row["config"])
    dim = sum(split_dim(max(problem.head_dim, problem.head_dim_v)))
    tile = dict(WARPGROUPS=2, BN=128, BN2=0, STAGES=2, PINGPONG=True, CHAIN=True, POLY=0, LAZY=False, SHARE=False,
                registers=(240, 24))  # fmt: skip
    if dim <= 64 and (problem.right is None or problem.max_q > 2048):
        return tile | dict(WARPGROUPS=3, STAGES=3, registers=(160, 32))
    if dim <= 64:
        return tile | dict(STAGES=4)
    if dim <= 128:
        return tile
    if problem.head_dim_v <= 128:
        return tile | dict(CHAIN=False, SHARE=True)
    return tile | dict(BN=64, PINGPONG=False, CHAIN=False, SHARE=True, STAGES=3 if dim <= 192 else 2)


def _swizzle(problem: Problem) -> int:
    """(sequence, head) pairs worked on together: as many as keep their keys in L2, if blocks differ in length."""
    if problem.right is None:
        return 1
    keys = problem.max_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    fit = max(1, L2_KEYS // keys) * problem.group
    pairs = problem.batch * problem.heads
    swizzle = 1
    while swizzle * 2 <= min(fit, pairs):
        swizzle *= 2
    return swizzle


def addressable(x: Tensor) -> bool:
    """Whether TMA can walk `x`: 16-byte aligned base and strides, last dimension contiguous, nothing broadcast."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(
            s % _UNIT == 0 and (s > 0 or n == 1) for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)
        )
    )


def _box(x: Tensor, packed: bool, ragged: bool, part) -> Box | None:
    if part is None:
        return None
    if packed:
        (_, heads, dim), (row_stride, head_stride, _) = x.shape, x.stride()
    else:
        (batch, rows, heads, dim), (batch_stride, row_stride, head_stride, _) = x.shape, x.stride()
    # a dimension of size 1 may have any stride; TMA wants a multiple of 16 bytes all the same
    head_stride = head_stride if heads > 1 else _UNIT
    if ragged:
        wrap = (1 << 34) - row_stride
        shape = [_MAX_INT, _MAX_INT, heads, RAGGED_ROWS.value, dim]
        return Box(x, shape, [wrap, _UNIT, head_stride, row_stride, 1], *part)
    row_stride = row_stride if rows > 1 else _UNIT
    batch_stride = batch_stride if batch > 1 else _UNIT
    return Box(x, [batch, heads, rows, dim], [batch_stride, head_stride, row_stride, 1], *part)


def _units(x: Tensor, packed: bool) -> tuple[int, int]:
    """(batch, row) strides in units of 16 bytes."""
    return (0, x.stride(0) // _UNIT) if packed else (x.stride(0) // _UNIT, x.stride(1) // _UNIT)


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(index: int, stream: int, on: torch.device) -> Tensor:
    """Two zeros for the tile scheduler, which the kernel leaves at zero: launches that may overlap must not share them.

    Launches of one stream follow each other. A captured graph may be replayed on any stream, so it gets its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=on)
    counter = _counters.get((index, stream))
    if counter is None:
        counter = _counters[(index, stream)] = torch.zeros(2, dtype=torch.int32, device=on)
    return counter


def arguments(
    problem: Problem, ops: Operands, p: Plan, out: Tensor, lse: Tensor, counter: Tensor
) -> tuple[tuple, int]:
    """(the run-time arguments of the kernel, how many tiles there are at most)."""
    q, k, v = ops[:3]
    H = problem.heads
    packed_q, packed_k = problem.varlen_q, problem.varlen_k
    ragged_k = packed_k or problem.seqused_k
    total = q.shape[0] if packed_q else 0
    tiles = (
        total // (64 * p.config.WARPGROUPS) + problem.batch if packed_q else p.blocks * problem.batch
    ) * H
    units = None
    if packed_q or ragged_k:
        units = (*_units(q, packed_q), *_units(k, packed_k), *_units(v, packed_k), *_units(out, packed_q))
    q0, q1, k0, k1, v0, v1, o0, o1 = p.parts
    args = (
        _box(q, packed_q, packed_q, q0), _box(q, packed_q, packed_q, q1),
        _box(k, packed_k, ragged_k, k0), _box(k, packed_k, ragged_k, k1),
        _box(v, packed_k, ragged_k, v0), _box(v, packed_k, ragged_k, v1),
        _box(out, packed_q, packed_q, o0), _box(out, packed_q, packed_q, o1),
        lse, out if packed_q else None, ops.sink, counter,
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k),
        (problem.max_q, problem.max_k, H, problem.group, problem.batch, p.swizzle, p.blocks, tiles, total,
         0 if packed_q else lse.stride(0), lse.stride(-2)),
        (problem.left or 0, problem.right or 0), units,
        factors(problem.scale, problem.softcap),
    )  # fmt: skip
    return args, tiles


_binaries: dict[Any, launcher.Binary] = {}


def forward(problem: Problem, ops: Operands, changes: tuple = ()) -> tuple[Tensor, Tensor]:
    """(out, lse) of `problem`; q, k and v that TMA cannot walk are copied first."""
    q, k, v = ops[:3]
    if not (addressable(q) and addressable(k) and addressable(v)):
        q, k, v = (x if addressable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        ops = ops._replace(q=q, k=k, v=v)
    p = plan(problem, changes)
    out = torch.empty((*q.shape[:-1], problem.head_dim_v), dtype=q.dtype, device=q.device)
    shape = (problem.heads, q.shape[0]) if problem.varlen_q else (problem.batch, problem.heads, problem.max_q)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    index = q.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    args, tiles = arguments(problem, ops, p, out, lse, _counter(index, stream, q.device))
    key = (p.config, p.registers, index, q.dtype, None if ops.sink is None else ops.sink.dtype)
    binary = _binaries.get(key)
    if binary is None:
        binary = _binaries[key] = launcher.prepare(attn_fwd_hopper, args, p.constants, problem=problem)
    binary.launch((min(tiles, device.info(index).multiprocessors), 1, 1), (*args, *p.constants.values()))
    return out, lse
