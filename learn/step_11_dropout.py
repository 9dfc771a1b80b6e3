"""Lesson 11. Dropout without a stored mask: random numbers that are a function of where they are used.

Dropout multiplies P by a random 0 or 1 / (1 - p). The backward pass needs the same mask, and storing it would bring
back the N * N matrix. A generator with a state is no help: tiles are computed in any order, and in another order in
the backward pass. A counter-based generator has no state: it scrambles (key, counter) into random bits, as a cipher
does. With the seed as key and (batch, head, row, column) in the counter, any tile can draw its part of the mask at any
time, and gets the same one.

Philox-4x32 multiplies two of the four counter words by constants, takes high and low halves, swaps and adds the key;
seven rounds pass all statistical tests, ten is the common default. Each call gives 128 bits: here a leading byte for
each of sixteen neighbouring columns, with another column's byte behind it, which matters once in 128 times. lse is not
affected: dropout acts on P after the softmax.

Source: Salmon and others 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch

from flash_attn.reference.dropout import keep_mask, philox4x32


def main() -> None:
    # one changed counter word changes about half of the bits of every output word
    def words(counter: int) -> list[int]:
        c = [torch.tensor([value]) for value in (counter, 0, 0, 0)]
        return [int(w) for w in philox4x32(c, (1, 2))]

    flips = [bin(a ^ b).count("1") for a, b in zip(words(0), words(1), strict=True)]
    print("bits flipped by a counter step, of 32:", flips)
    assert all(4 <= f <= 28 for f in flips)

    rng_state = torch.tensor([1234, 5678])
    p, rows, cols = 0.2, range(64), range(128)
    whole = keep_mask(rng_state, p, 0, 3, rows, cols, 4)
    # any tile, drawn alone, is the same piece of the same mask
    tile = keep_mask(rng_state, p, 0, 3, rows[16:32], cols[40:104], 4)
    assert torch.equal(tile, whole[16:32, 40:104])
    other_head = keep_mask(rng_state, p, 0, 2, rows, cols, 4)
    assert not torch.equal(other_head, whole)
    many = keep_mask(rng_state, p, 0, 0, range(512), range(512), 4)
    kept = many.float().mean().item()
    print(f"kept {kept:.4f} of the elements, wanted {1 - p}")
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / many.numel()) ** 0.5  # four standard deviations

    # the expected output is unchanged, because what is kept is scaled up
    probabilities, v = torch.softmax(torch.randn(64, 128), -1), torch.randn(128, 8)
    mean = torch.zeros(64, 8)
    for seed in range(200):
        mask = keep_mask(torch.tensor([seed, 0]), p, 0, 0, rows, cols, 4)
        mean += (probabilities * mask / (1 - p)) @ v / 200
    assert (mean - probabilities @ v).abs().max() < 0.1
    print("the mean over 200 masks is the output without dropout")


if __name__ == "__main__":
    main()
