"""What a user sees where the portable kernels cannot run, or not with the first tile: no GPU is needed."""

import pytest
import torch

pytest.importorskip("triton")
from cases import Case, build  # noqa: E402

from flash_attn import dispatch  # noqa: E402
from flash_attn.backends import triton as backend  # noqa: E402
from flash_attn.errors import UnsupportedError  # noqa: E402
from flash_attn.forward import decode, launch  # noqa: E402
from flash_attn.kvcache import splits  # noqa: E402
from flash_attn.problem import Problem  # noqa: E402
from flash_attn.tuning import table  # noqa: E402
from flash_attn.tuning.config import FwdConfig  # noqa: E402
from flash_attn.utils import device, launcher  # noqa: E402

PROBLEM = Problem(2, 4, 4, 512, 512, 64, 64, torch.float16, device="cuda", scale=0.125)
OLD = device.DeviceInfo("Tesla V100", (7, 0), 80, 96 * 1024)


@pytest.fixture
def tight(monkeypatch):
    """`tight(limit)`: a device that takes no more than `limit` keys times stages; returns what was tried."""
    tried = []

    def use(limit):
        def prepare(kernel, args, constants, num_warps, num_stages, problem):
            stages = constants.get("STAGES", num_stages)
            if "BLOCK_N" not in constants:
                return "merge"
            tried.append((constants["BLOCK_M"], constants["BLOCK_N"], stages))
            if constants["BLOCK_N"] * stages > limit:
                raise launcher.SharedMemoryError(
                    f"{kernel.__name__} does not fit this GPU for {problem}: too big"
                )
            return "binary"

        monkeypatch.setattr(launcher, "prepare", prepare)
        return tried

    return use


def test_the_forward_takes_a_smaller_tile_where_the_first_does_not_fit(tight):
    tried = tight(64)
    problem, ops, *_ = build(Case("small", head_dim=64, max_q=128, max_k=128, dtype=torch.float16))
    with table.override(FwdConfig(64, 64, 4, 3)):
        ready = launch.prepare(problem, ops, *launch.empty_outputs(problem, ops.q))
    assert tried == [(64, 64, 3), (64, 64, 2), (64, 64, 1)]
    assert ready.binary == "binary" and ready.fixed.config == FwdConfig(64, 64, 4, 1)


def test_decode_takes_a_smaller_tile_where_the_first_does_not_fit(tight):
    case = Case("small", head_dim=64, max_q=1, max_k=1024, dtype=torch.float16)
    problem, ops, *_ = build(case)
    tiles = splits.configs(problem, 2**16, 1)
    limit = min(c.block_n * c.num_stages for c in tiles)
    tried = tight(limit)
    ready = decode.prepare(problem, ops)
    assert len(tried) > 1 and tried[0][1:] == tiles[0][1:4:2]
    assert ready.fixed.config.block_n * ready.fixed.config.num_stages == limit


@pytest.mark.parametrize("module, wanted", [(launch, "attn_fwd"), (decode, "attn_decode")])
def test_a_kernel_that_never_fits_says_which_and_for_what(tight, module, wanted):
    tight(0)
    problem, ops, *_ = build(Case("small", head_dim=64, max_q=1, max_k=1024, dtype=torch.float16))
    outputs = launch.empty_outputs(problem, ops.q) if module is launch else ()
    with pytest.raises(UnsupportedError, match=rf"{wanted} does not fit this GPU for Problem\(batch="):
        module.prepare(problem, ops, *outputs)


@pytest.mark.parametrize("direction", dispatch.DIRECTIONS)
def test_an_old_gpu_is_told_what_is_missing_and_what_would_run(direction):
    with device.assume(OLD), pytest.raises(UnsupportedError) as error:
        dispatch.select(PROBLEM, direction)
    text = str(error.value)
    assert "triton: needs compute capability 7.5, Tesla V100 has (7, 0)" in text
    assert 'reference: can, but only runs when asked for: flash_attn.use_backend("reference")' in text
    assert str(PROBLEM) in text, "the problem as `flash-attn explain` prints it"


def test_without_triton_the_reason_is_its_absence(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with device.assume(device.KNOWN["a100"]):
        assert backend.supports(PROBLEM, "forward") == "Triton is not installed (pip install triton)"


def test_the_oldest_gpu_that_can_is_accepted():
    with device.assume(OLD._replace(capability=(7, 5))):
        assert backend.supports(PROBLEM, "forward") is backend.supports(PROBLEM, "backward") is None
