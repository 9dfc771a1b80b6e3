"""Every bad input and the error it meets: one row each. `docs/errors.md` is made from this table:

python tests/error_cases.py > docs/errors.md
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import flash_attn
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, FlashAttnError

Arguments = dict[str, Any]


class ErrorCase(NamedTuple):
    id: str
    function: str
    argument: str  # the message begins with it
    what: str  # what is wrong, for the table
    change: Callable[[Arguments], Arguments]  # valid arguments -> the ones to replace
    error: type[FlashAttnError]


def valid(function: str) -> Arguments:
    """Arguments that `function` accepts: B 2, M 5, N 8, H 4, Hk 2, D 16; a paged cache has pages of 4."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    def ints(*values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    packed = dict(cu_seqlens_q=ints(0, 5, 9), cu_seqlens_k=ints(0, 8, 14), max_seqlen_q=5, max_seqlen_k=8)
    cache = dict(q=normal(2, 1, 4, 16), k_cache=normal(2, 8, 2, 16), v_cache=normal(2, 8, 2, 16))
    new = dict(k=normal(2, 1, 2, 16), v=normal(2, 1, 2, 16), cache_seqlens=ints(3, 7))
    pages = dict(k_cache=normal(5, 4, 2, 16), v_cache=normal(5, 4, 2, 16), block_table=ints([4, 0], [2, 1]))
    return {
        "flash_attn_func": dict(q=normal(2, 5, 4, 16), k=normal(2, 8, 2, 16), v=normal(2, 8, 2, 16)),
        "flash_attn_kvpacked_func": dict(q=normal(2, 5, 4, 16), kv=normal(2, 8, 2, 2, 16)),
        "flash_attn_qkvpacked_func": dict(qkv=normal(2, 5, 3, 4, 16)),
        "flash_attn_varlen_func": dict(
            q=normal(9, 4, 16), k=normal(14, 2, 16), v=normal(14, 2, 16), **packed
        ),
        "flash_attn_varlen_kvpacked_func": dict(q=normal(9, 4, 16), kv=normal(14, 2, 2, 16), **packed),
        "flash_attn_varlen_qkvpacked_func": dict(
            qkv=normal(9, 3, 4, 16), cu_seqlens=ints(0, 5, 9), max_seqlen=5
        ),
        "flash_attn_with_kvcache": {**cache, **new},
        "paged": {**cache, **new, **pages},
        "varlen paged": dict(
            q=normal(9, 4, 16), k=normal(5, 4, 2, 16), v=normal(5, 4, 2, 16), block_table=ints([4, 0], [2, 1]),
            **packed,
        ),
    }[function]  # fmt: skip


def name(function: str) -> str:
    """The public function of a set of valid arguments."""
    return {"paged": "flash_attn_with_kvcache", "varlen paged": "flash_attn_varlen_func"}.get(
        function, function
    )


def call(case: ErrorCase) -> tuple[Callable[[], Any], Arguments]:
    """The failing call and its arguments."""
    arguments = valid(case.function)
    arguments |= case.change(arguments)
    function = getattr(flash_attn, name(case.function))
    return lambda: function(**arguments), arguments


def _ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


V, T = ArgumentValueError, ArgumentTypeError
FUNC, KV, QKV = "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"
VAR, VKV, VQKV = (
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
)
CACHE, PAGED, VPAGED = "flash_attn_with_kvcache", "paged", "varlen paged"
META = torch.device("meta")


def rows(function: str, error: type[FlashAttnError], cases: list[tuple]) -> list[ErrorCase]:
    """Rows of (id, argument, what, change) for one function and class."""
    return [ErrorCase(id, function, argument, what, change, error) for id, argument, what, change in cases]


