"""attention(problem, operands): the one place where autograd meets a backend."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from flash_attn import dispatch
from flash_attn.backends import empty
from flash_attn.errors import UnsupportedError
from flash_attn.problem import Append, Gradients, Operands, Problem
from flash_attn.tuning import backward, table
from flash_attn.tuning.precision import precision
from flash_attn.utils import device, replay

_deterministic_everywhere = torch._C._get_deterministic_algorithms  # what torch's own function calls
_MAPPED = (
    "attention cannot be mapped (torch.vmap, is_grads_batched): make the mapped dimension a part of the batch"
)


class _Call(NamedTuple):
    """All of a call but the tensors that can have a gradient."""

    problem: Problem
    ops: Operands  # its q, k, v and sink are the tensors of `_Attention.apply`, or views of them
    forced: str | None  # backend in force when the call was made: autograd runs backward in another thread


def attention(
    problem: Problem, ops: Operands, packed: Tensor | None = None, new: Append | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one described call, differentiable in q, k, v, sink, and through out and lse.

    Args:
        packed: the tensor of which k and v (B, N, 2, Hk, D), or q, k and v (B, M, 3, H, D), or the
            same without B, are views. Gradients are then written into one tensor of its shape.
        new: what a KV cache call stores before it attends; such a call has no gradient.

    Returns:
        out: like q with the head dim of v. lse: fp32 (B, H, M), or (H, total_q) for packed queries:
        log of the softmax denominator; -inf where a query sees no key (out is 0 there).

    Raises:
        UnsupportedError: no backend can run the problem, an input carries a forward-mode derivative, or is vmapped.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(ops)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed:
        _refuse_mapped(*ops)
    if problem.dropout_p:
        ops = seeded(problem, ops)
    if new is None and torch.is_grad_enabled():
        q, k, v, sink = ops.q, ops.k, ops.v, ops.sink
        base = q if packed is None else packed
        if base.requires_grad or q.requires_grad or k.requires_grad or v.requires_grad or (
            sink is not None and sink.requires_grad
        ):  # fmt: skip
            call = _Call(problem, ops, dispatch.forced_backend())
            inputs = (q, k, v) if packed is None and sink is None else _inputs(ops, packed)
            # functorch needs setup_context, which makes every eager call 70 us slower (torch 2.13, 2 cores)
            if transformed:
                return _TransformableAttention.apply(call, *inputs)
            return _apply(call, *inputs)
    return run_forward(problem, ops, None, new)


def _refuse_tangents(ops: Operands) -> None:
    for x in (ops.q, ops.k, ops.v, ops.sink):
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError("attention has no forward-mode derivative; use the backward (vjp) instead")


def _refuse_mapped(*tensors: Tensor | None) -> None:
    """Kernels see one tensor; torch.vmap and is_grads_batched hand over a pretended part of a larger one."""
    for x in tensors:
        if x is not None and (is_batchedtensor(x) or is_legacy_batchedtensor(x)):
            raise UnsupportedError(_MAPPED)


def seeded(problem: Problem, ops: Operands) -> Operands:
    """ops with a seed and offset for dropout, drawn from torch's generator of the device of q."""
    if not problem.dropout_p or ops.rng_state is not None:
        return ops
    return ops._replace(rng_state=torch.randint(0, 2**62, (2,), device=ops.q.device))


