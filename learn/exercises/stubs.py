"""Exercises: fill in the functions, then run `flash-attn learn check`.

Each follows a lesson. The specification is the docstring; the shapes are in the names of the sizes: M queries, N keys,
D elements a head. Use plain torch operators only (no torch.softmax where softmax is the exercise).
"""

from torch import Tensor


def safe_softmax(s: Tensor) -> Tensor:
    """Lesson 1. Softmax of the last dimension that does not overflow for s of 1000."""
    raise NotImplementedError


def score_bytes(tokens: int, heads: int) -> int:
    """Lesson 2. Bytes of S and P together, fp32, self-attention over `tokens` tokens with `heads` heads."""
    raise NotImplementedError


def online_update(m: Tensor, l: Tensor, o: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lesson 3. Fold scores s (M, n) and values v (n, D) into the un-normalised state m (M,), l (M,), o (M, D)."""
    raise NotImplementedError


def tiled_reads(m: int, n: int, block_m: int) -> int:
    """Lesson 4. How many rows of K are fetched in all when every tile of block_m queries walks over all n keys."""
    raise NotImplementedError


def forward(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Lesson 5. O (M, D) and lse (M,), `block` keys at a time; scale 1/sqrt(D); no key: O = 0 and lse = -inf."""
    raise NotImplementedError


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lesson 6. dQ, dK and dV by formula, without autograd, from the saved out and lse."""
    raise NotImplementedError


def causal_mask(M: int, N: int) -> Tensor:
    """Lesson 7. bool (M, N), True where query i sees key j; the last query sees the last key."""
    raise NotImplementedError


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lesson 8. Attention of q (M, H, D) on k, v (N, Hk, D); query head h uses key/value head h // (H // Hk)."""
    raise NotImplementedError


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Lesson 9. (out, lse) of all keys, from two parts: out (M, D), lse (M,). One of the parts may have no key."""
    raise NotImplementedError


def read_page(pool: Tensor, table: Tensor, j: int) -> Tensor:
    """Lesson 10. Key j of a sequence: pool (pages, page_size, D), table (pages of the sequence,) int."""
    raise NotImplementedError


def window_tokens(tokens: int, window: int) -> int:
    """Lesson 7. How many (query, key) pairs are visible in causal self-attention where each query sees at most
    `window` keys, itself included."""
    raise NotImplementedError


def expected_output(p: Tensor, v: Tensor, keep: float) -> Tensor:
    """Lesson 11. Mean over all dropout masks of dropout(p) @ v, each element of p kept with probability `keep` and
    scaled by 1 / keep."""
    raise NotImplementedError


def folded_exponent(s: Tensor, m: Tensor, scale: float) -> Tensor:
    """Lesson 12. exp(scale * s - scale * m) using exp2 only; s (M, N), m (M,)."""
    raise NotImplementedError
