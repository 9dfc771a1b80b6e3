"""Named cases that every backend and every entry point is tested with, and the factory of their inputs.

`build(case)` gives the same call in three forms: the description (`Problem`), its tensors
(`Operands`) and, where the public API can say it, the public function with its arguments. Memory that
no row may read (cache behind the valid keys, pages nobody owns, packed rows behind the last sequence)
is full of NaN, so that a leak shows.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.problem import Operands, Problem, window_bounds


class Case(NamedTuple):
    """One attention call in words. Lengths are per sequence; None: all of them are max_q / max_k."""

    id: str
    batch: int = 2
    max_q: int = 17
    max_k: int = 23
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: str = ""  # "", "h" or "bh": no slopes, one per head, one per sequence and head
    sink: bool = False
    packed_q: tuple[int, ...] | None = None  # lengths of the packed query sequences
    packed_k: tuple[int, ...] | None = None  # lengths of the packed key sequences
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int = 0
    batch_idx: tuple[int, ...] | None = None  # cache rows; the cache then has two rows more than the batch
    deterministic: bool = False

    @property
    def forward_only(self) -> bool:
        return bool(self.page_size or self.leftpad or self.batch_idx)

    def problem(self, device: str = "cpu") -> Problem:
        Dv = self.head_dim_v or self.head_dim
        left, right = window_bounds(self.causal, self.window, self.max_q, self.max_k)
        return Problem(
            self.batch, self.heads, self.kv_heads, self.max_q, self.max_k, self.head_dim, Dv, self.dtype,
            device=torch.device(device).type, left=left, right=right,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap, dropout_p=self.dropout_p, alibi=bool(self.alibi), sink=self.sink,
            varlen_q=self.packed_q is not None, varlen_k=self.packed_k is not None,
            seqused_q=self.seqused_q is not None, seqused_k=self.seqused_k is not None,
            leftpad=self.leftpad is not None, page_size=self.page_size, batch_idx=self.batch_idx is not None,
            deterministic=self.deterministic,
        )  # fmt: skip


class Built(NamedTuple):
    """A case with tensors. `function` is None where the public API has no words for it."""

    problem: Problem
    operands: Operands
    function: str | None  # name in `flash_attn`
    kwargs: dict[str, Any]  # its arguments, by name; dropout's seed comes from torch.manual_seed


def build(case: Case, device: str = "cpu", seed: int = 0, dtype: torch.dtype | None = None) -> Built:
    """Fresh random inputs for `case`, made on the CPU so that every device sees the same numbers."""
    if dtype is not None:
        case = case._replace(dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    problem = case.problem(device)
    H, Hk, D, Dv = case.heads, case.kv_heads, problem.head_dim, problem.head_dim_v

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(case.dtype)

    def ints(values) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    q = normal(*_rows(case.batch, case.max_q, case.packed_q), H, D)
    k_rows = _rows(case.batch + 2 * bool(case.batch_idx), case.max_k, case.packed_k)
    k, v = normal(*k_rows, Hk, D), normal(*k_rows, Hk, Dv)
    if case.packed_q:
        q = torch.cat([q, torch.full((3, H, D), math.nan, dtype=q.dtype)])
    if case.packed_k:
        k, v = (torch.cat([x, torch.full((3, *x.shape[1:]), math.nan, dtype=x.dtype)]) for x in (k, v))
    _poison_unused(case, q, k, v)
    block_table = None
    if case.page_size:
        k, v, block_table = _paginate(k, v, case.page_size, g)
    slopes = {"": None, "h": (H,), "bh": (case.batch, H)}[case.alibi]
    ops = Operands(
        q, k, v,
        cu_seqlens_q=_cumulative(case.packed_q), cu_seqlens_k=_cumulative(case.packed_k),
        seqused_q=ints(case.seqused_q), seqused_k=ints(case.seqused_k), leftpad_k=ints(case.leftpad),
        block_table=block_table, cache_batch_idx=ints(case.batch_idx),
        alibi_slopes=None if slopes is None else torch.rand(slopes, generator=g) * 0.3,
        sink=torch.randn(H, generator=g) if case.sink else None,
        rng_state=torch.tensor([1234 + seed, 5]) if case.dropout_p else None,
    )  # fmt: skip
    ops = Operands(*(None if x is None else x.to(device) for x in ops))
    return Built(problem, ops, *_public(case, ops))


def _rows(batch: int, length: int, packed: tuple[int, ...] | None) -> tuple[int, ...]:
    return (batch, length) if packed is None else (sum(packed),)


def _cumulative(lengths: tuple[int, ...] | None) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _poison_unused(case: Case, q: Tensor, k: Tensor, v: Tensor) -> None:
    """NaN into the queries, keys and values that `case` declares invalid."""
    if case.seqused_q and case.packed_q is None:
        for b, used in enumerate(case.seqused_q):
            q[b, used:] = math.nan
    if case.packed_k is not None:
        starts = [0, *itertools.accumulate(case.packed_k)]
        for b, used in enumerate(case.seqused_k or ()):
            for x in (k, v):
                x[starts[b] + used : starts[b + 1]] = math.nan
        return
    rows = case.batch_idx or range(case.batch)
    for b, row in enumerate(rows):
        lo = case.leftpad[b] if case.leftpad else 0
        hi = case.seqused_k[b] if case.seqused_k else case.max_k
        for x in (k, v):
            x[row, :lo] = math.nan
            x[row, hi:] = math.nan
    for row in set(range(k.shape[0])) - set(rows):
        k[row], v[row] = math.nan, math.nan


def _paginate(k: Tensor, v: Tensor, page: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, Hk, D) into shuffled pages; three pages more than needed stay NaN."""
    B, N = k.shape[:2]
    per = N // page
    assert per * page == N, "a paged case needs max_k to be a multiple of page_size"
    order = torch.randperm(B * per + 3, generator=g)[: B * per]
    pages = []
    for x in (k, v):
        out = torch.full((B * per + 3, page, *x.shape[2:]), math.nan, dtype=x.dtype)
        out[order] = x.reshape(B * per, page, *x.shape[2:])
        pages.append(out)
    return pages[0], pages[1], order.view(B, per).to(torch.int32)


