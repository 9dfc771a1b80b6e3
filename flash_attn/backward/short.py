"""The backward of problems so short that launching takes longer than computing: one kernel, no scratch memory.

The two kernels of `launch.py` side by side. The one of the keys cannot wait for what the other finds out about rows,
and makes these statistics again for every block of keys. See docs/perf/host-time.md for the times behind the numbers.
"""

from torch import Tensor

from flash_attn.backward import launch
from flash_attn.backward.short_kernel import attn_bwd_short
from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.tuning import backward as tuning
from flash_attn.tuning.config import BwdConfig
from flash_attn.utils import device

BLOCK = 64
LONGEST = 8  # blocks that a program walks over
MOST = 8  # pairs of blocks for each multiprocessor


def wants(problem: Problem) -> bool:
    """Whether one launch takes the GPU less time than two or three; the host it always does."""
    found = device.info()
    if found is None or tuning.overridden() is not None:  # or the tiles of two launches are being measured
        return False
    dim = max(problem.head_dim, problem.head_dim_v)
    if problem.sink or problem.leftpad or problem.dtype.itemsize != 2 or dim > 128:
        return False
    rows, keys = launch.cdiv(problem.max_q, BLOCK), launch.cdiv(problem.max_k, BLOCK)
    programs = problem.batch * (problem.heads * rows + problem.kv_heads * keys)
    steps = 2 * problem.batch * problem.heads * rows * keys
    most = found.multiprocessors
    return (
        max(problem.group * rows, keys) <= LONGEST
        and steps <= MOST * most
        and (dim <= 64 or programs <= most)
    )


def config(problem: Problem) -> BwdConfig:
    found = tuning.overridden()
    if found is not None:
        return found[0]
    wide = max(problem.head_dim, problem.head_dim_v) > 64
    return BwdConfig(BLOCK, BLOCK, 8 if wide else 4, 1, one_loop=True)


def plan(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, dq: Tensor,
    dk: Tensor, dv: Tensor, tile: BwdConfig,
) -> launch.Launch:  # fmt: skip
    """The one launch; strides as of `launch.plan_dq`."""
    q_blocks, q_programs = launch.dq_grid(problem, ops, tile)
    k_blocks, k_programs = launch.dkdv_grid(problem, ops, tile)
    (lengths, sizes, *rest), constants = launch.common(problem, ops, (), tile)
    tensors = (ops.q, ops.k, ops.v, out, dout, dq, dk, dv)
    args = (
        *tensors, *map(launch.strides, tensors), lse, dlse, (launch.row_strides(lse), launch.row_strides(dlse)),
        1.0 - problem.dropout_p, lengths, (*sizes, q_blocks, ops.q.shape[0], q_programs),
        (*sizes, k_blocks, ops.k.shape[0], k_programs), *rest,
    )  # fmt: skip
    return launch.Launch(attn_bwd_short, (max(q_programs, k_programs), 2, 1), args, constants, *tile[2:4])


def backward(
    problem: Problem, ops: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Gradients:  # fmt: skip
    """As `launch.backward`, without a sink and without left-padded keys."""
    out, dout = launch.readable(out), launch.readable(dout)
    ops = ops._replace(q=launch.readable(ops.q), k=launch.readable(ops.k), v=launch.readable(ops.v))
    dq, dk, dv = launch.targets(ops, into)
    launch.run(
        lambda tile: plan(problem, ops, out, lse, dout, dlse, dq, dk, dv, tile), config(problem), problem
    )
    return Gradients(dq, dk, dv)
