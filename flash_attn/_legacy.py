"""The private operators of FlashAttention-2 that other projects call, as torch custom operators.

`flash_attn::_flash_attn_{forward,varlen_forward,backward,varlen_backward}` with upstream's names, order and
results. torch.compile, export and selective checkpointing see a public call as one of them. Where upstream
pads, rounds or refuses, these are wider: any head dim up to 512, softcap with dropout, exact shapes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.attention import run_backward, run_forward, seeded
from flash_attn.errors import ArgumentTypeError, ArgumentValueError
from flash_attn.problem import Operands, Problem, sees_all_rows
from flash_attn.validate import NEGLIGIBLE_DROPOUT, describe, describe_varlen, last_contiguous

# Where these operators come from; a second package that defines them would replace them in silence.
_OWNER = "defined_in"


class Forward(NamedTuple):
    out: Tensor  # like q, with the head dim of v, contiguous
    softmax_lse: Tensor  # (B, H, M) or (H, total_q); +inf for a row that sees no key
    s_dmask: Tensor  # (B, H, max_q, max_k), or (0,) where not asked for
    rng_state: Tensor  # int64 (2,), zeros without dropout


def claim_operators(file: str, namespace: str = "flash_attn", operator: str = "_flash_attn_forward") -> None:
    """Raise ImportError when another package has defined the operators of `namespace` in this process.

    `operator` is one of those that `file` is about to define.
    """
    ops = getattr(torch.ops, namespace)
    owner = getattr(ops, _OWNER, "another distribution") if hasattr(ops, operator) else file
    if owner != file:
        raise ImportError(
            f"two copies of {namespace} in one process: the operators {namespace}::* were defined by {owner};"
            f" this is {file}. Remove one of them from sys.path (pip list shows what is installed)."
        )
    setattr(ops, _OWNER, file)


claim_operators(__file__)


def surface_lse(problem: Problem, lse: Tensor) -> Tensor:
    """lse as FlashAttention-2 gives it: +inf, not -inf, for a row that sees no key."""
    return lse if sees_all_rows(problem) else lse.masked_fill(lse == -torch.inf, torch.inf)


def forward(problem: Problem, ops: Operands, dropout_p: float, return_softmax: bool) -> Forward:
    """One call in upstream's form, outside autograd."""
    if return_softmax and dropout_p <= 0.0:
        raise ArgumentValueError(
            f"return_softmax is only supported when p_dropout > 0.0, got dropout_p {dropout_p}"
        )
    ops = seeded(problem, ops)
    out, lse = run_forward(problem, ops)
    s_dmask = out.new_empty(0)
    if return_softmax and problem.dropout_p:
        from flash_attn.reference.dmask import signed_probabilities

        s_dmask = signed_probabilities(problem, ops)
    rng_state = (
        torch.zeros(2, dtype=torch.int64, device=out.device) if ops.rng_state is None else ops.rng_state
    )
    return Forward(out.contiguous(), surface_lse(problem, lse).contiguous(), s_dmask, rng_state)