def run_forward(
    problem: Problem, ops: Operands, forced: str | None = None, new: Append | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) on the chosen backend, outside autograd, with the device of q current; `new` is stored first."""
    q, k, v = ops[:3]
    # A key says all that decides what is launched but addresses. The problem says its numbers, and which tensors there
    # are; by id, since hashing its fields takes longer than all else here. The recording keeps it alive.
    key: tuple = (
        "forward", id(problem), q.get_device(), forced or dispatch.forced_backend(), device.assumed(),
        table.overridden(), problem.dtype is torch.float32 and precision(problem), q.shape, k.shape,
        q.is_contiguous() or q.stride(), k.is_contiguous() or k.stride(), v.is_contiguous() or v.stride(),
    )  # fmt: skip
    tensors: tuple[Tensor | None, ...] = ops
    if problem.alibi or problem.page_size or problem.sink:
        key += _meta(ops.alibi_slopes), _meta(ops.block_table), _meta(ops.sink)
    if new is not None:
        key += _meta(new.k), _meta(new.v), _meta(new.rotary_cos), new.interleaved
        tensors = (*ops, new.k, new.v, new.rotary_cos, new.rotary_sin, new.cache_seqlens)
    found = replay.find(key)
    results = None if found is None else found.repeat(tensors)
    if results is not None:
        out, lse = results
        return out, lse  # type: ignore[return-value]  # neither is None
    if not (q.numel() and k.numel()):
        return empty.forward(problem, ops if new is None else run_append(problem, ops, new))

    def call(backend: ModuleType) -> tuple[Tensor, Tensor]:
        return backend.forward(problem, ops if new is None else run_append(problem, ops, new))

    return _run("forward", problem, q.get_device(), forced, key, tensors, call)


def run_backward(problem: Problem, ops: Operands, out, lse, dout, dlse, into, forced: str | None = None):
    """(dq, dk, dv, dsink) on the chosen backend; `into` holds tensors (or None) to write dq, dk and dv into."""
    if not problem.deterministic and _deterministic_everywhere():
        problem = _deterministic(problem)
    q, k, v = ops[:3]
    strided = (q, k, v, out, lse, dout, dlse, *into)
    key = (
        "backward", id(problem), q.get_device(), forced or dispatch.forced_backend(), device.assumed(),
        backward.overridden(), problem.dtype is torch.float32 and precision(problem), q.shape, k.shape,
        problem.alibi and _meta(ops.alibi_slopes),
        *[x if x is None else x.is_contiguous() or x.stride() for x in strided],
    )  # fmt: skip
    tensors = (*ops, out, lse, dout, dlse, *into)
    found = replay.find(key)
    results = None if found is None else found.repeat(tensors)
    if results is not None:
        return results  # of `Gradients`
    if not (q.numel() and k.numel()):
        return empty.backward(problem, ops, out, lse, dout, dlse, into)

    def call(backend: ModuleType) -> Gradients:
        rows = dout if dout.stride(-1) == 1 else dout.contiguous()
        return backend.backward(problem, ops, out, lse, rows, dlse, into)

    return _run("backward", problem, q.get_device(), forced, key, tensors, call)


@lru_cache(maxsize=1024)  # one object for equal problems: `_run` knows them by id
def _deterministic(problem: Problem) -> Problem:
    return problem._replace(deterministic=True)


def _run(
    direction: str, problem: Problem, index: int, forced: str | None, key: tuple, tensors: Sequence[Tensor | None],
    call: Callable[[ModuleType], Any],
) -> Any:  # fmt: skip
    """call(backend) with GPU `index` current; a backend that allows it is recorded, to be repeated for `key`."""
    if problem.device == "cuda" and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _run(direction, problem, index, forced, key, tensors, call)
    backend = dispatch.select(problem, direction, index, forced)
    if problem.device == "cpu" or not getattr(backend, "REPEATABLE", False):
        return call(backend)
    return replay.record(key, tensors, lambda: call(backend), problem)


def _meta(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def run_append(problem: Problem, ops: Operands, new: Append) -> Operands:
    """Rotate and store what a KV cache call brings; the operands of the attention that follows."""
    from flash_attn.kvcache.append import append

    index = ops.q.get_device()
    if problem.device == "cuda" and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return run_append(problem, ops, new)
    q, seqused_k = append(problem, ops, new)
    return ops._replace(q=q, seqused_k=seqused_k)


def _inputs(ops: Operands, packed: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors of a call that can have a gradient: (qkv,), (q, kv) or (q, k, v), then the sink."""
    if packed is None:
        inputs: tuple[Tensor, ...] = (ops.q, ops.k, ops.v)
    else:
        inputs = (packed,) if packed.shape[-3] == 3 else (ops.q, packed)
    return inputs if ops.sink is None else (*inputs, ops.sink)


