"""The forward where attention is not plain: windows, grouped heads, packed documents, short problems.

Every implementation of a cell takes its turn in random order over several rounds in one process; a row is the median.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.problem import Operands, Problem
from flash_attn.reference import attention
from flash_attn.utils import race

DOCUMENTS = (84, 200, 513, 777, 1000, 1300, 1800, 2210, 3500, 5000)
SHORT = ((1, 128, 8, 64), (8, 128, 16, 64), (2, 256, 16, 64), (4, 256, 16, 128), (8, 512, 16, 64),
         (8, 512, 16, 128), (1, 512, 32, 128))  # fmt: skip  # batch, tokens, heads, head dim
GRAPH_CALLS = 20  # in one graph, so that a replay's own time does not count
Call = Callable[[], Tensor]


class Cell(NamedTuple):
    name: str
    problem: Problem
    lengths: tuple[int, ...] | None = None  # of packed documents


def _problem(
    batch: int, seqlen: int, heads: int, kv_heads: int, dim: int, causal: bool, **fields: Any
) -> Problem:
    return Problem(batch, heads, kv_heads, seqlen, seqlen, dim, dim, torch.bfloat16, "cuda",
                   right=0 if causal else None, scale=dim**-0.5, **fields)  # fmt: skip


def cells() -> Iterator[Cell]:
    for dim in (64, 128):
        heads = 2048 // dim
        yield Cell("window of 1024", _problem(1, 16384, heads, heads, dim, True, left=1023))
        yield Cell("32 heads over 8", _problem(2, 8192, 32, 8, dim, True))
        for causal in (False, True):
            packed = _problem(
                len(DOCUMENTS), max(DOCUMENTS), heads, heads, dim, causal, varlen_q=True, varlen_k=True
            )
            yield Cell("documents", packed, DOCUMENTS)


def inputs(cell: Cell) -> Operands:
    p = cell.problem
    lead = (p.batch, p.max_q) if cell.lengths is None else (sum(cell.lengths),)
    q, k, v = (
        torch.randn(*lead, h, p.head_dim, device="cuda", dtype=p.dtype)
        for h in (p.heads, p.kv_heads, p.kv_heads)
    )
    lengths = cell.lengths or (p.max_q,) * p.batch
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return Operands(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def _window(p: Problem) -> tuple[int, int]:
    return (-1, -1) if p.left is None else (p.left, p.right or 0)


def _ours(cell: Cell, ops: Operands) -> Call:
    p, (q, k, v, cu) = cell.problem, ops[:4]
    options: dict[str, Any] = dict(causal=p.right == 0, window_size=_window(p))
    if cell.lengths is None:
        return lambda: flash_attn_func(q, k, v, **options)
    return lambda: flash_attn_varlen_func(q, k, v, cu, cu, p.max_q, p.max_k, **options)


def _fa4(cell: Cell, ops: Operands) -> Call | None:
    try:
        from flash_attn.cute import flash_attn_func as dense  # type: ignore[import-not-found]
        from flash_attn.cute import flash_attn_varlen_func as packed
    except ImportError:
        return None
    p, (q, k, v, cu) = cell.problem, ops[:4]
    # its window of keys to the right closes the causal mask
    options: dict[str, Any] = dict(causal=True) if p.causal else {}
    if p.left is not None:
        options = dict(window_size=(p.left, p.right))
    if cell.lengths is None:
        return lambda: dense(q, k, v, **options)[0]
    sizes = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=p.max_q, max_seqlen_k=p.max_k)
    return lambda: packed(q, k, v, **sizes, **options)[0]


def _fa3(cell: Cell, ops: Operands) -> Call:
    p, cu = cell.problem, ops.cu_seqlens_q
    packed = [x.reshape(-1, *x.shape[-2:]) for x in ops[:3]]
    return lambda: torch.ops._vllm_fa3_C.fwd(
        *packed, None, None, None, None, cu, cu, None, None, None, p.max_q, p.max_k, None, None, None, None, None, None,
        None, None, None, p.scale, p.causal, *_window(p), 0.0, True, None, 1, None, 0, None, 1, 0, None,
    )[0].view_as(ops.q)  # fmt: skip


def _cudnn(cell: Cell, ops: Operands) -> Call | None:
    p = cell.problem
    if cell.lengths is not None or p.left is not None:
        return None
    q, k, v = (x.transpose(1, 2) for x in ops[:3])

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=p.right == 0, enable_gqa=p.group > 1)
        return out.transpose(1, 2)

    return run


def calls(cell: Cell, ops: Operands, fa3: bool) -> dict[str, Call]:
    found = {"ours": _ours(cell, ops), "fa4": _fa4(cell, ops), "cudnn": _cudnn(cell, ops)}
    if fa3:
        found["fa3"] = _fa3(cell, ops)
    return {name: call for name, call in found.items() if call is not None}


def error(cell: Cell, ops: Operands, out: Tensor) -> float:
    """Relative error of the heads that share the first head of keys, of the first sequence or of all packed ones."""
    p = cell.problem
    few = p._replace(heads=p.group, kv_heads=1, batch=p.batch if cell.lengths else 1)
    part = slice(None) if cell.lengths else slice(1)
    q, k, v = (x[part, ..., :h, :] for x, h in zip(ops[:3], (p.group, 1, 1), strict=True))
    cu = dict(cu_seqlens_q=ops.cu_seqlens_q, cu_seqlens_k=ops.cu_seqlens_k) if cell.lengths else {}
    want, _ = attention.forward(few, Operands(q, k, v, **cu), torch.float32)
    return float((out[part, ..., : p.group, :].float() - want).norm() / want.norm())


def _flop(cell: Cell) -> float:
    if cell.lengths is None:
        return race.work_flop(cell.problem, "forward")
    alone = (cell.problem._replace(batch=1, max_q=n, max_k=n) for n in cell.lengths)
    return sum(race.work_flop(p, "forward") for p in alone)


def _row(cell: Cell, name: str, seconds: float | None, **fields: Any) -> dict[str, Any]:
    names = {"impl": name, "backend": "hopper" if name == "ours" else name, "variant": cell.name}
    row = race.describe_row(cell.problem, "forward") | names | fields
    if cell.lengths is not None:
        row |= {"lens_q": cell.lengths, "lens_k": cell.lengths}
    if seconds is not None:
        row |= {"time_us": seconds * 1e6, "tflops": _flop(cell) / seconds / 1e12}
    return row


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph


def latency(call: Call, calls: int = 100) -> float:
    """Median seconds from before a call to the end of its kernel."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[calls // 2]


