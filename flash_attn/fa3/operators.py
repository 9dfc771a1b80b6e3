"""FlashAttention-3's operators `torch.ops.flash_attn_3.*`: its compiled module's, and the two Python ones above them.

PyTorch's own "FA3" activation calls `fwd` and `bwd` by position; TransformerEngine and Megatron-LM call
`_flash_attn_forward` and `_flash_attn_backward`. Differences: a row that sees no key has lse -inf also where the key
tensor is empty; the auxiliary buffers among the results are empty; `scheduler_metadata`, `pack_gqa` and `sm_margin`
steer FlashAttention-3's own kernels and change nothing here.
"""

import torch
from torch import Tensor

from flash_attn import _legacy
from flash_attn.attention import run_append, run_forward
from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.fa3.describe import described, refuse

_legacy.claim_operators(__file__, "flash_attn_3", "fwd")

_lib = torch.library.Library("flash_attn_3", "FRAGMENT")

_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None,"
    " Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,"
    " Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,"
    " Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False,"
    " Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0)"
    " -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,"
    " Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,"
    " float softcap=0.0, bool deterministic=False, int sm_margin=0)"
    " -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_COMBINE = (
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None)"
    " -> (Tensor(out!), Tensor)"
)
_METADATA = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k,"
    " int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None,"
    " int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0,"
    " bool? pack_gqa=None, int sm_margin=0) -> Tensor"
)
for _schema in (_FORWARD, _BACKWARD, _COMBINE, _METADATA):
    _lib.define(_schema)


