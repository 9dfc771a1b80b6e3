"""The dropout mask: Philox against its published vectors, the contract element by element, and tiles."""

import pytest
import torch

from flash_attn.reference.dropout import keep_mask, philox4x32, threshold

# Random123 1.14, tests/kat_vectors: rounds, counter, key, result.
PUBLISHED = """
7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines())
def test_philox_gives_the_published_words(line):
    rounds, *words = line.split()
    c0, c1, c2, c3, k0, k1, *expected = [torch.tensor(int(w, 16)) for w in words]
    assert list(philox4x32((c0, c1, c2, c3), (k0, k1), int(rounds))) == expected


def _philox_scalar(counter, key):
    """The same in Python's integers, which cannot overflow."""
    c, k = list(counter), list(key)
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def _kept(seed, offset, p, b, h, row, col, heads):
    seed, offset = seed % 2**64, offset % 2**64
    key = seed % 2**32, seed >> 32 ^ offset >> 32
    words = _philox_scalar((offset % 2**32, col // 8, row, b * heads + h), key)
    bits = words[col % 8 // 2] >> 16 * (col % 2) & 0xFFFF
    return bits < round((1 - p) * 65536)


@pytest.mark.parametrize("seed, offset", [(0, 0), (1234, 5), (-3, 7), (2**63 - 1, 2**40 + 9), (-(2**63), -1)])
def test_mask_is_the_contract_element_by_element(seed, offset):
    state = torch.tensor([seed, offset])
    rows, cols, heads = range(3, 6), range(5, 22), 3
    mask = keep_mask(state, 0.4, torch.tensor([0, 2]), torch.arange(heads), rows, cols, heads)
    want = [
        [[[_kept(seed, offset, 0.4, b, h, r, c, heads) for c in cols] for r in rows] for h in range(heads)]
        for b in (0, 2)
    ]
    assert torch.equal(mask, torch.tensor(want))


def test_tiles_of_the_mask_are_parts_of_the_whole():
    state = torch.tensor([77, 3])
    whole = keep_mask(state, 0.3, 1, 2, range(40), range(50), 4)
    for r in (range(0, 40), range(7, 23), range(39, 40), range(5, 5)):
        for c in (range(0, 50), range(8, 16), range(13, 41), range(49, 50), range(6, 6)):
            tile = keep_mask(state, 0.3, 1, 2, r, c, 4)
            assert torch.equal(tile, whole[r.start : r.stop, c.start : c.stop])


def test_every_coordinate_and_the_whole_state_matter():
    def mask(seed=1, offset=2, b=0, h=0, row=0, col=0):
        return keep_mask(
            torch.tensor([seed, offset]), 0.5, b, h, range(row, row + 16), range(col, col + 64), 8
        )

    base = mask()
    others = [
        mask(seed=2),
        mask(seed=1 + 2**40),
        mask(offset=3),
        mask(offset=2 + 2**40),
        mask(b=1),
        mask(h=1),
    ]
    others += [mask(row=16), mask(col=64)]
    for other in others:
        # independent fair bits agree in half of 1024 places, standard deviation 16
        assert abs(int((base == other).sum()) - 512) < 5 * 16


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_share_of_kept_elements(p):
    n = 4 * 256 * 512
    kept = keep_mask(torch.tensor([5, 6]), p, 0, torch.arange(4), range(256), range(512), 4).sum().item()
    keep = threshold(p) / 65536
    assert abs(keep - (1 - p)) <= 0.5 / 65536
    assert abs(kept - n * keep) <= 5 * (n * keep * (1 - keep)) ** 0.5


def test_probability_that_rounds_to_nothing_drops_nothing():
    assert threshold(1e-30) == 65536
    assert keep_mask(torch.tensor([5, 6]), 1e-30, 0, 0, range(64), range(64), 1).all()