def _public(case: Case, ops: Operands) -> tuple[str | None, dict[str, Any]]:
    common: dict[str, Any] = dict(
        softmax_scale=case.scale, causal=case.causal, window_size=case.window, softcap=case.softcap,
        alibi_slopes=ops.alibi_slopes,
    )  # fmt: skip
    training = dict(dropout_p=case.dropout_p, deterministic=case.deterministic)
    if case.sink or case.seqused_q:
        return None, {}
    if case.packed_q is None and case.packed_k is None and not case.forward_only and case.seqused_k is None:
        return "flash_attn_func", dict(q=ops.q, k=ops.k, v=ops.v, **training, **common)
    if case.packed_q is not None and case.packed_k is not None and case.seqused_k is None:
        lengths = dict(
            cu_seqlens_q=ops.cu_seqlens_q, cu_seqlens_k=ops.cu_seqlens_k, max_seqlen_q=case.max_q,
            max_seqlen_k=case.max_k,
        )  # fmt: skip
        return "flash_attn_varlen_func", dict(q=ops.q, k=ops.k, v=ops.v, **lengths, **training, **common)
    if case.packed_q is None and case.packed_k is None and not case.dropout_p and case.seqused_k:
        cache = dict(
            q=ops.q, k_cache=ops.k, v_cache=ops.v, cache_seqlens=ops.seqused_k, cache_leftpad=ops.leftpad_k,
            cache_batch_idx=ops.cache_batch_idx, block_table=ops.block_table,
        )  # fmt: skip
        return "flash_attn_with_kvcache", dict(**cache, **common)
    return None, {}


# Every axis of variation; PAIRWISE holds a small set of cases in which each two values of different
# axes meet at least once (the full cross product has hundreds of thousands).
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "storage": {
        "dense": {},
        "packed": dict(batch=4, packed_q=(17, 0, 5, 12), packed_k=(24, 7, 0, 9)),
        "used": dict(batch=3, seqused_q=(17, 3, 0), seqused_k=(11, 24, 20)),
        "packedused": dict(batch=3, packed_q=(3, 17, 6), packed_k=(24, 9, 12), seqused_k=(20, 9, 0)),
        "cache": dict(batch=3, seqused_k=(5, 24, 0)),
        "leftpad": dict(batch=3, seqused_k=(9, 24, 13), leftpad=(2, 0, 13)),
        "batchidx": dict(batch=3, seqused_k=(8, 24, 17), batch_idx=(4, 0, 2)),
        "paged": dict(batch=3, seqused_k=(7, 24, 18), page_size=4),
        "pagedpad": dict(batch=3, seqused_k=(7, 24, 18), leftpad=(1, 5, 0), page_size=12),
    },
    "mask": {
        "full": {},
        "causal": dict(causal=True),
        "window": dict(window=(5, 3)),
        "left": dict(window=(6, -1)),
        "right": dict(window=(-1, 2)),
        "slide": dict(causal=True, window=(4, 0)),
    },
    "score": {
        "plain": {},
        "scaled": dict(scale=0.37),
        "softcap": dict(softcap=1.5),
        "alibih": dict(alibi="h"),
        "alibibh": dict(alibi="bh", softcap=2.0),
    },
    "heads": {
        "mha": dict(heads=3, kv_heads=3),
        "gqa": dict(heads=6, kv_heads=2),
        "mqa": dict(heads=4, kv_heads=1),
    },
    "dims": {
        "d16": dict(head_dim=16),
        "d40": dict(head_dim=40),
        "d7": dict(head_dim=7),
        "d24v16": dict(head_dim=24, head_dim_v=16),
        "d64": dict(head_dim=64),
    },
    "length": {
        "short": dict(max_q=17),
        "long": dict(max_q=33),  # more queries than keys: rows that see nothing
        "one": dict(max_q=1),
    },
    "dropout": {"keep": {}, "drop": dict(dropout_p=0.25)},
    "sink": {"nosink": {}, "sink": dict(sink=True)},
}