def _views(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v out of what `_inputs` gave, without the sink; of tensors or of their gradients."""
    if len(inputs) == 3:
        q, k, v = inputs
    elif len(inputs) == 2:
        q, (k, v) = inputs[0], inputs[1].unbind(-3)
    else:
        q, k, v = inputs[0].unbind(-3)
    return q, k, v


def _save(ctx, call: _Call, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> None:
    # Lengths, indices, slopes and the seed carry no gradient, but are saved too, so that autograd notices when they
    # are overwritten before the backward. A reference to a tensor here instead would keep it alive behind the back
    # of checkpointing and offloading.
    ctx.save_for_backward(*inputs, out, lse, *call.ops[3:11], call.ops.rng_state)
    ctx.call = call.problem, call.forced
    ctx.set_materialize_grads(False)


class _Attention(torch.autograd.Function):
    """apply(call, *inputs) -> (out, lse)."""

    @staticmethod
    def forward(ctx, call: _Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run_forward(call.problem, call.ops, call.forced)
        _save(ctx, call, inputs, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        if not torch.is_grad_enabled():
            return None, *_Attention._gradients(ctx, dout, dlse)
        with torch.no_grad():  # create_graph=True
            grads = _Attention._gradients(ctx, dout, dlse)
        return None, *_NoSecondDerivative.apply(len(grads), *grads, *ctx.saved_tensors, dout, dlse)

    @staticmethod
    def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None) -> Sequence[Tensor | None]:
        problem, forced = ctx.call
        *inputs, out, lse, cu_q, cu_k, used_q, used_k, pad, pages, rows, slopes, rng_state = ctx.saved_tensors
        if dlse is not None:
            _refuse_mapped(dlse)
        if dout is None:
            dout = torch.zeros_like(out)
        elif is_batchedtensor(dout) or is_legacy_batchedtensor(dout):
            raise UnsupportedError(_MAPPED)
        elif dout.is_neg():  # of an imaginary part: see `validate.last_contiguous`
            dout = dout.resolve_neg()
        sink = inputs.pop() if problem.sink else None
        grads: Sequence[Tensor | None] = ()
        into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if len(inputs) == 3:
            q, k, v = inputs
            if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
                grads = into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        else:
            q, k, v = _views(inputs)
            grads = made = [torch.empty_like(x) for x in inputs]
            into = _views(made)
        ops = Operands(q, k, v, cu_q, cu_k, used_q, used_k, pad, pages, rows, slopes, sink, rng_state)
        result = run_backward(problem, ops, out, lse, dout, dlse, into, forced)
        grads = grads or result[:3]
        return grads if sink is None else [*grads, result[3]]


# `Function.apply` without its preparation for functorch, which costs a third of it
_apply = super(torch.autograd.Function, _Attention).apply


class _NoSecondDerivative(torch.autograd.Function):
    """Identity of the first `count` tensors, whose gradient is refused: else they would pass for constants."""

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tensors[:count]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise UnsupportedError(
            "attention has no second derivative; write this part with torch operations instead"
        )


class _TransformableAttention(_Attention):
    """The same for torch.func transforms."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        problem, ops, forced = call
        if problem.sink:
            ops, inputs = ops._replace(sink=inputs[-1]), inputs[:-1]
        q, k, v = _views(inputs)
        return run_forward(problem, ops._replace(q=q, k=k, v=v), forced)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        call, *tensors = inputs
        _save(ctx, call, tuple(tensors), *output)

    @staticmethod
    def vmap(info, in_dims, call: _Call, *inputs: Tensor):
        raise UnsupportedError(_MAPPED)
