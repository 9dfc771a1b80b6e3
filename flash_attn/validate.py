"""Public arguments in, (Problem, Operands) out. Every error a caller can make is raised here, before any work.

What depends on shapes, dtypes, devices and numbers alone is checked once and remembered (`_known`);
a call like an earlier one costs a dictionary look-up. What depends on the values of tensors is in
`validate_values.py`, the KV cache call in `validate_cache.py`.
"""

import math
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from flash_attn import validate_values
from flash_attn.errors import ArgumentTypeError, ArgumentValueError
from flash_attn.problem import Operands, Problem, window_bounds

MAX_HEAD_DIM = 512
MAX_SPLITS = 128
NEGLIGIBLE_DROPOUT = 2.0**-25  # up to here 1 - p is 1 in fp32; diffusers passes 1e-30 to get at the lse
NO_WINDOW = (-1, -1)
DTYPES = {"cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_known: dict[Hashable, Problem] = {}
_KNOWN_MAX = 4096  # packed training makes a new entry with each longest length; then start over


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    sink: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Problem, Operands]:
    """The description of a dense call: q (B, M, H, D), k (B, N, Hk, D), v (B, N, Hk, Dv).

    The other arguments are those of `flash_attn_func`; sink is (H,).

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks a rule; nothing has been done then.
    """
    if window_size is not NO_WINDOW:
        window_size = as_window(window_size)
    try:
        key: Hashable = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic, num_splits,
            alibi_slopes if alibi_slopes is None else meta(alibi_slopes),
            sink if sink is None else meta(sink),
        )  # fmt: skip
        problem = _known.get(key)
    except (AttributeError, TypeError):  # not a tensor, or a number that is none: the checks say which
        key = problem = None
    if problem is None:
        check_tensors(dict(q=q, k=k, v=v), alibi_slopes=alibi_slopes, sink=sink)
        B, M = check_rows("q", q, "(batch_size, seqlen_q, num_heads, head_size)")
        _, N = check_rows("k", k, "(batch_size, seqlen_k, num_heads_k, head_size)", (B, None))
        check_rows("v", v, "(batch_size, seqlen_k, num_heads_k, head_size_v)", (B, N))
        problem = build(
            q, k, v, B, M, N, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
            window=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
            sink=sink, num_splits=num_splits,
        )  # fmt: skip
        remember(key, problem)
    if alibi_slopes is not None:
        alibi_slopes = last_contiguous("alibi_slopes", alibi_slopes)
    # The test of `last_contiguous` is repeated here, and the fields are given by position: half a microsecond each.
    ops = Operands(
        q if q.is_contiguous() and not q.is_neg() else last_contiguous("q", q),
        k if k.is_contiguous() and not k.is_neg() else last_contiguous("k", k),
        v if v.is_contiguous() and not v.is_neg() else last_contiguous("v", v),
        None, None, None, None, None, None, None, alibi_slopes, sink,
    )  # fmt: skip
    return problem, ops