def _pairwise() -> list[Case]:
    """A greedy covering array: each case is grown axis by axis towards pairs not met yet."""
    names = list(AXES)
    left = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in AXES[a] for y in AXES[b]
    }  # fmt: skip
    cases = []
    while left:
        start = min(left)
        chosen = {start[0]: start[1], start[2]: start[3]}
        for axis in names:
            if axis not in chosen:
                chosen[axis] = max(AXES[axis], key=lambda x, a=axis, c=chosen: _gain(left, names, a, x, c))
        left -= {_pair(names, *x, *y) for x, y in itertools.combinations(chosen.items(), 2)}
        cases.append(_compose(chosen))
    return cases


def _gain(left: set, names: list[str], axis: str, value: str, chosen: dict[str, str]) -> int:
    return sum(_pair(names, axis, value, b, y) in left for b, y in chosen.items())


def _pair(names: list[str], a: str, x: str, b: str, y: str) -> tuple[str, str, str, str]:
    return (a, x, b, y) if names.index(a) < names.index(b) else (b, y, a, x)


def _compose(chosen: dict[str, str]) -> Case:
    fields: dict[str, Any] = dict(max_k=24)
    for axis in AXES:
        fields |= AXES[axis][chosen[axis]]
    if fields.get("packed_q"):
        fields["packed_q"] = tuple(min(n, fields["max_q"]) for n in fields["packed_q"])
    if fields.get("seqused_q"):
        fields["seqused_q"] = tuple(min(n, fields["max_q"]) for n in fields["seqused_q"])
    skip = ("full", "plain", "keep", "nosink")
    return Case("-".join(chosen[a] for a in AXES if chosen[a] not in skip), **fields)


# One feature at a time, easy to read off when one fails.
SINGLE = [
    Case("plain"),
    Case("causal", causal=True),
    Case("causal_more_queries", causal=True, max_q=29, max_k=13),
    Case("window", window=(4, 2)),
    Case("window_left", window=(4, -1)),
    Case("window_right", window=(-1, 2)),
    Case("softcap", softcap=1.5),
    Case("alibi", alibi="h", causal=True),
    Case("dropout", dropout_p=0.2),
    Case("softcap_dropout", softcap=1.0, dropout_p=0.2),
    Case("sink", sink=True),
    Case("one_query", max_q=1),
    Case("one_key", max_k=1, max_q=3),
    Case("head_dim_1", head_dim=1),
    Case("head_dim_80", head_dim=80),
    Case("head_dim_192_128", head_dim=192, head_dim_v=128, max_q=5, max_k=7),
    Case("head_dim_512", head_dim=512, max_q=3, max_k=5),
    Case("several_tiles", max_q=150, max_k=210, causal=True, batch=1),
    Case("packed", batch=4, packed_q=(17, 0, 5, 12), packed_k=(23, 7, 0, 9), causal=True),
    Case("cache", seqused_k=(5, 23)),
    Case("cache_empty", seqused_k=(0, 7), causal=True),
    Case("paged", seqused_k=(5, 24), max_k=24, page_size=8),
    Case("paged_page_1", seqused_k=(5, 23), page_size=1),
]
PAIRWISE = _pairwise()
CASES = SINGLE + PAIRWISE
BACKWARD_CASES = [c for c in CASES if not c.forward_only]


def ids(case: Case) -> str:
    return case.id
