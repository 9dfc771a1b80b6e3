"""tile/dropout.py against Philox written out in Python integers, and its statistics."""

import os
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.reference.dropout import keep_mask, threshold  # noqa: E402
from flash_attn.tile import dropout  # noqa: E402

keep_tile, key_order = dropout.keep_tile, dropout.key_order
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
    dropout: int


@triton.jit(
    do_not_specialize=["bh", "row0", "col0", "threshold"]
)  # as our launcher; the JIT would make a constant of 1
def _write_mask(
    out, rng, bh, row0, col0, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr
):
    rows, cols = tl.arange(0, BLOCK_M), key_order(BLOCK_N, F)
    state = (tl.load(rng), tl.load(rng + 1))
    kept = keep_tile(state, bh, row0 + rows, col0, threshold, BLOCK_N, F)
    tl.store(out + rows[:, None] * BLOCK_N + cols[None, :], kept.to(tl.int8))


def mask_of_kernel(seed, offset, bh, row0, col0, threshold, block_m, block_n, abreast=4):
    out = torch.full((block_m, block_n), -1, dtype=torch.int8, device=DEVICE)
    rng = torch.tensor([seed, offset], device=DEVICE)
    _write_mask[(1,)](out, rng, bh, row0, col0, threshold, block_m, block_n, Switches(abreast))
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
            word = philox((offset & WORD, c // 8, row0 + row, bh), key, 7)[c % 8 // 2]
            out[row, col] = (word >> 16 * (c % 2) & 0xFFFF) < threshold
    return out


def test_known_answer():
    """The first vector of Random123's kat_vectors for philox4x32 with 7 rounds checks the oracle itself."""
    assert philox((0, 0, 0, 0), (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("block_n, abreast", [(8, 4), (16, 4), (32, 4), (128, 4), (16, 8), (128, 8)])
@pytest.mark.parametrize(
    "seed, offset, bh, row0, col0, threshold",
    [
        (0, 0, 0, 0, 0, 30000),
        (-5, 3 - 2**40, 7, 123, 64, 58982),
        (2**62 + 12345, 2**33 + 9, 3, 5, 8, 32768),
        (1, 2, 3, 4, 16, 32767),
        (1, 2, 3, 4, 16, 1),
        (1, 2, 3, 4, 16, 65535),
        (1, 2, 3, 4, 16, 0),
    ],
)
def test_equals_the_paper(seed, offset, bh, row0, col0, threshold, block_n, abreast):
    got = mask_of_kernel(seed, offset, bh, row0, col0, threshold, 4, block_n, abreast)
    assert torch.equal(got, mask_of_paper(seed, offset, bh, row0, col0, threshold, 4, block_n))


def test_equals_the_reference():
    """The torch mask that the oracle and the CPU backend use."""
    rng = torch.tensor([987654321012345, (77 << 32) + 5])
    want = keep_mask(rng, 0.37, 2, 3, range(19, 35), range(40, 72), heads=5)
    got = mask_of_kernel(*rng.tolist(), 2 * 5 + 3, 19, 40, threshold(0.37), 16, 32)
    assert torch.equal(got.bool(), want)


def test_keeps_the_asked_share():
    kept = mask_of_kernel(11, 22, 1, 0, 0, 45875, 128, 512).double()  # p = 0.3
    n = kept.numel()
    assert abs(kept.mean() - 0.7) < 5 * (0.7 * 0.3 / n) ** 0.5
    assert (kept.mean(0) - 0.7).abs().max() < 5 * (0.7 * 0.3 / 128) ** 0.5


def test_a_share_too_small_for_16_bits_compiles_no_dropout():
    """`keep_tile` takes thresholds up to 65535; a p below 2^-17 rounds to 65536, where nothing is dropped."""
    assert [dropout.calls_abreast(p) > 0 for p in (0.0, 2.0**-18, 2.0**-16, 0.999999)] == [
        False,
        False,
        True,
        True,
    ]