def short_rows(cell: Cell, runs: dict[str, Call]) -> list[dict[str, Any]]:
    """Rows of a short problem replayed from a graph, and of whole eager calls with their host time."""
    graphs = {name: _captured(call) for name, call in runs.items() if name in ("ours", "cudnn")}
    replays = race.take_turns({name: graph.replay for name, graph in graphs.items()}, burst_s=1e-3)
    found = [_row(cell, name, s / GRAPH_CALLS, timing="CUDA graph") for name, s in replays.items()]
    for name, call in runs.items():
        latency(call)
        found.append(
            _row(cell, name, latency(call), kind="eager call", timing="host, from call to end of kernel")
        )
    return found


def rows(fa3: bool) -> list[dict[str, Any]]:
    """Rows of bench/results; a wrong result gets a note and no time."""
    found: list[dict[str, Any]] = []
    short = [
        Cell("short", _problem(b, s, h, h, d, causal)) for b, s, h, d in SHORT for causal in (False, True)
    ]
    for cell in [*cells(), *short]:
        ops = inputs(cell)
        runs = calls(cell, ops, fa3)
        wrong = {name: e for name, call in runs.items() if not (e := error(cell, ops, call())) < 1e-2}
        found += [_row(cell, name, None, note=f"wrong by {e:.1e}") for name, e in wrong.items()]
        runs = {name: call for name, call in runs.items() if name not in wrong}
        if cell in short:
            found += short_rows(cell, runs)
        else:
            found += [_row(cell, name, s) for name, s in race.take_turns(runs).items()]
    return found
