"""Attention of few query rows over many keys: bound by the bandwidth of reading K and V, so the keys are split.

The query heads that share a key/value head and their queries form the rows of one tile (row r is query r // GROUP,
head r % GROUP), so every key is read once. A program folds one span of the keys, which is every so many-th tile of
them; `forward/split.py` merges the spans.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_attn.forward import launch, split
from flash_attn.kvcache import splits
from flash_attn.problem import Operands, Problem
from flash_attn.tile import mask, rows, score, softmax
from flash_attn.tuning.config import FwdConfig
from flash_attn.tuning.precision import precision
from flash_attn.utils import device, launcher

sequence, row_offsets, load_rows = rows.sequence, rows.row_offsets, rows.load
key_range, keep = mask.key_range, mask.keep
capped, biased, LOG2E = score.capped, score.biased, score.LOG2E
update, finish = softmax.update, softmax.finish


@triton.jit
def attn_decode(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides,
    span_strides,  # from span to span: rows of out, entries of lse
    lengths,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, cache_batch_idx): pointers or None
    paging,  # (block_table or None, its row stride)
    sizes,  # (max_q, max_k, kv heads, spans, row blocks)
    band, factors, alibi_slopes, alibi_stride, sink,
    F: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, ALIGNED: tl.constexpr, TWINS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program folds one span of the keys of one kv head into BLOCK_M rows.

    It writes out and lse; or, when SPLIT, the numerator of out to `out` and the base-2 maximum and the sum to `lse`,
    which holds the maxima of all spans and then the sums: `forward/split.py` merges them.
    Span s is tiles s, s + spans, s + 2 spans, ... of the visible keys: without a window no program has to wait for the
    length of its sequence before it knows which pages it needs.
    PAGE is the page size, 0 without pages; ALIGNED: every tile of keys is whole pages, or lies inside one.
    TWINS: k and v have the same strides, so one offset of a key serves both (with pages it pays from 256 columns on).

    Grid: kv heads x spans x row blocks x sequences in one dimension, kv heads fastest: programs that run together
    read neighbouring memory. Strides are (batch, seq, head), of lse (batch, head).
    """
    cu_q, cu_k, used_q, used_k, leftpad, batch_idx = lengths
    max_q, max_k, kv_heads, spans, row_blocks = sizes
    pid = tl.program_id(0)
    # a division takes 35 instructions before the first load
    head, rest = pid % kv_heads, pid // kv_heads
    span = rest * 0
    if SPLIT:
        span, rest = rest % spans, rest // spans
    block, b = rest % row_blocks, rest // row_blocks

    start_q, owned = sequence(cu_q, None, max_q, b)
    M = owned
    if used_q is not None:
        M = tl.minimum(tl.load(used_q + b), owned)
    first, N = sequence(cu_k, None, max_k, b)
    if used_k is not None:
        N = tl.minimum(tl.load(used_k + b), N)  # a length beyond the cache reads nothing behind it
    if leftpad is not None:
        pad = tl.load(leftpad + b)
        first, N = first + pad, N - pad
    cache_row = b
    if batch_idx is not None:
        cache_row = tl.load(batch_idx + b)

    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i, heads = r // GROUP, head * GROUP + r % GROUP
    seen = i < M
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_off = row_offsets(i, start_q, b, q_strides) + heads * q_strides[2]
    q_tile = load_rows(q, q_off, seen, dims, D, BLOCK_D <= D, True)
    slope = 0.0
    if F.alibi:
        slope = tl.load(alibi_slopes + b * alibi_stride + heads)[:, None] * LOG2E

    row_lo = block * BLOCK_M // GROUP
    row_hi = tl.minimum(tl.cdiv((block + 1) * BLOCK_M, GROUP), M)
    lo, hi = key_range(row_lo, row_hi, M, N, band, F)
    lo = lo // BLOCK_N * BLOCK_N
    hi = tl.where(row_lo < M, hi, lo)
    step = BLOCK_N
    if SPLIT:
        step = spans * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sink is not None:  # a key without a value, in the first span
        m = tl.where(span == 0, tl.load(sink + heads).to(tl.float32) * LOG2E, m)
        l = tl.where(span == 0, 1.0, l)
    k += head * k_strides[2]
    v += head * v_strides[2]
    in_tile = tl.arange(0, BLOCK_N)
    # the part of the offsets of a tile that the loop does not change
    if ALIGNED:
        k_rows = (in_tile % PAGE).to(tl.int64) * k_strides[1]
        v_rows = (in_tile % PAGE).to(tl.int64) * v_strides[1]
    else:
        k_rows = row_offsets(first + in_tile, 0, cache_row, k_strides)
        v_rows = row_offsets(first + in_tile, 0, cache_row, v_strides)
    # Pages are looked up in the loop, so that Triton's pipeline loads them, too. It gives half of its stages to them,
    # hence twice as many. (By hand, a tile ahead, the compiler waits for a page where it was asked for.)
    stages: tl.constexpr = 2 * STAGES - 1 if PAGE else STAGES
    # one loop with a mask, not a masked and an unmasked one: a second pipeline would have to fill again
    for n in tl.range(lo + span * BLOCK_N, hi, step, num_stages=stages):
        cols = n + in_tile
        valid = cols < hi
        if PAGE:
            page = page_of(paging, b, first + n, max_k, PAGE, BLOCK_N, ALIGNED).to(tl.int64)
            if ALIGNED:
                inside = n % PAGE if PAGE > BLOCK_N else 0
                k_off = page * k_strides[0] + inside * k_strides[1] + k_rows
                v_off = page * v_strides[0] + inside * v_strides[1] + v_rows
            else:
                slot = (first + cols) % PAGE
                k_off = page * k_strides[0] + slot * k_strides[1]
                v_off = page * v_strides[0] + slot * v_strides[1]
        else:
            k_off, v_off = n * k_strides[1] + k_rows, n * v_strides[1] + v_rows  # strides are 64 bits wide
        if TWINS:
            v_off = k_off
        k_tile = load_rows(k, k_off, valid, dims, D, BLOCK_D <= D, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N] fp32
        x = capped(qk, factors[0], F)
        outer = factors[1]
        if F.alibi or not F.positive:
            x = biased(x, outer, i[:, None], cols[None, :], M, N, slope, F)
            outer = 1.0
        ok = valid[None, :] & keep(i[:, None], cols[None, :], M, N, band, F)
        m, l, p, rescale = update(m, l, tl.where(ok, x, float("-inf")), outer, True)
        v_tile = load_rows(v, v_off, valid, dims_v, DV, BLOCK_DV <= DV, True)
        if v_tile.dtype == tl.float32:
            # no matrix unit: a product added to acc is a chain of as many roundings as there are keys. An fma, since
            # Triton would turn a sum back into that.
            acc = tl.fma(acc, rescale[:, None], tl.dot(p, v_tile, input_precision=F.precision))
        else:
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=F.precision)

    lse += b.to(tl.int64) * lse_strides[0] + start_q + span.to(tl.int64) * span_strides[1]
    lse_off = heads * lse_strides[1] + i
    if SPLIT:
        tile = tl.where(seen[:, None], acc, 0.0)
        # the sum apart from the maximum: in one lse, its rounding would be an error of every weight of the merge
        tl.store(lse + lse_off, tl.where(seen, m, float("-inf")), mask=i < owned)
        tl.store(lse + lse_off + spans * span_strides[1], tl.where(seen, l, 0.0), mask=i < owned)
    else:
        inv, row_lse = finish(m, l)
        tile = tl.where(seen[:, None], acc * inv[:, None], 0.0)
        tl.store(lse + lse_off, tl.where(seen, row_lse, float("-inf")), mask=i < owned)
    out += (
        span.to(tl.int64) * span_strides[0] * DV
    )  # times DV, which is known, so that the compiler sees alignment
    out_off = row_offsets(i, start_q, b, out_strides) + heads * out_strides[2]
    in_out = (i < owned)[:, None] & (dims_v < DV)[None, :]
    tl.store(out + out_off[:, None] + dims_v[None, :], tile.to(out.dtype.element_ty), mask=in_out)


