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
    what: str  # what is wrong, for the table
    change: Callable[[Arguments], Arguments]  # valid arguments -> the ones to replace
    error: type[FlashAttnError]
    match: str  # regular expression found in the message


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

ERROR_CASES = [
    # kind, rank, shape
    ErrorCase(
        "not_a_tensor",
        FUNC,
        "an argument is not a tensor",
        lambda a: dict(q="q"),
        T,
        r"q must be a torch.Tensor, got",
    ),
    ErrorCase(
        "none",
        FUNC,
        "a required tensor is None",
        lambda a: dict(v=None),
        T,
        r"v must be a torch.Tensor, got None",
    ),
    ErrorCase(
        "sparse",
        FUNC,
        "a sparse tensor",
        lambda a: dict(k=a["k"].to_sparse()),
        T,
        r"k must be a dense tensor",
    ),
    ErrorCase(
        "rank_q",
        FUNC,
        "q of wrong rank",
        lambda a: dict(q=a["q"][0]),
        V,
        r"q must have shape \(batch_size, seqlen_q, num_heads, head_size\), got \(5, 4, 16\)",
    ),
    ErrorCase(
        "rank_k",
        FUNC,
        "k of wrong rank",
        lambda a: dict(k=a["k"][0]),
        V,
        r"k must have shape \(batch_size, seqlen_k, num_heads_k, head_size\)",
    ),
    ErrorCase(
        "batch_differs",
        FUNC,
        "batch sizes differ",
        lambda a: dict(k=a["k"][:1]),
        V,
        r"k must have shape .* with batch_size 2, got \(1, 8, 2, 16\)",
    ),
    ErrorCase(
        "length_differs",
        FUNC,
        "k and v differ in length",
        lambda a: dict(v=a["v"][:, :7]),
        V,
        r"v must have shape .* with batch_size 2, seqlen_k 8, got \(2, 7, 2, 16\)",
    ),
    ErrorCase(
        "rank_kv",
        KV,
        "kv without its dimension of 2",
        lambda a: dict(kv=a["kv"][:, :, 0]),
        V,
        r"kv must have shape \(batch_size, seqlen_k, 2, num_heads_k, head_size\), got",
    ),
    ErrorCase(
        "rank_qkv",
        QKV,
        "qkv whose dimension 2 is not 3",
        lambda a: dict(qkv=a["qkv"][:, :, :2]),
        V,
        r"qkv must have shape \(batch_size, seqlen, 3, num_heads, head_size\), got",
    ),
    ErrorCase(
        "qkv_not_a_tensor",
        QKV,
        "qkv is not a tensor",
        lambda a: dict(qkv=[a["qkv"]]),
        T,
        r"qkv must be a torch.Tensor",
    ),
    # heads
    ErrorCase(
        "heads_do_not_divide",
        FUNC,
        "head counts that do not divide",
        lambda a: dict(q=a["q"][:, :, :3]),
        V,
        r"Number of heads in key/value must divide number of heads in query, got 2 and 3",
    ),
    ErrorCase(
        "heads_of_v",
        FUNC,
        "k and v differ in heads",
        lambda a: dict(v=a["v"][:, :, :1]),
        V,
        r"v must have as many heads as k, 2, got 1",
    ),
    ErrorCase(
        "head_dim_differs",
        FUNC,
        "head dimensions of q and k differ",
        lambda a: dict(k=a["k"][..., :8]),
        V,
        r"k must have the head dimension of q, 16, got 8",
    ),
    ErrorCase(
        "head_dim_too_large",
        FUNC,
        "head dimension above 512",
        lambda a: dict(q=torch.zeros(2, 5, 4, 520), k=torch.zeros(2, 8, 2, 520)),
        V,
        r"q: FlashAttention only supports head dimension at most 512",
    ),
    ErrorCase(
        "head_dim_v_too_large",
        FUNC,
        "head dimension of v above 512",
        lambda a: dict(v=torch.zeros(2, 8, 2, 520)),
        V,
        r"v: FlashAttention only supports head dimension at most 512",
    ),
    ErrorCase(
        "head_dim_zero",
        FUNC,
        "head dimension 0",
        lambda a: dict(q=a["q"][..., :0], k=a["k"][..., :0]),
        V,
        r"q: .*head dimension at most 512 and at least 1, got 0",
    ),
    # dtype, device
    ErrorCase(
        "integers",
        FUNC,
        "integers as q",
        lambda a: {n: a[n].int() for n in "qkv"},
        T,
        r"q must have dtype float16.*got torch.int32",
    ),
    ErrorCase(
        "mixed_dtypes",
        FUNC,
        "mixed dtypes",
        lambda a: dict(k=a["k"].half()),
        T,
        r"k: query and key must have the same dtype, torch.float32, got torch.float16",
    ),
    ErrorCase(
        "mixed_dtypes_v", FUNC, "v of another dtype", lambda a: dict(v=a["v"].double()), T, r"v: .*same dtype"
    ),
    ErrorCase(
        "mixed_devices",
        FUNC,
        "mixed devices",
        lambda a: dict(v=a["v"].to(META)),
        V,
        r"v must be on the device of q, cpu, got meta",
    ),
    # numbers
    ErrorCase(
        "dropout_1",
        FUNC,
        "dropout_p of 1",
        lambda a: dict(dropout_p=1.0),
        V,
        r"dropout_p must lie in \[0, 1\), got 1.0",
    ),
    ErrorCase(
        "dropout_negative",
        FUNC,
        "negative dropout_p",
        lambda a: dict(dropout_p=-0.1),
        V,
        r"dropout_p must lie in \[0, 1\)",
    ),
    ErrorCase(
        "dropout_nan",
        FUNC,
        "dropout_p is NaN",
        lambda a: dict(dropout_p=float("nan")),
        V,
        r"dropout_p must lie in",
    ),
    ErrorCase(
        "dropout_not_a_number",
        FUNC,
        "dropout_p is not a number",
        lambda a: dict(dropout_p=[0.1]),
        T,
        r"dropout_p must be a number",
    ),
    ErrorCase(
        "softcap_negative",
        FUNC,
        "negative softcap",
        lambda a: dict(softcap=-1.0),
        V,
        r"softcap must be 0 \(off\) or positive",
    ),
    ErrorCase(
        "scale_infinite",
        FUNC,
        "softmax_scale is not finite",
        lambda a: dict(softmax_scale=float("inf")),
        V,
        r"softmax_scale must be finite",
    ),
    ErrorCase(
        "scale_tensor",
        FUNC,
        "softmax_scale is a tensor",
        lambda a: dict(softmax_scale=torch.tensor(0.5)),
        T,
        r"softmax_scale must be a Python number",
    ),
    ErrorCase(
        "causal_text",
        FUNC,
        "causal is a string",
        lambda a: dict(causal="False"),
        T,
        r"causal must be True or False",
    ),
    ErrorCase(
        "window_one",
        FUNC,
        "window_size is one number",
        lambda a: dict(window_size=3),
        T,
        r"window_size must be two integers",
    ),
    ErrorCase(
        "window_three",
        FUNC,
        "window_size has three numbers",
        lambda a: dict(window_size=(1, 2, 3)),
        T,
        r"window_size must be two integers",
    ),
    ErrorCase(
        "window_floats",
        FUNC,
        "window_size is not integers",
        lambda a: dict(window_size=(1.5, 2)),
        T,
        r"window_size must be two integers",
    ),
    ErrorCase(
        "window_none",
        FUNC,
        "window_size holds None",
        lambda a: dict(window_size=(None, None)),
        T,
        r"window_size must be two integers",
    ),
    # ALiBi
    ErrorCase(
        "alibi_dtype",
        FUNC,
        "alibi_slopes of wrong dtype",
        lambda a: dict(alibi_slopes=torch.ones(4).half()),
        T,
        r"ALiBi slopes must have dtype fp32",
    ),
    ErrorCase(
        "alibi_shape",
        FUNC,
        "alibi_slopes of wrong shape",
        lambda a: dict(alibi_slopes=torch.ones(3)),
        V,
        r"alibi_slopes must have shape \(num_heads,\) = \(4,\) or \(batch_size, num_heads\) = \(2, 4\), got \(3,\)",
    ),
    ErrorCase(
        "alibi_device",
        FUNC,
        "alibi_slopes on another device",
        lambda a: dict(alibi_slopes=torch.ones(4, device=META)),
        V,
        r"alibi_slopes must be on the device of q",
    ),
    ErrorCase(
        "alibi_kind",
        FUNC,
        "alibi_slopes is a list",
        lambda a: dict(alibi_slopes=[1.0] * 4),
        T,
        r"alibi_slopes must be a torch.Tensor",
    ),
    # packed sequences
    ErrorCase(
        "cu_none",
        VAR,
        "cu_seqlens_q is a list",
        lambda a: dict(cu_seqlens_q=[0, 5, 9]),
        T,
        r"cu_seqlens_q must be a torch.Tensor",
    ),
    ErrorCase(
        "cu_dtype",
        VAR,
        "cu_seqlens of wrong dtype",
        lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"].long()),
        T,
        r"cu_seqlens_q must have dtype int32, got torch.int64",
    ),
    ErrorCase(
        "cu_length",
        VAR,
        "cu_seqlens_q and cu_seqlens_k differ in length",
        lambda a: dict(cu_seqlens_k=_ints(0, 14)),
        V,
        r"cu_seqlens_k must have shape \(batch_size \+ 1,\) with batch_size \+ 1 3, got \(2,\)",
    ),
    ErrorCase(
        "cu_rank",
        VAR,
        "cu_seqlens of wrong rank",
        lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"][None]),
        V,
        r"cu_seqlens_q must have shape",
    ),
    ErrorCase(
        "cu_empty",
        VAR,
        "cu_seqlens without an element",
        lambda a: dict(cu_seqlens_q=_ints()),
        V,
        r"cu_seqlens_q must have",
    ),
    ErrorCase(
        "cu_device",
        VAR,
        "cu_seqlens on another device",
        lambda a: dict(cu_seqlens_k=a["cu_seqlens_k"].to(META)),
        V,
        r"cu_seqlens_k must be on the device of q, cpu, got meta",
    ),
    ErrorCase(
        "cu_order",
        VAR,
        "cu_seqlens decrease",
        lambda a: dict(cu_seqlens_q=_ints(0, 9, 5)),
        V,
        r"cu_seqlens_q .* must not decrease, got \[0, 9, 5\]",
    ),
    ErrorCase(
        "cu_negative",
        VAR,
        "cu_seqlens start below 0",
        lambda a: dict(cu_seqlens_k=_ints(-1, 7, 14)),
        V,
        r"cu_seqlens_k must not be negative",
    ),
    ErrorCase(
        "cu_past_end",
        VAR,
        "cu_seqlens end behind the tensor",
        lambda a: dict(cu_seqlens_k=_ints(0, 8, 15)),
        V,
        r"cu_seqlens_k must end within the 14 rows",
    ),
    ErrorCase(
        "max_q_small",
        VAR,
        "max_seqlen_q too small",
        lambda a: dict(max_seqlen_q=4),
        V,
        r"max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 5, got 4",
    ),
    ErrorCase(
        "max_k_small",
        VAR,
        "max_seqlen_k too small",
        lambda a: dict(max_seqlen_k=7),
        V,
        r"max_seqlen_k must be at least .* 8, got 7",
    ),
    ErrorCase(
        "max_negative",
        VAR,
        "max_seqlen_q negative",
        lambda a: dict(max_seqlen_q=-1),
        V,
        r"max_seqlen_q must not be negative",
    ),
    ErrorCase(
        "max_float",
        VAR,
        "max_seqlen_q is not an integer",
        lambda a: dict(max_seqlen_q=5.0),
        T,
        r"max_seqlen_q must be an integer, got 5.0",
    ),
    ErrorCase(
        "max_none",
        VAR,
        "max_seqlen_k is None",
        lambda a: dict(max_seqlen_k=None),
        T,
        r"max_seqlen_k must be an integer for packed rows",
    ),
    ErrorCase(
        "max_vector",
        VAR,
        "max_seqlen_q is a vector",
        lambda a: dict(max_seqlen_q=_ints(5, 4)),
        T,
        r"max_seqlen_q must be an integer",
    ),
    ErrorCase(
        "total_differs",
        VAR,
        "k and v differ in rows",
        lambda a: dict(v=a["v"][:13]),
        V,
        r"v must have shape .* with total_k 14, got",
    ),
    ErrorCase(
        "rank_varlen",
        VAR,
        "packed q of wrong rank",
        lambda a: dict(q=a["q"][None]),
        V,
        r"q must have shape \(total_q, num_heads, head_size\)",
    ),
    ErrorCase(
        "rank_vkv",
        VKV,
        "packed kv of wrong rank",
        lambda a: dict(kv=a["kv"][:, 0]),
        V,
        r"kv must have shape \(total_k, 2, num_heads_k, head_size\)",
    ),
    ErrorCase(
        "rank_vqkv",
        VQKV,
        "packed qkv of wrong rank",
        lambda a: dict(qkv=a["qkv"][None]),
        V,
        r"qkv must have shape \(total, 3, num_heads, head_size\)",
    ),
    ErrorCase(
        "max_vqkv",
        VQKV,
        "max_seqlen too small",
        lambda a: dict(max_seqlen=4),
        V,
        r"max_seqlen_q must be at least",
    ),
    ErrorCase(
        "varlen_table",
        VPAGED,
        "block_table names a page that is not there",
        lambda a: dict(block_table=_ints([4, 0], [2, 5])),
        V,
        r"block_table\[1\] must name pages in \[0, 5\) for 6 keys, got \[2, 5\]",
    ),
    ErrorCase(
        "varlen_table_short",
        VPAGED,
        "block_table too short for cu_seqlens_k",
        lambda a: dict(block_table=_ints([4], [2])),
        V,
        r"exceeds the capacity addressable by block_table",
    ),
    ErrorCase(
        "varlen_pages",
        VPAGED,
        "pages of k and v differ in size",
        lambda a: dict(v=a["v"][:, :3]),
        V,
        r"v must have shape .* with num_blocks 5, page_block_size 4, got",
    ),
    # KV cache
    ErrorCase(
        "cache_rank",
        CACHE,
        "k_cache of wrong rank",
        lambda a: dict(k_cache=a["k_cache"][0]),
        V,
        r"k_cache must have shape",
    ),
    ErrorCase(
        "cache_dtype",
        CACHE,
        "cache of another dtype",
        lambda a: dict(k_cache=a["k_cache"].half()),
        T,
        r"k_cache: query and key must have the same dtype",
    ),
    ErrorCase(
        "cache_small_batch",
        CACHE,
        "fewer cache rows than sequences",
        lambda a: dict(k_cache=a["k_cache"][:1], v_cache=a["v_cache"][:1]),
        V,
        r"k_cache must have at least a row per sequence, 2, got 1",
    ),
    ErrorCase(
        "cache_strided",
        CACHE,
        "cache with a strided last dimension",
        lambda a: dict(k_cache=torch.zeros(2, 8, 2, 32)[..., ::2]),
        V,
        r"k_cache must have contiguous last dimension",
    ),
    ErrorCase(
        "seqlens_dtype",
        CACHE,
        "cache_seqlens of wrong dtype",
        lambda a: dict(cache_seqlens=a["cache_seqlens"].long()),
        T,
        r"cache_seqlens must have dtype int32",
    ),
    ErrorCase(
        "seqlens_shape",
        CACHE,
        "cache_seqlens of wrong length",
        lambda a: dict(cache_seqlens=_ints(1, 2, 3)),
        V,
        r"cache_seqlens must have shape",
    ),
    ErrorCase(
        "seqlens_kind",
        CACHE,
        "cache_seqlens is a list",
        lambda a: dict(cache_seqlens=[3, 7]),
        T,
        r"cache_seqlens must be an int, an int32 tensor or None",
    ),
    ErrorCase(
        "seqlens_negative",
        CACHE,
        "cache_seqlens negative",
        lambda a: dict(cache_seqlens=_ints(3, -1)),
        V,
        r"cache_seqlens\[1\] must not be negative",
    ),
    ErrorCase(
        "seqlens_too_large",
        CACHE,
        "cache_seqlens beyond the capacity",
        lambda a: dict(k=None, v=None, cache_seqlens=_ints(3, 9)),
        V,
        r"cache_seqlens\[1\] .* exceeds the capacity of the cache, 8, got 9",
    ),
    ErrorCase(
        "append_overflow",
        CACHE,
        "append overflows the cache",
        lambda a: dict(cache_seqlens=_ints(8, 3)),
        V,
        r"cache_seqlens\[0\] .* with 1 new keys, .* exceeds the capacity of the cache, 8, got 8",
    ),
    ErrorCase(
        "append_overflow_int",
        CACHE,
        "append overflows the cache, integer length",
        lambda a: dict(cache_seqlens=8),
        V,
        r"cache_seqlens\[0\] .* exceeds the capacity of the cache, 8, got 8",
    ),
    ErrorCase(
        "append_longer",
        CACHE,
        "more new keys than the cache holds",
        lambda a: dict(k=torch.zeros(2, 9, 2, 16), v=torch.zeros(2, 9, 2, 16)),
        V,
        r"it must have seqlen <= the seqlen of the KV cache, 8, got 9",
    ),
    ErrorCase(
        "k_without_v",
        CACHE,
        "k without v",
        lambda a: dict(v=None),
        V,
        r"If key is supplied, value \(v\) must also be passed in",
    ),
    ErrorCase(
        "v_without_k",
        CACHE,
        "v without k",
        lambda a: dict(k=None),
        V,
        r"If value is supplied, key \(k\) must also be passed in",
    ),
    ErrorCase(
        "k_without_seqlens",
        CACHE,
        "k without cache_seqlens",
        lambda a: dict(cache_seqlens=None),
        V,
        r"If key is supplied, seqlens_k \(cache_seqlens\) must also be passed in",
    ),
    ErrorCase(
        "new_k_shape",
        CACHE,
        "new k of wrong head count",
        lambda a: dict(k=torch.zeros(2, 1, 1, 16)),
        V,
        r"k must have shape .* num_heads_k 2",
    ),
    ErrorCase(
        "new_v_dtype",
        CACHE,
        "new v of another dtype",
        lambda a: dict(v=a["v"].half()),
        T,
        r"v must have the same dtype as query",
    ),
    ErrorCase(
        "batch_idx_dtype",
        CACHE,
        "cache_batch_idx of wrong dtype",
        lambda a: dict(cache_batch_idx=torch.tensor([0, 1])),
        T,
        r"cache_batch_idx must have dtype int32",
    ),
    ErrorCase(
        "batch_idx_range",
        CACHE,
        "cache_batch_idx out of range",
        lambda a: dict(cache_batch_idx=_ints(0, 2)),
        V,
        r"cache_batch_idx\[1\] must lie in \[0, 1\]",
    ),
    ErrorCase(
        "leftpad_range",
        CACHE,
        "cache_leftpad behind the valid keys",
        lambda a: dict(cache_leftpad=_ints(0, 9)),
        V,
        r"cache_leftpad\[1\] must lie in \[0, 8\]",
    ),
    ErrorCase(
        "splits_many",
        CACHE,
        "num_splits above 128",
        lambda a: dict(num_splits=129),
        V,
        r"num_splits > 128 not supported",
    ),
    ErrorCase(
        "splits_float",
        CACHE,
        "num_splits is not an integer",
        lambda a: dict(num_splits=1.5),
        T,
        r"num_splits must be an integer",
    ),
    ErrorCase(
        "rotary_without_k",
        CACHE,
        "rotary without k",
        lambda a: dict(k=None, v=None, rotary_cos=torch.ones(8, 8), rotary_sin=torch.ones(8, 8)),
        V,
        r"If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided",
    ),
    ErrorCase(
        "rotary_one",
        CACHE,
        "rotary_cos without rotary_sin",
        lambda a: dict(rotary_cos=torch.ones(8, 8)),
        V,
        r"rotary_cos and rotary_sin must be given together",
    ),
    ErrorCase(
        "rotary_short",
        CACHE,
        "rotary shorter than the cache",
        lambda a: dict(rotary_cos=torch.ones(7, 8), rotary_sin=torch.ones(7, 8)),
        V,
        r"cos/sin seqlen must be at least the seqlen of KV cache, 8, got 7",
    ),
    ErrorCase(
        "rotary_wide",
        CACHE,
        "rotary_dim above the head dimension",
        lambda a: dict(rotary_cos=torch.ones(8, 9), rotary_sin=torch.ones(8, 9)),
        V,
        r"rotary_dim must be <= headdim, 16",
    ),
    ErrorCase(
        "rotary_shapes",
        CACHE,
        "rotary_cos and rotary_sin differ in shape",
        lambda a: dict(rotary_cos=torch.ones(8, 8), rotary_sin=torch.ones(8, 4)),
        V,
        r"rotary_sin must have the shape of rotary_cos",
    ),
    ErrorCase(
        "rotary_odd",
        CACHE,
        "rotary of an odd head dimension that it does not fit",
        lambda a: {
            **{n: a[n][..., :15] for n in ("q", "k", "v")},
            **{n: a[n][..., :15].contiguous() for n in ("k_cache", "v_cache")},
            "rotary_cos": torch.ones(8, 8),
            "rotary_sin": torch.ones(8, 8),
        },
        V,
        r"rotary_dim must be <= headdim, 15",
    ),
    ErrorCase(
        "rotary_dtype",
        CACHE,
        "rotary of another dtype",
        lambda a: dict(rotary_cos=torch.ones(8, 8).half(), rotary_sin=torch.ones(8, 8).half()),
        T,
        r"rotary_cos must have the same dtype as query",
    ),
    # pages
    ErrorCase(
        "page_sizes",
        PAGED,
        "page sizes of k_cache and v_cache differ",
        lambda a: dict(v_cache=a["v_cache"][:, :3].contiguous()),
        V,
        r"v_cache must have shape .* page_block_size 4, got",
    ),
    ErrorCase(
        "page_size_0",
        PAGED,
        "pages without rows",
        lambda a: dict(k_cache=a["k_cache"][:, :0], v_cache=a["v_cache"][:, :0]),
        V,
        r"page size, its dimension 1, must be at least 1",
    ),
    ErrorCase(
        "table_range",
        PAGED,
        "block_table out of range",
        lambda a: dict(block_table=_ints([4, 0], [2, 5])),
        V,
        r"block_table\[1\] must name pages in \[0, 5\) for 8 keys",
    ),
    ErrorCase(
        "table_negative",
        PAGED,
        "block_table negative",
        lambda a: dict(block_table=_ints([-1, 0], [2, 1])),
        V,
        r"block_table\[0\] must name pages",
    ),
    ErrorCase(
        "table_dtype",
        PAGED,
        "block_table of wrong dtype",
        lambda a: dict(block_table=a["block_table"].long()),
        T,
        r"block_table must have dtype int32",
    ),
    ErrorCase(
        "table_batch",
        PAGED,
        "block_table of wrong batch",
        lambda a: dict(block_table=_ints([4, 0])),
        V,
        r"block_table must have shape \(batch_size, max_num_blocks\) with batch_size 2, got",
    ),
    ErrorCase(
        "paged_overflow",
        PAGED,
        "append overflows the pages",
        lambda a: dict(cache_seqlens=_ints(3, 8)),
        V,
        r"exceeds the capacity addressable by block_table, 8, got 8",
    ),
    ErrorCase(
        "paged_batch_idx",
        PAGED,
        "pages and cache_batch_idx",
        lambda a: dict(cache_batch_idx=_ints(0, 1)),
        V,
        r"Paged KVcache does not support cache_batch_idx",
    ),
]


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
