"""The dropout mask: Philox against its published vectors, the contract element by element, and tiles."""

import math

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
    word = _philox_scalar((offset % 2**32, col // 16, b * heads + h, row), key)[col % 16 // 4]
    turned = (word << 8 | word >> 24) & 0xFFFFFFFF if col & 2 else word
    return (turned >> 16 * (col & 1) & 0x7FFF) >= round(p * 32768)


@pytest.mark.parametrize("seed, offset", [(0, 0), (1234, 5), (-3, 7), (2**63 - 1, 2**40 + 9), (-(2**63), -1)])
def test_mask_is_the_contract_element_by_element(seed, offset):
    state = torch.tensor([seed, offset])
    rows, cols, heads = range(3, 6), range(5, 42), 3
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
        for c in (range(0, 50), range(16, 32), range(13, 41), range(49, 50), range(6, 6)):
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
    keep = 1 - threshold(p) / 32768
    assert abs(keep - (1 - p)) <= 0.5 / 32768
    assert abs(kept - n * keep) <= 5 * (n * keep * (1 - keep)) ** 0.5


def test_probability_that_rounds_to_nothing_drops_nothing():
    assert threshold(1e-30) == 0
    assert keep_mask(torch.tensor([5, 6]), 1e-30, 0, 0, range(64), range(64), 1).all()


def _dropped_groups(p, groups, state=(20, 26)):
    """(groups, 16) of 0 and 1, fp64: what is dropped of aligned groups of 16 keys."""
    rows = 1024
    mask = keep_mask(torch.tensor(state), p, 0, 0, range(rows), range(16 * groups // rows), 1)
    return (~mask).reshape(groups, 16).double()


def _exact_correlation(p):
    """Correlation of two keys of a group where the low byte of one's number is the leading byte of the other's.

    Both numbers have 15 bits, and no other bits are common: enumerate that byte.
    """
    top, low = divmod(threshold(p), 256)
    byte = torch.arange(256)
    other = (byte % 128 < top).double() + (
        byte % 128 == top
    ) * low / 256  # probability that the other is dropped
    q = threshold(p) / 32768
    together = other[:low].sum() / 256
    return float((together - low / 256 * q) / 128 / (q * (1 - q)))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.5, 0.9])
def test_keys_of_a_group_correlate_as_computed(p):
    """All 120 pairs: four of each word share a byte, the others nothing."""
    groups = 2**19
    found = torch.corrcoef(_dropped_groups(p, groups).T)
    want = torch.eye(16, dtype=torch.float64)
    for word in range(0, 16, 4):
        for a, b in ((0, 2), (2, 1), (1, 3), (3, 0)):
            want[word + a, word + b] = want[word + b, word + a] = _exact_correlation(p)
    assert (found - want).abs().max() < 5 / groups**0.5


def test_no_two_keys_correlate_by_more_than_2_to_the_minus_8():
    assert max(_exact_correlation(t / 32768) for t in range(1, 32768, 16)) < 2**-8
    assert _exact_correlation(129 / 32768) == pytest.approx(1 / 257)
    assert _exact_correlation(0.5) == _exact_correlation(0.25) == 0


def test_patterns_of_a_group_are_uniform_at_one_half():
    groups = 2**20
    code = (_dropped_groups(0.5, groups) @ 2.0 ** torch.arange(16, dtype=torch.float64)).long()
    counts, expected = torch.bincount(code, minlength=65536).double(), groups / 65536
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 65535) < 5 * (2 * 65535) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_number_dropped_in_a_group_is_binomial(p):
    """Over a million elements: what neighbours share is too little to be seen there."""
    groups, q = 2**16, threshold(p) / 32768
    counts = torch.bincount(_dropped_groups(p, groups).sum(1).long(), minlength=17).double()
    expected = torch.tensor([math.comb(16, k) * q**k * (1 - q) ** (16 - k) * groups for k in range(17)])
    seen = expected > 5
    counts = torch.cat([counts[seen], counts[~seen].sum()[None]])
    expected = torch.cat([expected[seen], expected[~seen].sum()[None]])
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < len(counts) + 5 * (2 * len(counts)) ** 0.5