def describe_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    sink: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Problem, Operands]:
    """The description of a call whose sequences differ in length.

    Args:
        q: (total_q, H, D) with cu_seqlens_q, or (B, M, H, D) when cu_seqlens_q is None.
        k, v: (total_k, Hk, D) with cu_seqlens_k; (B, N, Hk, D) when cu_seqlens_k is None; or
            (pages, page_size, Hk, D) with block_table, where cu_seqlens_k only gives the lengths.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,).
        max_seqlen_q, max_seqlen_k: int or 0-d tensor, at least the longest sequence; None where the
            rows are not packed: what the shape says.
        block_table: int32 (B, pages per sequence).
        seqused_q, seqused_k, leftpad_k: int32 (B,), see `Operands`.

    Raises: as `describe`.
    """
    if window_size is not NO_WINDOW:
        window_size = as_window(window_size)
    if type(max_seqlen_q) is not int and max_seqlen_q is not None:
        max_seqlen_q = as_integer("max_seqlen_q", max_seqlen_q)
    if type(max_seqlen_k) is not int and max_seqlen_k is not None:
        max_seqlen_k = as_integer("max_seqlen_k", max_seqlen_k)
    try:
        # The totals of packed tensors change with every batch and do not belong to the description.
        paged = block_table is not None
        key: Hashable = (
            q.shape if cu_seqlens_q is None else q.shape[1:],
            k.shape if cu_seqlens_k is None or paged else k.shape[1:],
            v.shape if cu_seqlens_k is None or paged else v.shape[1:],
            q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic, num_splits,
            cu_seqlens_q if cu_seqlens_q is None else meta(cu_seqlens_q),
            cu_seqlens_k if cu_seqlens_k is None else meta(cu_seqlens_k),
            block_table if block_table is None else meta(block_table),
            seqused_q if seqused_q is None else meta(seqused_q),
            seqused_k if seqused_k is None else meta(seqused_k),
            leftpad_k if leftpad_k is None else meta(leftpad_k),
            alibi_slopes if alibi_slopes is None else meta(alibi_slopes),
            sink if sink is None else meta(sink),
        )  # fmt: skip
        problem = _known.get(key)
    except (AttributeError, TypeError):
        key = problem = None
    if problem is None:
        problem = _varlen_problem(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_q, seqused_k,
            leftpad_k, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window=window_size,
            softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic, sink=sink, num_splits=num_splits,
        )  # fmt: skip
        remember(key, problem)
    if k.shape[0] != v.shape[0]:
        wrong_shape("v", v, "(total_k, num_heads_k, head_size_v)", (k.shape[0], None, None))
    if validate_values.wanted(problem):
        validate_values.check_varlen(
            problem, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            leftpad_k, block_table,
        )  # fmt: skip
    if problem.page_size and seqused_k is None and cu_seqlens_k is not None:
        # pages know no start row: only the lengths of cu_seqlens_k mean something
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    if alibi_slopes is not None:
        alibi_slopes = last_contiguous("alibi_slopes", alibi_slopes)
    ops = Operands(  # as in `describe`
        q if q.is_contiguous() and not q.is_neg() else last_contiguous("q", q),
        k if k.is_contiguous() and not k.is_neg() else last_contiguous("k", k),
        v if v.is_contiguous() and not v.is_neg() else last_contiguous("v", v),
        contiguous(cu_seqlens_q), contiguous(cu_seqlens_k) if problem.varlen_k else None,
        seqused_q if seqused_q is None else contiguous(seqused_q),
        seqused_k if seqused_k is None else contiguous(seqused_k),
        leftpad_k if leftpad_k is None else contiguous(leftpad_k),
        block_table if block_table is None else last_contiguous("block_table", block_table),
        None, alibi_slopes, sink,
    )  # fmt: skip
    return problem, ops


def _varlen_problem(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, block_table: Tensor | None, seqused_q: Tensor | None,
    seqused_k: Tensor | None, leftpad_k: Tensor | None, **common,
) -> Problem:  # fmt: skip
    """Check a varlen call that was not met before."""
    check_tensors(
        dict(q=q, k=k, v=v), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table,
        seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, alibi_slopes=common["alibi_slopes"],
        sink=common["sink"],
    )  # fmt: skip
    B, M = _query_sizes(q, cu_seqlens_q, max_seqlen_q)
    N, page_size = _key_sizes(q, k, v, B, cu_seqlens_k, max_seqlen_k, block_table, seqused_k)
    for name, x in (("seqused_q", seqused_q), ("seqused_k", seqused_k), ("leftpad_k", leftpad_k)):
        if x is not None:
            check_index(name, x, "(batch_size,)", (B,), q)
    paged = block_table is not None
    return build(
        q, k, v, B, M, N, page_size=page_size, varlen_q=cu_seqlens_q is not None,
        varlen_k=cu_seqlens_k is not None and not paged, seqused_q=seqused_q is not None,
        seqused_k=seqused_k is not None or (paged and cu_seqlens_k is not None), leftpad=leftpad_k is not None,
        **common,
    )  # fmt: skip


