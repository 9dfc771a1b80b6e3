"""Attention of few query rows over many keys: bound by the bandwidth of reading K and V, so the keys are split.

The query heads that share a key/value head and their queries form the rows of one tile (row r is query r // GROUP,
head r % GROUP), so every key is read once. A program folds one span of the keys; `forward/split.py` merges spans.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn.forward import launch, split
from flash_attn.kvcache import splits
from flash_attn.problem import Operands, Problem
from flash_attn.tile import mask, rows, score, softmax
from flash_attn.tuning.config import FwdConfig
from flash_attn.utils import device, launcher

sequence, row_offsets, load_rows = rows.sequence, rows.row_offsets, rows.load
key_range, keep = mask.key_range, mask.keep
logits, LOG2E = score.logits, score.LOG2E
update, finish = softmax.update, softmax.finish


@triton.jit
def attn_decode(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides, split_strides,
    lengths,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, cache_batch_idx): pointers or None
    paging,  # (block_table or None, its row stride)
    sizes,  # (max_q, max_k, kv heads, spans, row blocks)
    band, factors, alibi_slopes, alibi_stride, sink,
    F: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program folds one span of the keys of one kv head into BLOCK_M rows, and writes them normalised.

    Grid: kv heads x spans x row blocks x sequences in one dimension, kv heads fastest: programs that run together
    read neighbouring memory. Strides are (batch, seq, head), of lse (batch, head), of a span (out, lse).
    """
    cu_q, cu_k, used_q, used_k, leftpad, batch_idx = lengths
    max_q, max_k, kv_heads, spans, row_blocks = sizes
    pid = tl.program_id(0)
    head = pid % kv_heads
    span = pid // kv_heads % spans
    block = pid // (kv_heads * spans) % row_blocks
    b = pid // (kv_heads * spans * row_blocks)

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
    per = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N), spans) * BLOCK_N
    n0 = lo + span * per
    n1 = tl.minimum(n0 + per, hi)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sink is not None:  # a key without a value, in the first span
        m = tl.where(span == 0, tl.load(sink + heads).to(tl.float32) * LOG2E, m)
        l = tl.where(span == 0, 1.0, l)
    k += head * k_strides[2]
    v += head * v_strides[2]
    at = first + n0 + tl.arange(0, BLOCK_N)
    page = page_of(paging, b, at, first + n1, PAGE)
    # one loop with a mask, not a masked and an unmasked one: a second pipeline would have to fill again
    for n in tl.range(n0, n1, BLOCK_N, num_stages=STAGES):
        cols = n + tl.arange(0, BLOCK_N)
        at = first + cols
        valid = cols < n1
        if PAGE:
            # the pages of the next tile, a tile ahead: were they looked up with the loads that need them, Triton
            # would give half of its pipeline to the table
            here, page = page, page_of(paging, b, at + BLOCK_N, first + n1, PAGE)
            k_off, v_off = paged_offsets(here, at, k_strides, PAGE), paged_offsets(here, at, v_strides, PAGE)
        else:
            k_off, v_off = row_offsets(at, 0, cache_row, k_strides), row_offsets(at, 0, cache_row, v_strides)
        k_tile = load_rows(k, k_off, valid, dims, D, BLOCK_D <= D, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N] fp32
        s = logits(qk, i[:, None], cols[None, :], M, N, factors[0], factors[1], slope, F)
        ok = valid[None, :] & keep(i[:, None], cols[None, :], M, N, band, F)
        m, l, p, rescale = update(m, l, tl.where(ok, s, float("-inf")), 1.0, True)
        v_tile = load_rows(v, v_off, valid, dims_v, DV, BLOCK_DV <= DV, True)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=F.precision)

    inv, row_lse = finish(m, l)
    o_off = (
        row_offsets(i, start_q, b, out_strides)
        + heads * out_strides[2]
        + span.to(tl.int64) * split_strides[0]
    )
    o_tile = tl.where(seen[:, None], acc * inv[:, None], 0.0).to(out.dtype.element_ty)
    in_out = (i < owned)[:, None] & (dims_v < DV)[None, :]
    tl.store(out + o_off[:, None] + dims_v[None, :], o_tile, mask=in_out)
    lse_off = b.to(tl.int64) * lse_strides[0] + heads * lse_strides[1] + start_q + i
    row_lse = tl.where(seen, row_lse, float("-inf"))
    tl.store(lse + lse_off + span.to(tl.int64) * split_strides[1], row_lse, mask=i < owned)