ERROR_CASES = [
    *rows(FUNC, T, [
        ("not_a_tensor", "q", "an argument is not a tensor", lambda a: dict(q="q")),
        ("none", "v", "a required tensor is None", lambda a: dict(v=None)),
        ("sparse", "k", "a sparse tensor", lambda a: dict(k=a["k"].to_sparse())),
    ]),
    *rows(FUNC, V, [
        ("rank_q", "q", "q of wrong rank", lambda a: dict(q=a["q"][0])),
        ("rank_k", "k", "k of wrong rank", lambda a: dict(k=a["k"][0])),
        ("batch_differs", "k", "batch sizes differ", lambda a: dict(k=a["k"][:1])),
        ("length_differs", "v", "k and v differ in length", lambda a: dict(v=a["v"][:, :7])),
    ]),
    *rows(KV, V, [
        ("rank_kv", "kv", "kv without its dimension of 2", lambda a: dict(kv=a["kv"][:, :, 0])),
    ]),
    *rows(QKV, V, [
        ("rank_qkv", "qkv", "qkv whose dimension 2 is not 3", lambda a: dict(qkv=a["qkv"][:, :, :2])),
    ]),
    *rows(QKV, T, [
        ("qkv_not_a_tensor", "qkv", "qkv is not a tensor", lambda a: dict(qkv=[a["qkv"]])),
    ]),
    *rows(FUNC, V, [
        ("heads_do_not_divide", "k", "head counts that do not divide", lambda a: dict(q=a["q"][:, :, :3])),
        ("heads_of_v", "v", "k and v differ in heads", lambda a: dict(v=a["v"][:, :, :1])),
        ("head_dim_differs", "k", "head dimensions of q and k differ", lambda a: dict(k=a["k"][..., :8])),
        ("head_dim_too_large", "q", "head dimension above 512",
         lambda a: dict(q=torch.zeros(2, 5, 4, 520), k=torch.zeros(2, 8, 2, 520))),
        ("head_dim_v_too_large", "v", "head dimension of v above 512",
         lambda a: dict(v=torch.zeros(2, 8, 2, 520))),
        ("head_dim_zero", "q", "head dimension 0", lambda a: dict(q=a["q"][..., :0], k=a["k"][..., :0])),
    ]),
    *rows(FUNC, T, [
        ("integers", "q", "integers as q", lambda a: {n: a[n].int() for n in "qkv"}),
        ("mixed_dtypes", "k", "mixed dtypes", lambda a: dict(k=a["k"].half())),
        ("mixed_dtypes_v", "v", "v of another dtype", lambda a: dict(v=a["v"].double())),
    ]),
    *rows(FUNC, V, [
        ("mixed_devices", "v", "mixed devices", lambda a: dict(v=a["v"].to(META))),
        ("dropout_1", "dropout_p", "dropout_p of 1", lambda a: dict(dropout_p=1.0)),
        ("dropout_negative", "dropout_p", "negative dropout_p", lambda a: dict(dropout_p=-0.1)),
        ("dropout_nan", "dropout_p", "dropout_p is NaN", lambda a: dict(dropout_p=float("nan"))),
    ]),
    *rows(FUNC, T, [
        ("dropout_not_a_number", "dropout_p", "dropout_p is not a number", lambda a: dict(dropout_p=[0.1])),
    ]),
    *rows(FUNC, V, [
        ("softcap_negative", "softcap", "negative softcap", lambda a: dict(softcap=-1.0)),
        ("scale_infinite", "softmax_scale", "softmax_scale is not finite",
         lambda a: dict(softmax_scale=float("inf"))),
    ]),
    *rows(FUNC, T, [
        ("scale_tensor", "softmax_scale", "softmax_scale is a tensor",
         lambda a: dict(softmax_scale=torch.tensor(0.5))),
        ("causal_text", "causal", "causal is a string", lambda a: dict(causal="False")),
        ("window_one", "window_size", "window_size is one number", lambda a: dict(window_size=3)),
        ("window_three", "window_size", "window_size has three numbers",
         lambda a: dict(window_size=(1, 2, 3))),
        ("window_floats", "window_size", "window_size is not integers", lambda a: dict(window_size=(1.5, 2))),
        ("window_none", "window_size", "window_size holds None", lambda a: dict(window_size=(None, None))),
        ("alibi_dtype", "alibi_slopes", "alibi_slopes of wrong dtype",
         lambda a: dict(alibi_slopes=torch.ones(4).half())),
    ]),
    *rows(FUNC, V, [
        ("alibi_shape", "alibi_slopes", "alibi_slopes of wrong shape",
         lambda a: dict(alibi_slopes=torch.ones(3))),
        ("alibi_device", "alibi_slopes", "alibi_slopes on another device",
         lambda a: dict(alibi_slopes=torch.ones(4, device=META))),
    ]),
    *rows(FUNC, T, [
        ("alibi_kind", "alibi_slopes", "alibi_slopes is a list", lambda a: dict(alibi_slopes=[1.0] * 4)),
    ]),
    *rows(VAR, T, [
        ("cu_none", "cu_seqlens_q", "cu_seqlens_q is a list", lambda a: dict(cu_seqlens_q=[0, 5, 9])),
        ("cu_dtype", "cu_seqlens_q", "cu_seqlens of wrong dtype",
         lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"].long())),
    ]),
    *rows(VAR, V, [
        ("cu_length", "cu_seqlens_k", "cu_seqlens_q and cu_seqlens_k differ in length",
         lambda a: dict(cu_seqlens_k=_ints(0, 14))),
        ("cu_rank", "cu_seqlens_q", "cu_seqlens of wrong rank",
         lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"][None])),
        ("cu_empty", "cu_seqlens_q", "cu_seqlens without an element", lambda a: dict(cu_seqlens_q=_ints())),
        ("cu_device", "cu_seqlens_k", "cu_seqlens on another device",
         lambda a: dict(cu_seqlens_k=a["cu_seqlens_k"].to(META))),
        ("cu_order", "cu_seqlens_q", "cu_seqlens decrease", lambda a: dict(cu_seqlens_q=_ints(0, 9, 5))),
        ("cu_negative", "cu_seqlens_k", "cu_seqlens start below 0",
         lambda a: dict(cu_seqlens_k=_ints(-1, 7, 14))),
        ("cu_past_end", "cu_seqlens_k", "cu_seqlens end behind the tensor",
         lambda a: dict(cu_seqlens_k=_ints(0, 8, 15))),
        ("max_q_small", "max_seqlen_q", "max_seqlen_q too small", lambda a: dict(max_seqlen_q=4)),
        ("max_k_small", "max_seqlen_k", "max_seqlen_k too small", lambda a: dict(max_seqlen_k=7)),
        ("max_negative", "max_seqlen_q", "max_seqlen_q negative", lambda a: dict(max_seqlen_q=-1)),
    ]),
    *rows(VAR, T, [
        ("max_float", "max_seqlen_q", "max_seqlen_q is not an integer", lambda a: dict(max_seqlen_q=5.0)),
        ("max_none", "max_seqlen_k", "max_seqlen_k is None", lambda a: dict(max_seqlen_k=None)),
        ("max_vector", "max_seqlen_q", "max_seqlen_q is a vector", lambda a: dict(max_seqlen_q=_ints(5, 4))),
    ]),
    *rows(VAR, V, [
        ("total_differs", "v", "k and v differ in rows", lambda a: dict(v=a["v"][:13])),
        ("rank_varlen", "q", "packed q of wrong rank", lambda a: dict(q=a["q"][None])),
    ]),
    *rows(VKV, V, [
        ("rank_vkv", "kv", "packed kv of wrong rank", lambda a: dict(kv=a["kv"][:, 0])),
    ]),
    *rows(VQKV, V, [
        ("rank_vqkv", "qkv", "packed qkv of wrong rank", lambda a: dict(qkv=a["qkv"][None])),
        ("max_vqkv", "max_seqlen_q", "max_seqlen too small", lambda a: dict(max_seqlen=4)),
    ]),
    *rows(VPAGED, V, [
        ("varlen_table", "block_table", "block_table names a page that is not there",
         lambda a: dict(block_table=_ints([4, 0], [2, 5]))),
        ("varlen_table_short", "block_table", "block_table too short for cu_seqlens_k",
         lambda a: dict(block_table=_ints([4], [2]))),
        ("varlen_pages", "v", "pages of k and v differ in size", lambda a: dict(v=a["v"][:, :3])),
    ]),
    *rows(CACHE, V, [
        ("cache_rank", "k_cache", "k_cache of wrong rank", lambda a: dict(k_cache=a["k_cache"][0])),
    ]),
    *rows(CACHE, T, [
        ("cache_dtype", "k_cache", "cache of another dtype", lambda a: dict(k_cache=a["k_cache"].half())),
    ]),
    *rows(CACHE, V, [
        ("cache_small_batch", "k_cache", "fewer cache rows than sequences",
         lambda a: dict(k_cache=a["k_cache"][:1], v_cache=a["v_cache"][:1])),
        ("cache_strided", "k_cache", "cache with a strided last dimension",
         lambda a: dict(k_cache=torch.zeros(2, 8, 2, 32)[..., ::2])),
    ]),
    *rows(CACHE, T, [
        ("seqlens_dtype", "cache_seqlens", "cache_seqlens of wrong dtype",
         lambda a: dict(cache_seqlens=a["cache_seqlens"].long())),
    ]),
    *rows(CACHE, V, [
        ("seqlens_shape", "cache_seqlens", "cache_seqlens of wrong length",
         lambda a: dict(cache_seqlens=_ints(1, 2, 3))),
    ]),
    *rows(CACHE, T, [
        ("seqlens_kind", "cache_seqlens", "cache_seqlens is a list", lambda a: dict(cache_seqlens=[3, 7])),
    ]),
    *rows(CACHE, V, [
        ("seqlens_negative", "cache_seqlens", "cache_seqlens negative",
         lambda a: dict(cache_seqlens=_ints(3, -1))),
        ("seqlens_too_large", "cache_seqlens", "cache_seqlens beyond the capacity",
         lambda a: dict(k=None, v=None, cache_seqlens=_ints(3, 9))),
        ("append_overflow", "cache_seqlens", "append overflows the cache",
         lambda a: dict(cache_seqlens=_ints(8, 3))),
        ("append_overflow_int", "cache_seqlens", "append overflows the cache, integer length",
         lambda a: dict(cache_seqlens=8)),
        ("append_longer", "k", "more new keys than the cache holds",
         lambda a: dict(k=torch.zeros(2, 9, 2, 16), v=torch.zeros(2, 9, 2, 16))),
        ("k_without_v", "k", "k without v", lambda a: dict(v=None)),
        ("v_without_k", "k", "v without k", lambda a: dict(k=None)),
        ("k_without_seqlens", "cache_seqlens", "k without cache_seqlens", lambda a: dict(cache_seqlens=None)),
        ("new_k_shape", "k", "new k of wrong head count", lambda a: dict(k=torch.zeros(2, 1, 1, 16))),
    ]),
    *rows(CACHE, T, [
        ("new_v_dtype", "v", "new v of another dtype", lambda a: dict(v=a["v"].half())),
        ("batch_idx_dtype", "cache_batch_idx", "cache_batch_idx of wrong dtype",
         lambda a: dict(cache_batch_idx=torch.tensor([0, 1]))),
    ]),
    *rows(CACHE, V, [
        ("batch_idx_range", "cache_batch_idx", "cache_batch_idx out of range",
         lambda a: dict(cache_batch_idx=_ints(0, 2))),
        ("leftpad_range", "cache_leftpad", "cache_leftpad behind the valid keys",
         lambda a: dict(cache_leftpad=_ints(0, 9))),
        ("splits_many", "num_splits", "num_splits above 128", lambda a: dict(num_splits=129)),
    ]),
    *rows(CACHE, T, [
        ("splits_float", "num_splits", "num_splits is not an integer", lambda a: dict(num_splits=1.5)),
    ]),
    *rows(CACHE, V, [
        ("rotary_without_k", "rotary_cos", "rotary without k",
         lambda a: dict(k=None, v=None, rotary_cos=torch.ones(8, 8), rotary_sin=torch.ones(8, 8))),
        ("rotary_one", "rotary_cos", "rotary_cos without rotary_sin",
         lambda a: dict(rotary_cos=torch.ones(8, 8))),
        ("rotary_short", "rotary_cos", "rotary shorter than the cache",
         lambda a: dict(rotary_cos=torch.ones(7, 8), rotary_sin=torch.ones(7, 8))),
        ("rotary_wide", "rotary_cos", "rotary_dim above the head dimension",
         lambda a: dict(rotary_cos=torch.ones(8, 9), rotary_sin=torch.ones(8, 9))),
        ("rotary_shapes", "rotary_sin", "rotary_cos and rotary_sin differ in shape",
         lambda a: dict(rotary_cos=torch.ones(8, 8), rotary_sin=torch.ones(8, 4))),
        ("rotary_odd", "rotary_cos", "rotary of an odd head dimension that it does not fit",
         lambda a: {**{n: a[n][..., :15] for n in ("q", "k", "v")}, **{n: a[n][...,
             :15].contiguous() for n in ("k_cache", "v_cache")}, "rotary_cos": torch.ones(8, 8),
             "rotary_sin": torch.ones(8, 8)}),
    ]),
    *rows(CACHE, T, [
        ("rotary_dtype", "rotary_cos", "rotary of another dtype",
         lambda a: dict(rotary_cos=torch.ones(8, 8).half(), rotary_sin=torch.ones(8, 8).half())),
    ]),
    *rows(PAGED, V, [
        ("page_sizes", "v_cache", "page sizes of k_cache and v_cache differ",
         lambda a: dict(v_cache=a["v_cache"][:, :3].contiguous())),
        ("page_size_0", "k_cache", "pages without rows",
         lambda a: dict(k_cache=a["k_cache"][:, :0], v_cache=a["v_cache"][:, :0])),
        ("table_range", "block_table", "block_table out of range",
         lambda a: dict(block_table=_ints([4, 0], [2, 5]))),
        ("table_negative", "block_table", "block_table negative",
         lambda a: dict(block_table=_ints([-1, 0], [2, 1]))),
    ]),
    *rows(PAGED, T, [
        ("table_dtype", "block_table", "block_table of wrong dtype",
         lambda a: dict(block_table=a["block_table"].long())),
    ]),
    *rows(PAGED, V, [
        ("table_batch", "block_table", "block_table of wrong batch",
         lambda a: dict(block_table=_ints([4, 0]))),
        ("paged_overflow", "cache_seqlens", "append overflows the pages",
         lambda a: dict(cache_seqlens=_ints(3, 8))),
        ("paged_batch_idx", "cache_batch_idx", "pages and cache_batch_idx",
         lambda a: dict(cache_batch_idx=_ints(0, 1))),
    ]),
]  # fmt: skip


def document() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors", "",
        "Every error this package raises on purpose is a `flash_attn.FlashAttnError`, which is a `RuntimeError`, as",
        "FlashAttention-2 raises. `ArgumentTypeError` is also a `TypeError`: an argument has the wrong kind or dtype.",
        "`ArgumentValueError` is also a `ValueError`: it has the wrong shape, range, order or device.",
        "`UnsupportedError` is also a `NotImplementedError`: the request is right, but no backend can serve it; the",
        "message has the reason of each. All are raised before any work; no tensor has changed then.", "",
        "What can only be known by reading a tensor (order of `cu_seqlens`, entries of `block_table`, lengths) is",
        "checked always on the CPU, and on a GPU with `FLASH_ATTN_CHECK=1`, since it makes the host wait for the GPU.",
        "", "This table is made by `python tests/error_cases.py > docs/errors.md`; `tests/test_validate.py` walks it.",
        "", "| call | what is wrong | error | message |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for case in ERROR_CASES:
        try:
            call(case)[0]()
        except FlashAttnError as error:
            message = str(error).replace("|", "\\|")
            lines.append(f"| `{name(case.function)}` | {case.what} | `{type(error).__name__}` | {message} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