def _query_sizes(q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> tuple[int, int]:
    """(batch, longest query sequence) of a varlen call."""
    if cu_seqlens_q is None:
        return check_rows("q", q, "(batch_size, seqlen_q, num_heads, head_size)")
    check_rows("q", q, "(total_q, num_heads, head_size)")
    check_index("cu_seqlens_q", cu_seqlens_q, "(batch_size + 1,)", (None,), q)
    if cu_seqlens_q.shape[0] < 1:
        wrong_shape("cu_seqlens_q", cu_seqlens_q, "(batch_size + 1,)", (None,))
    return cu_seqlens_q.shape[0] - 1, _longest("max_seqlen_q", max_seqlen_q)


def _key_sizes(
    q: Tensor, k: Tensor, v: Tensor, B: int, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None,
    block_table: Tensor | None, seqused_k: Tensor | None,
) -> tuple[int, int]:  # fmt: skip
    """(longest key sequence, page size or 0) of a varlen call."""
    if cu_seqlens_k is not None:
        check_index("cu_seqlens_k", cu_seqlens_k, "(batch_size + 1,)", (B + 1,), q)
    if block_table is not None:
        if cu_seqlens_k is None and seqused_k is None:
            raise ArgumentValueError(
                "block_table needs cu_seqlens_k or seqused_k for the lengths, got neither"
            )
        capacity, page_size = check_paged("k", k, "v", v, block_table, B, q)
        return capacity if max_seqlen_k is None else min(
            _longest("max_seqlen_k", max_seqlen_k), capacity
        ), page_size
    if cu_seqlens_k is None:
        _, N = check_rows("k", k, "(batch_size, seqlen_k, num_heads_k, head_size)", (B, None))
        check_rows("v", v, "(batch_size, seqlen_k, num_heads_k, head_size_v)", (B, N))
        return N, 0
    check_rows("k", k, "(total_k, num_heads_k, head_size)")
    check_rows("v", v, "(total_k, num_heads_k, head_size_v)")
    return _longest("max_seqlen_k", max_seqlen_k), 0


def _longest(name: str, value: int | None) -> int:
    if value is None:
        raise ArgumentTypeError(f"{name} must be an integer for packed rows, got None")
    if value < 0:
        raise ArgumentValueError(f"{name} must not be negative, got {value}")
    return value


def build(
    q: Tensor, k: Tensor, v: Tensor, B: int, M: int, N: int, *, dropout_p, softmax_scale, causal, window,
    softcap, alibi_slopes, deterministic, sink, num_splits, names=("q", "k", "v"), **storage,
) -> Problem:  # fmt: skip
    """Check what every kind of call has in common, and describe it."""
    H, D = q.shape[-2:]
    Hk, Dv = k.shape[-2], v.shape[-1]
    _check_dtypes(q, k, v, names)
    _check_heads(q, k, v, names)
    dropout_p = as_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if dropout_p <= NEGLIGIBLE_DROPOUT:
        dropout_p = 0.0
    softcap = as_number("softcap", softcap)
    if not 0.0 <= softcap < math.inf:
        raise ArgumentValueError(f"softcap must be 0 (off) or positive and finite, got {softcap}")
    scale = D**-0.5 if softmax_scale is None else as_number("softmax_scale", softmax_scale)
    if not math.isfinite(scale):
        raise ArgumentValueError(f"softmax_scale must be finite, got {scale}")
    num_splits = as_integer("num_splits", num_splits)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ArgumentValueError(
            f"num_splits must lie in [0, {MAX_SPLITS}] (num_splits > {MAX_SPLITS} not supported), got {num_splits}"
        )
    if alibi_slopes is not None:
        check_alibi(alibi_slopes, B, H, q)
    if sink is not None:
        _check_sink(sink, H, q)
    left, right = window_bounds(as_flag("causal", causal), window, M, N)
    return Problem(
        B, H, Hk, M, N, D, Dv, q.dtype, q.device.type, left, right, scale, softcap, dropout_p,
        alibi=alibi_slopes is not None, sink=sink is not None, deterministic=as_flag("deterministic", deterministic),
        num_splits=num_splits, **storage,
    )  # fmt: skip


def remember(key: Hashable, problem: Problem) -> None:
    """Keep the description of a call that passed; a key of None could not be made."""
    if key is None:
        return
    if len(_known) >= _KNOWN_MAX:
        _known.clear()
    _known[key] = problem


def recall(key: Hashable) -> Problem | None:
    return _known.get(key)


# --- what an argument must be -----------------------------------------------------------------


def meta(x: Tensor) -> tuple:
    """What of an optional tensor belongs to the key of a call."""
    return x.shape, x.dtype, x.device


def last_contiguous(name: str, x: Tensor) -> Tensor:
    """x, or a copy of it when its last dimension is strided or its negation is put off (the imaginary part of a
    conjugate): a kernel sees the memory only."""
    if (x.is_contiguous() or x.stride(-1) == 1) and not x.is_neg():
        return x
    check_dense(name, x)  # a sparse tensor may look like a remembered dense one
    return x.resolve_neg().contiguous()


def check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        raise ArgumentTypeError(f"{name} must be a dense tensor, got layout {x.layout}, nested {x.is_nested}")


def contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def as_window(window: Any) -> tuple[int, int]:
    """(left, right) from two integers in a tuple, list or CPU tensor."""
    if type(window) is tuple and len(window) == 2 and type(window[0]) is int and type(window[1]) is int:
        return window
    try:
        left, right = window.tolist() if isinstance(window, Tensor) else window
        return operator.index(left), operator.index(right)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"window_size must be two integers (left, right), got {window!r}") from None