def backward(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None], rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients from the passed out and lse, which may be those of a larger problem (ring attention)."""
    if problem.dropout_p and rng_state is None:
        raise ArgumentValueError("rng_state must be that of the forward when dropout_p > 0, got None")
    rows = ops.q.shape[:-1]
    shape = (problem.heads, rows[0]) if problem.varlen_q else (problem.batch, problem.heads, problem.max_q)
    like_out = (*rows, problem.head_dim_v)
    for name, x, want in (("dout", dout, like_out), ("out", out, like_out), ("softmax_lse", lse, shape)):
        if tuple(x.shape) != want:
            raise ArgumentValueError(f"{name} must have shape {want}, got {tuple(x.shape)}")
        if x.device != ops.q.device:
            raise ArgumentValueError(f"{name} must be on the device of q, {ops.q.device}, got {x.device}")
    for name, x in (("dout", dout), ("out", out)):
        if x.dtype != problem.dtype:
            raise ArgumentTypeError(
                f"{name}: query and {name} must have the same dtype, {problem.dtype}, got {x.dtype}"
            )
    statistics = torch.promote_types(torch.float32, problem.dtype)
    if lse.dtype != statistics:
        raise ArgumentTypeError(f"softmax_lse must have dtype {statistics}, got {lse.dtype}")
    for name, given, like in zip(("dq", "dk", "dv"), into, ops[:3], strict=True):
        if given is not None and (given.shape != like.shape or given.dtype != like.dtype):
            raise ArgumentValueError(
                f"{name} must have shape {tuple(like.shape)} and dtype {like.dtype},"
                f" got {tuple(given.shape)} and {given.dtype}"
            )
    if problem.dropout_p:
        ops = ops._replace(rng_state=rng_state)
    # backends write rows with a contiguous last dimension
    direct = tuple(
        x if x is not None and x.stride(-1) == 1 else like.new_empty(like.shape)
        for x, like in zip(into, ops[:3], strict=True)
    )
    out, dout = last_contiguous("out", out), last_contiguous("dout", dout)
    run_backward(problem, ops, out, lse, dout, dlse, direct)
    for given, written in zip(into, direct, strict=True):
        if given is not None and given is not written:
            given.copy_(written)
    return direct  # type: ignore[return-value]


def softmax_d(problem: Problem, out: Tensor, dout: Tensor) -> Tensor:
    """rowsum(dout * out), fp32, in upstream's padded shape: (B, H, M up to 128) or (H, total_q + 128 B)."""
    delta = (dout.float() * out.float()).sum(-1)
    if problem.varlen_q:
        return torch.nn.functional.pad(delta.transpose(0, 1), (0, 128 * problem.batch))
    return torch.nn.functional.pad(
        delta.transpose(1, 2), (0, round_multiple(problem.max_q, 128) - problem.max_q)
    )


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, or a copy when its last dimension is strided."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is at least x."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys per block in S_dmask, whose entries refer to the row maximum after their block: here the final one."""
    return 1 << 30


# --- the operators; a random one must not be merged with an equal one ------------------------------
_RANDOM = (torch.Tag.nondeterministic_seeded,)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), tags=_RANDOM)
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, M, H, D), k and v (B, N, Hk, D) -> (out, softmax_lse, S_dmask, rng_state), see `Forward`."""
    problem, ops = describe(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    )  # fmt: skip
    return tuple(forward(problem, ops, dropout_p, return_softmax))  # type: ignore[return-value]


@_flash_attn_forward.register_fake
def _(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    B, M, H, _ = q.shape
    return fakes(q, v, (B, H, M), (B, H, M, k.shape[1]), dropout_p, return_softmax)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), tags=_RANDOM)
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q (total_q, H, D), k and v (total_k, Hk, D) or pages -> (out, softmax_lse, S_dmask, rng_state).

    zero_tensors asks that rows no sequence owns be 0; here they always are.
    """
    if block_table is not None and num_splits > 1:
        swapped = (
            max_seqlen_q == 1 and q.shape[1] > k.shape[2] and window_size_left < 0 and window_size_right < 0
        )
        if not swapped or alibi_slopes is not None or dropout_p > 0.0:
            raise ArgumentValueError(f"num_splits > 1 is not supported for varlen paged KV, got {num_splits}")
    problem, ops = describe_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, block_table=block_table,
        seqused_k=seqused_k, leftpad_k=leftpad_k, num_splits=num_splits,
    )  # fmt: skip
    return tuple(forward(problem, ops, dropout_p, return_softmax))  # type: ignore[return-value]


@_flash_attn_varlen_forward.register_fake
def _(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
):  # fmt: skip
    total_q, H, _ = q.shape
    dmask = (cu_seqlens_q.shape[0] - 1, H, max_seqlen_q, max_seqlen_k)
    return fakes(q, v, (H, total_q), dmask, dropout_p, return_softmax)


def fakes(q: Tensor, v: Tensor, lse: tuple, dmask: tuple, dropout_p: float, return_softmax: bool):
    """Empty results in the shapes of `Forward`."""
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(lse, dtype=torch.promote_types(torch.float32, q.dtype)),
        q.new_empty(dmask if return_softmax and dropout_p > NEGLIGIBLE_DROPOUT else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv; returns softmax_d."""
    problem, ops = describe(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    backward(problem, ops, out, softmax_lse, dout, None, (dq, dk, dv), rng_state)
    return softmax_d(problem, out, dout)


@_flash_attn_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, dq, dk, dv, *rest, rng_state=None):
    B, M, H, _ = q.shape
    return q.new_empty((B, H, round_multiple(M, 128)), dtype=torch.float32)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv; returns softmax_d. Rows no sequence owns get gradient 0, as zero_tensors asks."""
    problem, ops = describe_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    backward(problem, ops, out, softmax_lse, dout, None, (dq, dk, dv), rng_state)
    return softmax_d(problem, out, dout)


@_flash_attn_varlen_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, *rest, rng_state=None, zero_tensors=False):
    batch = cu_seqlens_q.shape[0] - 1
    return q.new_empty((q.shape[1], q.shape[0] + 128 * batch), dtype=torch.float32)


_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
