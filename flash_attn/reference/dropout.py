"""The dropout mask in torch integers: a function of (seed, offset, sequence, head, row, column) alone.

Random bits come from Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with 7 rounds, the fewest that pass BigCrush. Being a pure function of the position, the mask does not
depend on tiles, on the backend or on the direction. `tile/dropout.py` is the same for kernels;
`docs/numerics.md` has the contract.
"""

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Drop an element iff its 15 random bits are below this; 0 where nothing is dropped."""
    return round(dropout_p * 32768)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit words overflows int64 into its sign, which the masks undo.
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter; every word is an int64 tensor in [0, 2^32), broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    b: int | Tensor,
    h: int | Tensor,
    rows: range,
    cols: range,
    heads: int,
) -> Tensor:
    """Which elements of the probabilities survive dropout.

    Args:
        rng_state: int64 (2,), (seed, offset).
        b, h: sequence and query head, ints or 1-D integer tensors.
        rows, cols: consecutive query and key indices inside the sequence.
        heads: number of query heads.

    Returns:
        Boolean (*b.shape, *h.shape, len(rows), len(cols)) on the device of rng_state.
    """
    device = rng_state.device
    seed, offset = rng_state.unbind()
    b, h = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (b, h))
    bh = (b.reshape([*b.shape, *[1] * h.dim()]) * heads + h)[..., None, None]
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    group = torch.arange(cols.start // 16, -(-cols.stop // 16), device=device)
    key = seed & _LOW, ((seed ^ offset) >> 32) & _LOW
    words = philox4x32((offset & _LOW, group, bh, row), key)  # each (..., rows, groups)
    limit = threshold(dropout_p)
    halves = [
        (turned >> shift & 0x7FFF) >= limit
        for word in words
        for turned in (word, word << 8 | word >> 24)
        for shift in (0, 16)
    ]
    keep = torch.stack(torch.broadcast_tensors(*halves), -1).flatten(-2)  # column 16 * group + index
    first = cols.start % 16
    return keep[..., first : first + len(cols)]