def as_integer(name: str, value: Any) -> int:
    """An int from an integer or a 0-d integer tensor (a GPU one costs a synchronisation)."""
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an integer, got {_show(value)}") from None


def as_number(name: str, value: Any) -> float:
    if isinstance(value, (Tensor, str, bytes)):
        raise ArgumentTypeError(f"{name} must be a Python number, got {_show(value)}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"{name} must be a number, got {_show(value)}") from None


def as_flag(name: str, value: Any) -> bool:
    if isinstance(value, (Tensor, str, bytes)) or value is None:
        raise ArgumentTypeError(f"{name} must be True or False, got {_show(value)}")
    return bool(value)


def check_tensors(required: dict[str, Any], **optional: Any) -> None:
    """Every argument is a dense tensor; the optional ones may be None."""
    for name, x in {**optional, **required}.items():
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {_show(x)}")
        check_dense(name, x)


def check_rows(
    name: str, x: Tensor, form: str, lead: tuple[int | None, ...] = (None, None)
) -> tuple[int, int]:  # fmt: skip
    """Rank and leading sizes of q, k, v or a cache; returns the first two sizes. `form` names the dimensions."""
    rank = form.count(",") + 1
    if x.ndim != rank:
        raise ArgumentValueError(f"{name} must have shape {form}, got {tuple(x.shape)}")
    if any(want is not None and want != got for want, got in zip(lead, x.shape, strict=False)):
        wrong_shape(name, x, form, lead)
    return x.shape[0], x.shape[1]


def check_index(name: str, x: Tensor, form: str, sizes: tuple[int | None, ...], q: Tensor) -> None:
    """dtype, device and shape of a tensor of lengths or indices."""
    if x.dtype != torch.int32:
        raise ArgumentTypeError(f"{name} must have dtype int32, got {x.dtype}")
    if x.device != q.device:
        raise ArgumentValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if x.ndim != len(sizes) or any(w is not None and w != g for w, g in zip(sizes, x.shape, strict=True)):
        wrong_shape(name, x, form, sizes)


def check_paged(
    k_name: str, k: Tensor, v_name: str, v: Tensor, block_table: Tensor, B: int, q: Tensor
) -> tuple[int, int]:  # fmt: skip
    """(keys a row of the block table can address, page size) of a paged cache."""
    check_index("block_table", block_table, "(batch_size, max_num_blocks)", (B, None), q)
    pages, page_size = check_rows(k_name, k, "(num_blocks, page_block_size, num_heads_k, head_size)")
    check_rows(v_name, v, "(num_blocks, page_block_size, num_heads_k, head_size_v)", (pages, page_size))
    if page_size < 1:
        raise ArgumentValueError(
            f"{k_name}: the page size, its dimension 1, must be at least 1, got {page_size}"
        )
    return block_table.shape[1] * page_size, page_size


def check_alibi(slopes: Tensor, B: int, H: int, q: Tensor) -> None:
    if slopes.dtype != torch.float32:
        raise ArgumentTypeError(f"alibi_slopes: ALiBi slopes must have dtype fp32, got {slopes.dtype}")
    if slopes.device != q.device:
        raise ArgumentValueError(f"alibi_slopes must be on the device of q, {q.device}, got {slopes.device}")
    if slopes.shape not in ((H,), (B, H)):
        raise ArgumentValueError(
            f"alibi_slopes must have shape (num_heads,) = ({H},) or (batch_size, num_heads) = ({B}, {H}),"
            f" got {tuple(slopes.shape)}"
        )


def _check_sink(sink: Tensor, H: int, q: Tensor) -> None:
    if not sink.dtype.is_floating_point:
        raise ArgumentTypeError(f"sink must have a floating point dtype, got {sink.dtype}")
    if sink.device != q.device:
        raise ArgumentValueError(f"sink must be on the device of q, {q.device}, got {sink.device}")
    if sink.shape != (H,):
        wrong_shape("sink", sink, "(num_heads,)", (H,))


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    allowed = DTYPES.get(q.device.type, GPU_DTYPES)
    if q.dtype not in allowed:
        listed = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ArgumentTypeError(f"{names[0]} must have dtype {listed} on {q.device.type}, got {q.dtype}")
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.dtype != q.dtype:
            raise ArgumentTypeError(
                f"{name}: query and key must have the same dtype, {q.dtype}, got {x.dtype}"
            )
        if x.device != q.device:
            raise ArgumentValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    H, D = q.shape[-2:]
    Hk, Dv = k.shape[-2], v.shape[-1]
    for name, dim in ((names[0], D), (names[2], Dv)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ArgumentValueError(
                f"{name}: FlashAttention only supports head dimension at most {MAX_HEAD_DIM} and at least 1, got {dim}"
            )
    if k.shape[-1] != D:
        raise ArgumentValueError(f"{names[1]} must have the head dimension of q, {D}, got {k.shape[-1]}")
    if v.shape[-2] != Hk:
        raise ArgumentValueError(f"{names[2]} must have as many heads as {names[1]}, {Hk}, got {v.shape[-2]}")
    if H < 1 or Hk < 1 or H % Hk:
        raise ArgumentValueError(
            f"{names[1]}: Number of heads in key/value must divide number of heads in query, got {Hk} and {H}"
        )


def wrong_shape(name: str, x: Tensor, form: str, sizes: tuple[int | None, ...]) -> None:
    known = [
        f"{what} {size}"
        for what, size in zip(form.strip("(,)").split(", "), sizes, strict=False)
        if size is not None
    ]
    rule = f"{form} with {', '.join(known)}" if known else form
    raise ArgumentValueError(f"{name} must have shape {rule}, got {tuple(x.shape)}")


def _show(value: Any) -> str:
    return (
        f"{type(value).__name__} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)[:80]
    )
