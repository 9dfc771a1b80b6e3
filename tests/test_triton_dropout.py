"""tile/dropout.py against Philox written out in Python integers, and its statistics."""

import os
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.forward.launch import features  # noqa: E402
from flash_attn.problem import Problem  # noqa: E402
from flash_attn.reference.dropout import keep_mask, threshold  # noqa: E402
from flash_attn.tile import dropout  # noqa: E402
from flash_attn.tuning.config import FwdConfig  # noqa: E402

random_pairs, key_order, dropped = dropout.random_pairs, dropout.key_order, dropout.dropped
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter or a GPU"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
WORD = 0xFFFFFFFF


class Switches(NamedTuple):
    dropout: bool
    halves: bool


@triton.jit(
    do_not_specialize=["bh", "row0", "col0", "threshold"]
)  # as our launcher; the JIT would make a constant of 1
def _write_mask(
    out,
    rng,
    bh,
    row0,
    col0,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows, cols = tl.arange(0, BLOCK_M), key_order(BLOCK_N, F)
    state = (tl.load(rng), tl.load(rng + 1))
    pairs = random_pairs(state, bh, row0 + rows, col0, BLOCK_N, F)
    # a product, so that x lies in threads as it does in the attention kernels
    ones = tl.dot(tl.full([BLOCK_M, 16], 0.25, tl.float16), tl.full([16, BLOCK_N], 0.25, tl.float16))
    kept = dropped(ones.to(DTYPE), pairs, threshold, F)
    tl.store(out + rows[:, None] * BLOCK_N + cols[None, :], kept.to(tl.float32).to(tl.int8))


def mask_of_kernel(seed, offset, bh, row0, col0, threshold, block_m, block_n, dtype=tl.float32):
    out = torch.full((block_m, block_n), -1, dtype=torch.int8, device=DEVICE)
    rng = torch.tensor([seed, offset], device=DEVICE)
    switches = Switches(True, halves=not INTERPRETED and threshold <= 0x7C00)
    _write_mask[(1,)](out, rng, bh, row0, col0, threshold, block_m, block_n, switches, dtype)
    return out.cpu()


def philox(counter, key, rounds):
    """Philox-4x32 as the paper has it."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
        k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
    return c


def mask_of_paper(seed, offset, bh, row0, col0, threshold, block_m, block_n):
    out = torch.empty(block_m, block_n, dtype=torch.int8)
    key = (seed & WORD, (seed >> 32 ^ offset >> 32) & WORD)
    for row in range(block_m):
        for col in range(block_n):
            c = col0 + col
            word = philox((offset & WORD, c // 16, bh, row0 + row), key, 7)[c % 16 // 4]
            if c % 4 >= 2:
                word = (word << 8 | word >> 24) & WORD
            out[row, col] = (word >> 16 * (c % 2) & 0x7FFF) >= threshold
    return out


def test_known_answer():
    """The first vector of Random123's kat_vectors for philox4x32 with 7 rounds checks the oracle itself."""
    assert philox((0, 0, 0, 0), (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(
    "block_n, dtype",
    [
        (16, tl.float16),
        (32, tl.float32),
        (64, tl.bfloat16),
        (64, tl.float32),
        (128, tl.float16),
        (128, tl.float32),
    ],
)
@pytest.mark.parametrize(
    "seed, offset, bh, row0, col0, threshold",
    [
        (0, 0, 0, 0, 0, 17000),
        (-5, 3 - 2**40, 7, 123, 64, 3277),
        (2**62 + 12345, 2**33 + 9, 3, 5, 16, 16384),
        (1, 2, 3, 4, 16, 0x7C00),
        (1, 2, 3, 4, 16, 0x7C01),
        (1, 2, 3, 4, 16, 1),
        (1, 2, 3, 4, 16, 32768),
        (1, 2, 3, 4, 16, 0),
    ],
)
def test_equals_the_paper(seed, offset, bh, row0, col0, threshold, block_n, dtype):
    got = mask_of_kernel(seed, offset, bh, row0, col0, threshold, 16, block_n, dtype)
    assert torch.equal(got, mask_of_paper(seed, offset, bh, row0, col0, threshold, 16, block_n))


def test_equals_the_reference():
    """The torch mask that the oracle and the CPU backend use."""
    rng = torch.tensor([987654321012345, (77 << 32) + 5])
    want = keep_mask(rng, 0.37, 2, 3, range(19, 35), range(48, 80), heads=5)
    got = mask_of_kernel(*rng.tolist(), 2 * 5 + 3, 19, 48, threshold(0.37), 16, 32)
    assert torch.equal(got.bool(), want)


def test_keeps_the_asked_share():
    tiles = [mask_of_kernel(11, 22, 1, row, 64, 9830, 16, 128) for row in range(0, 512, 16)]
    kept = torch.cat(tiles).double()  # p = 0.3
    n = kept.numel()
    assert abs(kept.mean() - 0.7) < 5 * (0.7 * 0.3 / n) ** 0.5
    assert (kept.mean(0) - 0.7).abs().max() < 5 * (0.7 * 0.3 / 512) ** 0.5


def test_a_share_too_small_for_15_bits_compiles_no_dropout():
    """A p of 2^-16 or less rounds to 0, where nothing is dropped."""
    shares = 0.0, 2.0**-16, 2.0**-15, 0.999999
    problems = [Problem(1, 1, 1, 16, 16, 64, 64, torch.float16, dropout_p=p) for p in shares]
    assert [features(p, FwdConfig(16, 16, 4, 1)).dropout for p in problems] == [False, False, True, True]
