"""How much work a `Problem` is: visible pairs, multiply-adds, exps, bytes. Closed forms, no hardware, no time.

Conventions: M queries and N keys of one sequence, bottom-right aligned. Row i sees key j iff
    i + N - M - left <= j <= i + N - M + right          (None: unbounded)
Counts cover the whole batch and all query heads. A MAC is one multiply and one add, 2 FLOP.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

DIRECTIONS = ("forward", "backward")
# Per visible pair, besides the products. Forward: scale, running max, subtract, exp, add to the sum (the
# "5 M N" of seed 003). Backward: scale and subtract lse, exp, subtract delta, multiply by P.
SOFTMAX_OPS = {
    "forward": {"scale": 1, "max": 1, "subtract": 1, "exp": 1, "sum": 1},
    "backward": {"scale": 1, "subtract lse": 1, "exp": 1, "subtract delta": 1, "times P": 1},
}
LIMIT = 2**40  # of a single size: far above any machine, low enough to catch a slip


class Work(NamedTuple):
    """What one call has to do, whatever computes it."""

    direction: str
    pairs: int  # visible (query, key) pairs, all heads
    rows: int  # query rows, all heads
    macs: dict[str, int]  # of each matrix product
    softmax: dict[str, int]  # element operations, by kind
    tensors: dict[str, int]  # bytes of every tensor that must be read or written once
    score_bytes: int  # one M x N score matrix of all heads in the input dtype: what flash never stores

    @property
    def matmul_flops(self) -> int:
        return 2 * sum(self.macs.values())

    @property
    def exps(self) -> int:
        return self.softmax["exp"]

    @property
    def flops(self) -> int:
        """Products and softmax together."""
        return self.matmul_flops + sum(self.softmax.values())

    @property
    def flash_bytes(self) -> int:
        """Every input read once and every output written once."""
        return sum(self.tensors.values())

    @property
    def standard_bytes(self) -> int:
        """The same with the score matrices in memory: forward writes and reads S and P once each; backward
        reads P, writes and reads dP, writes and reads dS (twice)."""
        return self.flash_bytes + (4 if self.direction == "forward" else 6) * self.score_bytes


def visible_pairs(m: int, n: int, left: int | None = None, right: int | None = None) -> int:
    """Visible (row, key) pairs of one sequence and head, in closed form."""
    upper = m * n if right is None else _below(m, n, n - m + right)
    lower = 0 if left is None else _below(m, n, n - m - left - 1)
    return max(0, upper - lower)


def _below(m: int, n: int, shift: int) -> int:
    """Pairs with 0 <= i < m, 0 <= j < n, j <= i + shift: rows with none, an arithmetic series, full rows."""
    first = min(max(-shift, 0), m)  # first row with a key
    full = min(max(n - 1 - shift, first), m)  # first row with all keys
    ramp = full - first
    return ramp * (first + full - 1 + 2 * (shift + 1)) // 2 + (m - full) * n


def visible_keys(m: int, n: int, left: int | None = None, right: int | None = None) -> int:
    """Keys that at least one row sees: what has to be read of K and V."""
    if m == 0:
        return 0
    low = 0 if left is None else max(0, n - m - left)
    high = n if right is None else min(n, n + right)
    return max(0, high - low)


def tile_steps(
    m: int, n: int, left: int | None, right: int | None, block_m: int, block_n: int
) -> list[tuple[int, int]]:
    """(key tiles visited, how many of them hold a pair that must be masked) for each query tile of a sequence."""
    visits = []
    for start in range(0, m, block_m):
        last = min(start + block_m, m) - 1
        low = 0 if left is None else max(0, start + n - m - left)
        high = n if right is None else min(n, last + n - m + right + 1)
        steps = max(0, -(-high // block_n) - low // block_n)
        # Keys that every row of the tile sees; the tiles inside need no mask.
        low = 0 if left is None else max(0, last + n - m - left)
        high = n if right is None else min(n, start + n - m + right + 1)
        whole = max(0, high // block_n - -(-low // block_n))
        visits.append((steps, steps - min(whole, steps)))
    return visits


def count(
    problem: Problem,
    direction: str = "forward",
    lens_q: Sequence[int] | None = None,
    lens_k: Sequence[int] | None = None,
) -> Work:
    """Exact work of `problem`.

    Args:
        lens_q, lens_k: length of every sequence of a packed or ragged batch; default: max_q, max_k for all.

    Raises:
        ArgumentValueError: a size is wrong, or no query sees any key.
    """
    check(problem)
    if direction not in DIRECTIONS:
        raise ArgumentValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    p, shapes = problem, sequences(problem, lens_q, lens_k)
    pairs = sum(t * visible_pairs(m, n, p.left, p.right) for (m, n), t in shapes.items()) * p.heads
    if pairs == 0:
        raise ArgumentValueError(
            f"left and right must leave a key visible, got left={p.left}, right={p.right} "
            f"with max_q={p.max_q}, max_k={p.max_k}"
        )
    tokens_q = sum(t * m for (m, _), t in shapes.items())
    tokens_k = sum(t * visible_keys(m, n, p.left, p.right) for (m, n), t in shapes.items())
    rows, size = tokens_q * p.heads, p.dtype.itemsize
    q, o = rows * p.head_dim * size, rows * p.head_dim_v * size
    k, v = tokens_k * p.kv_heads * p.head_dim * size, tokens_k * p.kv_heads * p.head_dim_v * size
    d, dv = pairs * p.head_dim, pairs * p.head_dim_v
    if direction == "forward":
        macs = {"S = Q K^T": d, "O = P V": dv}
        tensors = {"q": q, "k": k, "v": v, "out": o, "lse": rows * 4}
    else:
        macs = {"S = Q K^T": d, "dP = dO V^T": dv, "dV = P^T dO": dv, "dK = dS^T Q": d, "dQ = dS K": d}
        tensors = {"q": q, "k": k, "v": v, "out": o, "dout": o, "lse": rows * 4}
        tensors |= {"dq": q, "dk": k, "dv": v}
    softmax = {name: each * pairs for name, each in SOFTMAX_OPS[direction].items()}
    score = sum(t * m * n for (m, n), t in shapes.items()) * p.heads * size
    return Work(direction, pairs, rows, macs, softmax, tensors, score)


def sequences(
    problem: Problem, lens_q: Sequence[int] | None = None, lens_k: Sequence[int] | None = None
) -> Counter[tuple[int, int]]:
    """How often each (queries, keys) shape occurs in the batch."""
    if lens_q is None and lens_k is None:
        return Counter({(problem.max_q, problem.max_k): problem.batch})
    q = _lengths("lens_q", lens_q, problem.max_q, problem.batch)
    k = _lengths("lens_k", lens_k, problem.max_k, problem.batch)
    return Counter(zip(q, k, strict=True))


def _lengths(name: str, lens: Sequence[int] | None, longest: int, batch: int) -> list[int]:
    if lens is None:
        return [longest] * batch
    if len(lens) != batch:
        raise ArgumentValueError(f"{name} must hold batch = {batch} lengths, got {len(lens)}")
    for length in lens:
        if not 0 <= length <= longest:
            raise ArgumentValueError(f"{name} must lie in [0, {longest}], got {length}")
    return [int(length) for length in lens]


def check(problem: Problem) -> None:
    """Raise ArgumentValueError, naming the field, when a size cannot be meant."""
    for name in ("batch", "heads", "kv_heads", "max_q", "max_k", "head_dim", "head_dim_v"):
        positive(name, getattr(problem, name))
    if problem.heads % problem.kv_heads:
        raise ArgumentValueError(
            f"kv_heads must divide heads, got kv_heads={problem.kv_heads}, heads={problem.heads}"
        )


def positive(name: str, value: int, limit: int = LIMIT) -> int:
    """`value` if it is an integer in [1, limit], else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise ArgumentValueError(f"{name} must be an integer in [1, {limit}], got {value!r}")
    return value