@triton.jit
def page_of(paging, b, at, last, PAGE: tl.constexpr):
    """Page that holds row `at` of sequence `b`; 0 for rows from `last` on."""
    if PAGE:
        return tl.load(paging[0] + b.to(tl.int64) * paging[1] + at // PAGE, mask=at < last, other=0)
    else:
        return at


@triton.jit
def paged_offsets(page, at, strides, PAGE: tl.constexpr):
    """Element offset of rows `at` that lie in `page`."""
    return page.to(tl.int64) * strides[0] + (at % PAGE).to(tl.int64) * strides[1]


def wants(problem: Problem) -> bool:
    """Whether this kernel serves `problem` better than `forward.kernel.attn_fwd`."""
    return splits.wants(problem, device.info())


def forward(problem: Problem, ops: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) as `forward.launch.forward` returns them. No host synchronisation; the same result in every run."""
    found = device.info()
    shared, multiprocessors = (found.shared_memory, found.multiprocessors) if found else (2**16, 1)
    candidates = splits.configs(problem, shared)
    for config in candidates:
        try:
            return run(problem, ops, config, splits.num_splits(problem, config, multiprocessors))
        except launcher.SharedMemoryError:
            if config is candidates[-1]:
                raise
    raise AssertionError("configs is never empty")


def run(problem: Problem, ops: Operands, config: FwdConfig, spans: int) -> tuple[Tensor, Tensor]:
    """`forward` with the keys cut into `spans`, in tiles of `config`."""
    out, lse = launch.empty_outputs(problem, ops.q)
    if spans == 1:
        if problem.varlen_q:  # rows behind the last sequence have no program
            out.zero_()
            lse.fill_(float("-inf"))
        launcher.launch(*plan(problem, ops, out, lse, config, 1), problem=problem)
        return out, lse
    partial = torch.empty((spans, *out.shape), dtype=torch.float32, device=out.device)
    partial_lse = torch.empty((spans, *lse.shape), dtype=torch.float32, device=out.device)
    launcher.launch(*plan(problem, ops, partial, partial_lse, config, spans), problem=problem)
    launcher.launch(*split.plan(problem, partial, partial_lse, out, lse, ops.cu_seqlens_q), problem=problem)
    return out, lse


def plan(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, config: FwdConfig, spans: int
) -> launch.Launch:
    """The launch of `attn_decode`; with spans > 1, out and lse have a leading span axis."""
    one_out, one_lse = (out, lse) if spans == 1 else (out[0], lse[0])
    blocks = triton.cdiv(splits.rows(problem), config.block_m)
    slopes, table = ops.alibi_slopes, ops.block_table
    args = (
        ops.q, ops.k, ops.v, out, lse,
        launch.strides(ops.q), launch.strides(ops.k), launch.strides(ops.v), launch.strides(one_out),
        (0, one_lse.stride(0)) if problem.varlen_q else one_lse.stride()[:2],
        (0, 0) if spans == 1 else (out.stride(0), lse.stride(0)),
        (ops.cu_seqlens_q, ops.cu_seqlens_k, ops.seqused_q, ops.seqused_k, ops.leftpad_k, ops.cache_batch_idx),
        (table, 0 if table is None else table.stride(0)),
        (problem.max_q, problem.max_k, problem.kv_heads, spans, blocks),
        (problem.left or 0, problem.right or 0), score.factors(problem.scale, problem.softcap),
        slopes, 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0), ops.sink,
    )  # fmt: skip
    constants = dict(
        F=launch.features(problem, config), GROUP=problem.group, PAGE=problem.page_size,
        D=problem.head_dim, DV=problem.head_dim_v,
        BLOCK_D=max(16, triton.next_power_of_2(problem.head_dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(problem.head_dim_v)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
    )  # fmt: skip
    grid = (problem.kv_heads * spans * blocks * problem.batch, 1, 1)
    return launch.Launch(attn_decode, grid, args, constants, config.num_warps, config.num_stages)