@triton.jit
def page_of(paging, b, at, capacity, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Pages of rows [at, at + BLOCK_N) of sequence `b`, as [BLOCK_N].

    The table has entries for `capacity` rows. What it holds behind the last key may be anything, so the loads of keys
    must mask those rows; that it is looked up all the same keeps the length of the sequence out of the way.
    """
    table = paging[0] + b.to(tl.int64) * paging[1]
    if ALIGNED:  # one look-up a page, not one a row
        COUNT: tl.constexpr = max(BLOCK_N // PAGE, 1)
        pages = at // PAGE + tl.arange(0, COUNT)
        found = tl.load(table + pages, mask=pages * PAGE < capacity, other=0)
        return tl.reshape(tl.broadcast_to(found[:, None], [COUNT, BLOCK_N // COUNT]), [BLOCK_N])
    else:
        rows = at + tl.arange(0, BLOCK_N)
        return tl.load(table + rows // PAGE, mask=rows < capacity, other=0)


class Fixed(NamedTuple):
    """What a launch needs beside addresses: it depends on shapes, strides and tiles, not on the tensors' memory."""

    grid: tuple[int, int, int]
    strides: tuple  # of q, k, v, out, lse, spans
    table_stride: int
    numbers: tuple  # sizes, band, factors
    slope_stride: int
    constants: dict[str, Any]
    config: FwdConfig
    spans: int


class Prepared(NamedTuple):
    """A compiled launch that only wants tensors, and that of the merge."""

    binary: launcher.Binary
    fixed: Fixed
    values: tuple  # of the constants
    merge: split.Prepared | None


_prepared: dict[Any, Prepared] = {}


def features(problem: Problem, config: FwdConfig) -> Any:
    """As of the other forward; but the tile may have too few rows for a matrix unit, and there is time to multiply."""
    found = launch.features(problem, config)
    return found._replace(precision="ieee") if found.precision == "tf32x3" else found


def wants(problem: Problem) -> bool:
    """Whether this kernel serves `problem` better than `forward.kernel.attn_fwd`."""
    return splits.wants(problem, device.info())


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) as `forward.launch.forward` returns them. No host synchronisation; the same result in every run."""
    if not launcher.direct(attn_decode):
        return run(problem, ops, *choose(problem)[0])
    q, k, v = ops[:3]
    key = (
        problem, q.stride(), k.stride(), v.stride(), q.shape[0], q.get_device(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        ops.alibi_slopes is not None and ops.alibi_slopes.stride(),
        ops.block_table is not None and ops.block_table.stride(),
        ops.sink is not None and ops.sink.dtype, precision(problem),
    )  # fmt: skip
    ready = _prepared.get(key)
    if ready is None:
        if len(_prepared) >= launch.PREPARED_MAX:
            _prepared.clear()
        ready = _prepared[key] = prepare(problem, ops)
    return run_prepared(ready, problem, ops)


def run_prepared(ready: Prepared, problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """Launch what `prepare` made, on the memory of `ops`."""
    fixed = ready.fixed
    out, lse = outputs(problem, ops.q, fixed.spans)
    if ready.merge is None:
        ready.binary.launch(fixed.grid, (*arguments(ops, out, lse, fixed), *ready.values))
        return out, lse
    partial = split.workspace(fixed.spans, out, lse)
    stats = partial[fixed.spans * out.numel() :]
    ready.binary.launch(fixed.grid, (*arguments(ops, partial, stats, fixed), *ready.values))
    split.merge(ready.merge, partial, stats, out, lse, ops.cu_seqlens_q)
    return out, lse


def choose(problem: Problem) -> list[tuple[FwdConfig, int]]:
    """(tiles, spans) to try, best first."""
    found = device.info()
    shared, multiprocessors = (found.shared_memory, found.multiprocessors) if found else (2**16, 1)
    tiles = splits.configs(problem, shared, multiprocessors)
    return [(c, splits.num_splits(problem, c, multiprocessors)) for c in tiles]


def prepare(problem: Problem, ops: Operands) -> Prepared:
    """The compiled kernels for `problem`, with smaller tiles where the first choice does not fit the device."""
    choices = choose(problem)
    for config, spans in choices:
        try:
            return prepare_with(problem, ops, config, spans)
        except launcher.SharedMemoryError:
            if config is choices[-1][0]:
                raise
    raise AssertionError("there is always a choice")


def prepare_with(problem: Problem, ops: Operands, config: FwdConfig, spans: int) -> Prepared:
    """The compiled kernels for tiles of `config` and `spans` spans."""
    steps = plan(problem, ops, *outputs(problem, ops.q, spans), config, spans)
    binaries = [
        launcher.prepare(s.kernel, s.args, s.constants, s.num_warps, s.num_stages, problem) for s in steps
    ]
    out, lse = steps[-1].args[2:4] if spans > 1 else steps[0].args[3:5]
    fixed = fix(problem, ops, out, lse, config, spans)
    merge = split.Prepared(binaries[1], split.fix(problem, out, lse, spans)) if spans > 1 else None
    return Prepared(binaries[0], fixed, tuple(fixed.constants.values()), merge)


def run(problem: Problem, ops: Operands, config: FwdConfig, spans: int) -> tuple[Tensor, Tensor]:
    """`forward` with the keys cut into `spans`, in tiles of `config`."""
    out, lse = outputs(problem, ops.q, spans)
    for step in plan(problem, ops, out, lse, config, spans):
        launcher.launch(*step, problem=problem)
    return out, lse


def outputs(problem: Problem, q: Tensor, spans: int) -> tuple[Tensor, Tensor]:
    """(out, lse). Rows behind the last packed sequence have no program without splits; the merge writes all rows."""
    out, lse = launch.empty_outputs(problem, q)
    if problem.varlen_q and spans == 1:
        out.zero_()
        lse.fill_(float("-inf"))
    return out, lse


def plan(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, config: FwdConfig, spans: int
) -> list[launch.Launch]:  # fmt: skip
    """The launches that compute `problem`: `attn_decode`, and with several spans `attn_combine`."""
    fixed = fix(problem, ops, out, lse, config, spans)
    into, stats = out, lse
    if spans > 1:
        memory = split.workspace(spans, out, lse)
        into, stats = memory, memory[spans * out.numel() :]
    args = arguments(ops, into, stats, fixed)
    step = launch.Launch(attn_decode, fixed.grid, args, fixed.constants, config.num_warps, config.num_stages)
    if spans == 1:
        return [step]
    return [step, split.plan(split.fix(problem, out, lse, spans), into, stats, out, lse, ops.cu_seqlens_q)]


def arguments(ops: Operands, out: Tensor, lse: Tensor, fixed: Fixed) -> tuple:
    """The run-time arguments of `attn_decode`."""
    return (
        ops.q, ops.k, ops.v, out, lse, *fixed.strides,
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, ops.leftpad_k, ops.cache_batch_idx),
        (ops.block_table, fixed.table_stride), *fixed.numbers, ops.alibi_slopes, fixed.slope_stride, ops.sink,
    )  # fmt: skip


def fix(problem: Problem, ops: Operands, out: Tensor, lse: Tensor, config: FwdConfig, spans: int) -> Fixed:
    """Everything about the launch that the addresses of the tensors do not change. The spans are laid out like `out`
    and `lse`, one behind the other."""
    blocks = triton.cdiv(splits.rows(problem), config.block_m)
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.head_dim_v))
    slopes, table = ops.alibi_slopes, ops.block_table
    page, tile = problem.page_size, config.block_n
    aligned = page > 0 and not problem.leftpad and (page % tile == 0 or tile % page == 0)
    twins = launch.strides(ops.k) == launch.strides(ops.v) and (not page or problem.head_dim >= 256)
    return Fixed(
        grid=(problem.kv_heads * spans * blocks * problem.batch, 1, 1),
        strides=(
            launch.strides(ops.q), launch.strides(ops.k), launch.strides(ops.v), launch.strides(out),
            split.lse_strides(problem, lse), split.span_strides(out, lse),
        ),
        table_stride=0 if table is None else table.stride(0),
        numbers=(
            (problem.max_q, problem.max_k, problem.kv_heads, spans, blocks),
            (problem.left or 0, problem.right or 0), score.factors(problem.scale, problem.softcap),
        ),
        slope_stride=0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
        constants=dict(
            F=features(problem, config), SPLIT=spans > 1, GROUP=problem.group,
            PAGE=page, ALIGNED=aligned, TWINS=twins,
            D=problem.head_dim, DV=problem.head_dim_v, BLOCK_D=block_d, BLOCK_DV=block_dv,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        ),
        config=config, spans=spans,
    )  # fmt: skip