def _fwd(
    q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
    kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
    k_descale=None, v_descale=None, softmax_scale=None, is_causal=False, window_size_left=-1,
    window_size_right=-1, attention_chunk=0, softcap=0.0, is_rotary_interleaved=False, scheduler_metadata=None,
    num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    """(out, softmax_lse, empty, empty); the result is also written into `out` where that is given."""
    refuse(
        qv=q_v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=seqlens_rotary,
    )  # fmt: skip
    problem, ops, new = described(
        q, k, v, k_new, v_new, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, softmax_scale, is_causal,
        (window_size_left, window_size_right), softcap, is_rotary_interleaved, num_splits,
    )  # fmt: skip
    with torch.no_grad():
        result, lse = run_forward(problem, ops if new is None else run_append(problem, ops, new))
        if out is not None and (out.shape != result.shape or out.dtype != result.dtype):
            raise ArgumentValueError(
                f"out must have shape {tuple(result.shape)} and dtype {result.dtype},"
                f" got {tuple(out.shape)} and {out.dtype}"
            )
        result = result.contiguous() if out is None else out.copy_(result)
    return result, lse.contiguous(), _empty(q), _empty(q)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _bwd(
    dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
    seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, is_causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    """(dq, dk, dv, and five auxiliary buffers of FlashAttention-3's, empty here); a gradient not given is made."""
    grads = _or_like((dq, dk, dv), (q, k, v))
    _gradients(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        *grads, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic,
    )  # fmt: skip
    return *grads, *(_empty(q) for _ in range(5))


def _or_like(given, tensors) -> list[Tensor]:
    """Each of `given`, or a new tensor like the one of `tensors` where it is None."""
    return [torch.empty_like(x) if g is None else g for g, x in zip(given, tensors, strict=True)]


def _gradients(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    dq, dk, dv, softmax_scale, causal, left, right, softcap, deterministic,
):  # fmt: skip
    """Write the gradients into dq, dk and dv; returns the description."""
    if dq is None or dk is None or dv is None:
        raise ArgumentValueError(
            "dq, dk and dv must be given, the gradients are only written into them, got None"
        )
    problem, ops, _ = described(
        q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, None, None,
        None, None, None, softmax_scale, causal, (left, right), softcap, deterministic=deterministic,
    )  # fmt: skip
    with torch.no_grad():
        _legacy.backward(problem, ops, out, softmax_lse, dout, None, (dq, dk, dv), None)
    return problem


def combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them.

    Args:
        out_partial: (parts, B, M, H, Dv) or (parts, total_q, H, Dv), fp32. lse_partial: the same without Dv.
        out: where to write the result. out_dtype: its dtype (default: that of out_partial).

    Returns:
        (out (B, M, H, Dv), softmax_lse (B, M, H)); a row whose parts all saw no key gives 0 and -inf.
    """
    if out_partial.shape[:-1] != lse_partial.shape:
        raise ArgumentValueError(
            f"lse_partial must have shape {tuple(out_partial.shape[:-1])}, got {tuple(lse_partial.shape)}"
        )
    lse = lse_partial.logsumexp(0)
    # a row without keys anywhere: exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN
    weights = (lse_partial - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    # 0 * NaN: what a part without keys holds may be anything
    sums = torch.where(weights[..., None] > 0, weights[..., None] * out_partial, 0.0).sum(0)
    if out is not None:
        return out.copy_(sums), lse
    return sums.to(out_dtype or out_partial.dtype), lse


def _metadata(batch_size, max_seqlen_q, max_seqlen_k, *rest, **named) -> Tensor:
    """Opaque to callers, who only pass it on; nothing here needs it."""
    return torch.zeros(1, dtype=torch.int32, device=rest[5].device)


for _name, _function in (
    ("fwd", _fwd),
    ("bwd", _bwd),
    ("fwd_combine", combine),
    ("get_scheduler_metadata", _metadata),
):
    _lib.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("flash_attn_3::fwd", lib=_lib)
def _(q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, *rest, **named):
    fresh, lse, *_ = _fake(q, v, cu_seqlens_q)
    return fresh if out is None else out, lse, _empty(q), _empty(q)


def _fake(q: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(lse, dtype=torch.promote_types(torch.float32, q.dtype)),
        _empty(q),
        _empty(q),
    )


@torch.library.register_fake("flash_attn_3::bwd", lib=_lib)
def _(dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, *rest, **named):
    return *_or_like((dq, dk, dv), (q, k, v)), *(_empty(q) for _ in range(5))


# --- the Python operators above them, which autograd and torch.compile see ---------------------------------


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None, num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, softmax_lse, empty, empty), see `fwd`. `out_` and an append write what the schema does not say: they are
    for eager calls only, as in FlashAttention-3."""
    if out_ is not None:
        raise UnsupportedError(
            "out_ cannot be returned by a custom operator: call torch.ops.flash_attn_3.fwd"
        )
    return _fwd(
        q, k, v, k_new, v_new, qv, None, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size_left, window_size_right, attention_chunk,
        softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


@_flash_attn_forward.register_fake
def _(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, *rest, **named):
    if k_new is not None or out_ is not None:
        raise UnsupportedError(
            "flash_attn_3::_flash_attn_forward writes k_new or out_, which a graph cannot see:"
            " use flash_attn_with_kvcache for the cache, and no out_"
        )
    return _fake(q, v, cu_seqlens_q)


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv; returns softmax_d = rowsum(dout * out), as `flash_attn::_flash_attn_backward` does."""
    problem = _gradients(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic,
    )  # fmt: skip
    return _legacy.softmax_d(problem, out, dout)


@_flash_attn_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, *rest, **named):
    if cu_seqlens_q is not None:
        return q.new_empty((q.shape[1], q.shape[0] + 128 * (cu_seqlens_q.shape[0] - 1)), dtype=torch.float32)
    B, M, H, _ = q.shape
    return q.new_empty((B, H, _legacy.round_multiple(M, 128)), dtype=torch.float32)


@torch.library.custom_op("flash_attn_3::_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), fresh and contiguous; `_flash_attn_backward` knows no gradient of the lse."""
    problem, ops, _ = described(
        q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, None, None,
        None, None, None, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        deterministic=deterministic,
    )  # fmt: skip
    return _legacy.backward(problem, ops, out, softmax_lse, dout, dlse, (None, None, None), None)


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output[:2], *inputs[7:9], *inputs[10:12])
    ctx.lengths, ctx.plain = inputs[12:14], all(x is None for x in (inputs[3], *inputs[14:17]))
    ctx.numbers = (*inputs[23:27], inputs[28])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, *_):
    if not ctx.plain:
        raise UnsupportedError(
            "attention over pages, a cache index or leftpad_k has no backward; gather the keys instead"
        )
    q, k, v, out, lse, *lengths = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = torch.ops.flash_attn_3._attention_backward(
        dout, dlse, q, k, v, out, lse, *lengths, *ctx.lengths, *ctx.numbers, deterministic
    )
    return *grads, *[None] * 31


_flash_attn_forward.register_autograd(_backward, setup_context=_save)
