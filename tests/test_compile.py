"""Every kernel of the Triton family compiles for GPUs that need not be there, with every feature.

Its own process, without TRITON_INTERPRET: `pytest -m compile tests/test_compile.py`. The interpreter accepts code
that the compiler does not (a return inside an if, say). To add a kernel: one entry in KERNELS.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from cases import Case, build  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from flash_attn.utils import device, launcher  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on"),
]

HALF = dict(dtype=torch.bfloat16, heads=4, kv_heads=2, max_q=150, max_k=256)
# Features that do not meet in the code share a kernel: a backward takes ten seconds of compiling for each GPU.
FEATURES = [
    Case("causal", head_dim=128, causal=True, **HALF),
    Case("window_fp16", head_dim=64, window=(30, 5), **HALF | dict(dtype=torch.float16)),
    Case("alibi_softcap_head_dim_33", head_dim=33, alibi="bh", softcap=20.0, **HALF),
    Case("packed_used_dropout_head_dim_96", batch=3, head_dim=96, causal=True, dropout_p=0.1, packed_q=(150, 9, 0),
         packed_k=(256, 7, 9), seqused_k=(200, 7, 3), **HALF),
    Case("head_dim_192_128_negative_scale", head_dim=192, head_dim_v=128, causal=True, scale=-1.0, **HALF),
    Case("sink_head_dim_256", head_dim=256, causal=True, sink=True, **HALF),
    Case("head_dim_512", head_dim=512, **HALF),
    Case("fp32", head_dim=32, causal=True, **HALF | dict(dtype=torch.float32)),
]  # fmt: skip
CACHE = [
    Case("leftpad_batch_idx", head_dim=64, seqused_k=(9, 30), leftpad=(3, 0), batch_idx=(3, 1), **HALF),
    Case("paged_16", head_dim=128, seqused_k=(256, 200), page_size=16, causal=True, **HALF),
    Case("paged_256", head_dim=128, seqused_k=(256, 200), page_size=256, causal=True, **HALF),
]
TARGETS = {"a100": 80, "h100": 90, "b200": 100}


def forward(problem, ops):
    from flash_attn.forward import launch
    from flash_attn.tuning import table

    out, lse = launch.empty_outputs(problem, ops.q)
    yield launch.plan(problem, ops, out, lse, table.forward_config(problem))


def forward_split(problem, ops):
    """With a loop of its own for the tiles that need no mask."""
    from flash_attn.forward import launch
    from flash_attn.tuning import table

    out, lse = launch.empty_outputs(problem, ops.q)
    yield launch.plan(problem, ops, out, lse, table.forward_config(problem)._replace(split=True))


def backward(problem, ops):
    from flash_attn.backward import launch
    from flash_attn.forward.launch import empty_outputs
    from flash_attn.tuning.backward import backward_config

    dkdv, dq = backward_config(problem)
    out, lse = empty_outputs(problem, ops.q)
    stats, dsink = launch.statistics(problem, lse), lse if problem.sink else None
    yield launch.plan_dq(problem, ops, out, lse, out, None, stats, torch.empty_like(ops.q), dsink, dq)
    yield launch.plan_dkdv(problem, ops, out, stats, torch.empty_like(ops.k), torch.empty_like(ops.v), dkdv)


def backward_short(problem, ops):
    from flash_attn.backward import short
    from flash_attn.forward.launch import empty_outputs

    out, lse = empty_outputs(problem, ops.q)
    yield short.plan(
        problem, ops, out, lse, out, None, *(torch.empty_like(x) for x in ops[:3]), short.config(problem)
    )


def decode(problem, ops):
    from flash_attn.forward import decode

    # one span and several where nothing else is special; then the one that such a cache is read with most
    plain = problem.causal and not problem.page_size
    for spans in (1, 4) if plain else (1,) if problem.page_size == 16 else (4,):
        out, lse = decode.outputs(problem, ops.q, spans)
        yield from decode.plan(problem, ops, out, lse, decode.choose(problem)[0][0], spans)


def append(problem, ops):
    from flash_attn.kvcache.append_kernel import plan
    from flash_attn.problem import Append

    k, v = (
        torch.empty(problem.batch, 3, problem.kv_heads, x.shape[-1], dtype=x.dtype) for x in (ops.k, ops.v)
    )
    used = torch.empty_like(ops.seqused_k)
    if problem.page_size == 256:
        yield plan(problem, ops, Append(k, v, None, None, False, ops.seqused_k), ops.q, used)
    else:
        cos = torch.empty(problem.max_k, problem.head_dim // 4, dtype=ops.q.dtype)
        new = Append(k, v, cos, cos, problem.page_size == 16, ops.seqused_k)  # interleaved on pages
        yield plan(problem, ops, new, torch.empty_like(ops.q), used)


def rotary(problem, ops):
    from flash_attn.forward.launch import Launch
    from flash_attn.ops.triton.rotary import rotary_kernel

    for offsets, interleaved in ((3, False), (torch.empty(problem.batch, dtype=torch.int32), True)):
        cos, strides = torch.empty(problem.max_q, problem.head_dim // 2), ops.q.stride()[:3]
        constants = dict(
            ROTARY_HALF=problem.head_dim // 2, PER_SEQUENCE_OFFSETS=interleaved, INTERLEAVED=interleaved,
            CONJUGATE=interleaved, BLOCK_H=2, BLOCK_M=8, BLOCK_K=64,
        )  # fmt: skip
        args = (
            ops.q, ops.q, cos, cos, None, offsets, problem.max_q, problem.heads, problem.max_q, 1, *strides, *strides
        )  # fmt: skip
        yield Launch(rotary_kernel, (1, 1, 1), args, constants, 4, 2)


FEW = dict(max_q=3)
FEW_QUERIES = [
    FEATURES[0]._replace(**FEW),
    FEATURES[2]._replace(window=(99, 0), sink=True, **FEW),
    Case("packed_used", batch=3, head_dim=64, packed_q=(3, 1, 0), seqused_k=(200, 7, 3), **HALF | FEW),
    Case("fp32_head_dim_512", head_dim=512, **HALF | FEW | dict(dtype=torch.float32)),
    Case("head_dim_192_128", head_dim=192, head_dim_v=128, **HALF | FEW),
    Case("fp32_one_row", head_dim=128, **HALF | dict(max_q=1, heads=2, dtype=torch.float32)),
    CACHE[0]._replace(head_dim=40, **FEW),
    CACHE[1]._replace(**FEW),
    CACHE[2]._replace(**FEW),
    CACHE[2]._replace(id="paged_256_leftpad", leftpad=(3, 0), **FEW),
]


# name of the kernel -> (function from (problem, operands) to the launches to compile, cases)
KERNELS = {
    "forward": (forward, FEATURES + CACHE),
    "forward_split": (forward_split, FEATURES[:2]),
    "backward": (backward, FEATURES),
    "backward_short": (
        backward_short,
        [c for c in FEATURES if c.head_dim <= 128 and not c.sink and c.dtype.itemsize == 2],
    ),
    "decode": (decode, FEW_QUERIES),
    "append": (append, [*CACHE, CACHE[0]._replace(id="append_24_40", head_dim=24, head_dim_v=40)]),
    "rotary": (rotary, FEATURES[:1]),
}


def jobs():
    for name, (_, cases) in KERNELS.items():
        yield from ((name, case) for case in cases)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("job", list(jobs()), ids=lambda j: f"{j[0]}-{j[1].id}")
def test_compiles_and_fits(job, arch):
    name, case = job
    problem, ops, *_ = build(case)
    with device.assume(device.KNOWN[arch]):
        for step in KERNELS[name][0](problem, ops):
            kernel = launcher.build(*step[:1], *step[2:], target=GPUTarget("cuda", TARGETS[arch], 32))
            assert "cubin" in kernel.asm
            assert kernel.metadata.shared <= device.KNOWN[arch].shared_memory


def test_a_kernel_that_does_not_compile_names_the_problem():
    from flash_attn.forward import launch
    from flash_attn.tuning.config import FwdConfig

    problem, ops, *_ = build(FEATURES[0])
    out, lse = launch.empty_outputs(problem, ops.q)
    step = launch.plan(problem, ops, out, lse, FwdConfig(48, 64, 4, 1))  # 48 is not a power of two
    with pytest.raises(
        launcher.KernelError, match=r"attn_fwd does not compile for Problem\(batch=2.*BLOCK_M.*48"
    ):
        launcher.build(*step[:1], *step[2:], problem=problem, target=GPUTarget("cuda", 90, 32))


def test_no_length_stride_or_scale_is_specialised():
    """Two problems that differ in every run-time number have the same kernel."""
    from flash_attn.forward import launch
    from flash_attn.tuning.config import FwdConfig

    seen = set()
    sizes = (
        dict(batch=1, max_q=1, max_k=1, heads=1, kv_heads=1),
        dict(batch=3, max_q=160, max_k=48, heads=6, kv_heads=2),
    )
    for size in sizes:
        case = Case("x", head_dim=64, dtype=torch.bfloat16, causal=True, scale=size["max_q"] / 7, **size)
        problem, ops, *_ = build(case)
        problem = problem._replace(right=0)
        out, lse = launch.empty_outputs(problem, ops.q)
        step = launch.plan(problem, ops, out, lse, FwdConfig(64, 64, 4, 2))
        seen.add((launcher.describe(step.kernel, step.args), tuple(step.constants.items())))
    assert len(seen) == 1


@pytest.mark.parametrize("page_size", [0, 7, 16, 256])
def test_pages_leave_decode_its_pipeline(page_size):
    """Three tiles of keys and values are on their way, on pages as without: Triton gives a part of the stages to
    loads that other loads wait for, and has no pipeline at all for a value carried over two rounds."""
    from flash_attn.forward import decode
    from flash_attn.tuning.config import FwdConfig

    case = Case("x", head_dim=128, page_size=page_size, seqused_k=(256, 200), **HALF | FEW)
    problem, ops, *_ = build(case._replace(max_k=1792))
    out, lse = decode.outputs(problem, ops.q, 1)
    step = decode.plan(problem, ops, out, lse, FwdConfig(16, 64, 4, 4), 1)[0]
    kernel = launcher.build(*step[:1], *step[2:], target=GPUTarget("cuda", 90, 32))
    tiles, table = 3 * 2 * 64 * 128 * 2, 3 * 64 * 4
    assert tiles <= kernel.metadata.shared <= tiles + table + 8192
    assert kernel.asm["ptx"].count("cp.async.wait_group") > 1


def test_unaligned_rows_get_their_own_kernel():
    """A view that starts in the middle of 16 bytes must not be read 16 bytes at a time."""
    from flash_attn.forward import launch
    from flash_attn.tuning.config import FwdConfig

    problem, ops, *_ = build(Case("x", head_dim=64, dtype=torch.bfloat16))
    out, lse = launch.empty_outputs(problem, ops.q)
    aligned = launch.plan(problem, ops, out, lse, FwdConfig(64, 64, 4, 2))
    wide = torch.empty(2, 23, 2, 72, dtype=torch.bfloat16)[..., 4:68]
    odd = launch.plan(problem, ops._replace(k=wide), out, lse, FwdConfig(64, 64, 4, 2))
    assert launcher.describe(aligned.kernel, aligned.args)[1]
    assert not launcher.describe(odd.kernel, odd.args)[1]
