"""The CUDA ladder on the GPU: every step against float64, at most twice PyTorch's error."""

import pytest
import torch

from learn.cuda import check_with_torch, ladder

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if ladder.find_nvcc() is None:
        pytest.skip("nvcc is not here: the CUDA steps cannot be compiled")
    folder = tmp_path_factory.mktemp("steps")
    return lambda step, head_dim: ladder.load(ladder.build(step, head_dim, ladder.gpu_arch(), folder))


# each takes nvcc some seconds: every step once, and the three kernels that are built by functions of tiles.cuh twice
BUILDS = [(step, 64) for step in ladder.steps()]
BUILDS += [(step, 128) for step in ladder.steps() if step.startswith(("step_09", "step_12", "step_14"))]


@pytest.mark.parametrize(("step", "head_dim"), BUILDS)
def test_step(step, head_dim, built):
    library = built(step, head_dim)
    cases, dims, dtypes, has_backward = check_with_torch.workload(library, head_dim, "cuda")
    for dtype in dtypes:
        for d in dims:
            for m, n, options in [*cases, (1000, 1111, {})]:
                gradients = has_backward and n > 0
                for name, ours, theirs in check_with_torch.check(
                    library, m, n, d, dtype, "cuda", options, gradients
                ):
                    assert check_with_torch.passes(ours, theirs), (
                        name,
                        ours,
                        theirs,
                        m,
                        n,
                        d,
                        dtype,
                        options,
                    )


def test_gradients_are_the_same_bits_in_every_run(built):
    library = built("step_12_backward", 64)
    q, k, v, dout = (torch.randn(2, 777, 3, 64, device="cuda").half() for _ in range(4))
    out, lse = ladder.forward(library, q, k, v, causal=True)
    first = ladder.backward(library, q, k, v, out, lse, dout, causal=True)
    for _ in range(3):
        again = ladder.backward(library, q, k, v, out, lse, dout, causal=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_library_for_another_gpu_says_so(tmp_path):
    if ladder.find_nvcc() is None:
        pytest.skip("nvcc is not here: the CUDA steps cannot be compiled")
    other = "sm_120" if ladder.gpu_arch() != "sm_120" else "sm_100"
    library = ladder.load(ladder.build("flash_attn_minimal", 64, other, tmp_path))
    x = torch.zeros(1, 64, 1, 64, device="cuda").half()
    with pytest.raises(RuntimeError, match=f"make CUDA_ARCH={ladder.gpu_arch()}"):
        ladder.forward(library, x, x, x)
