"""What is being asked: one immutable, tensor-free description of an attention call, and its tensors.

`Problem` is the key of everything that must agree with everything else: backend choice, tuning
table, cost model, command line, test ids and benchmark rows. `Operands` carries the tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One attention call without its tensors; hashable, equal problems run the same code.

    A NamedTuple rather than a frozen dataclass: building one is on the path of every call and costs
    a third (0.6 against 1.8 microseconds).
    """

    batch: int
    heads: int  # query heads
    kv_heads: int  # divides heads
    max_q: int  # longest query sequence
    max_k: int  # longest key sequence (cache capacity for a KV cache)
    head_dim: int  # of q and k
    head_dim_v: int  # of v and out
    dtype: torch.dtype
    device: str = "cpu"  # device type: "cpu", "cuda", "xpu"
    left: int | None = None  # keys visible left of the diagonal; None: all
    right: int | None = None  # keys visible right of the diagonal; None: all, 0: causal
    scale: float = 1.0
    softcap: float = 0.0  # 0: off
    dropout_p: float = 0.0
    alibi: bool = False
    sink: bool = False  # learnable per-head logit that joins the denominator
    varlen_q: bool = False  # q is packed: (total_q, heads, dim) with cu_seqlens_q
    varlen_k: bool = False  # k and v are packed: (total_k, kv_heads, dim) with cu_seqlens_k
    seqused_q: bool = False  # per-sequence number of valid queries
    seqused_k: bool = False  # per-sequence end of the valid keys
    leftpad: bool = False  # per-sequence start of the valid keys
    page_size: int = 0  # 0: not paged
    batch_idx: bool = False  # cache row of each sequence
    deterministic: bool = False  # dq bitwise reproducible (dk and dv always are)
    num_splits: int = 0  # split the keys of decode over this many programs; 0: heuristic, 1: not

    @property
    def causal(self) -> bool:
        return self.right == 0 and self.left is None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def paged(self) -> bool:
        return self.page_size > 0


class Operands(NamedTuple):
    """The tensors of a call. Strides are free but for the last dimension, which is contiguous."""

    q: Tensor  # (B, M, H, D), or (total_q, H, D) when varlen_q
    k: Tensor  # (B, N, Hk, D), (total_k, Hk, D) when varlen_k, (pages, page_size, Hk, D) when paged
    v: Tensor  # like k with Dv
    cu_seqlens_q: Tensor | None = None  # int32 (B + 1,)
    cu_seqlens_k: Tensor | None = None  # int32 (B + 1,)
    seqused_q: Tensor | None = None  # int32 (B,)
    seqused_k: Tensor | None = None  # int32 (B,): keys [leftpad, seqused_k) of the sequence are valid
    leftpad_k: Tensor | None = None  # int32 (B,)
    block_table: Tensor | None = None  # int32 (B, pages per sequence)
    cache_batch_idx: Tensor | None = None  # int32 (B,)
    alibi_slopes: Tensor | None = None  # fp32 (H,) or (B, H)
    sink: Tensor | None = None  # (H,), natural-log logit
    rng_state: Tensor | None = None  # int64 (2,): Philox (seed, offset), on the device of q


class Append(NamedTuple):
    """What a KV cache call does before it attends: rotate q, rotate and store new keys and values."""

    k: Tensor | None  # (B, S_new, Hk, D): new keys; None together with v
    v: Tensor | None  # (B, S_new, Hk, Dv)
    rotary_cos: Tensor | None  # (positions, rotary_dim / 2) in the dtype of q; None together with rotary_sin
    rotary_sin: Tensor | None
    interleaved: bool  # True: pairs (2i, 2i + 1) rotate (GPT-J); False: (i, i + rotary_dim / 2) (GPT-NeoX)
    cache_seqlens: Tensor  # int32 (B,): keys in the cache before the append, counted from row 0 of the cache


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None = None


def window_bounds(
    causal: bool, window: tuple[int, int], max_q: int, max_k: int
) -> tuple[int | None, int | None]:
    """Fold the public (causal, window_size) pair into (left, right); -1 means unbounded.

    As FlashAttention-2 does, a bound of at least `max_k` counts as unbounded.
    """
    left = None if window[0] < 0 or window[0] >= max_k else window[0]
    right = None if window[1] < 0 or window[1] >= max_k else window[1]
    if causal:
        right = 0
    if max_q == 1 and right is not None:
        right = None  # the only query is the last one: nothing lies to its right
    return left, right


def sees_all_rows(problem: Problem) -> bool:
    """Whether the description alone shows that every query sees a key.

    Bounds reach the diagonal, which starts at key N - M of a row's own lengths; so it does when all
    sequences have M <= N keys.
    """
    lengths_vary = (
        problem.varlen_q or problem.varlen_k or problem.seqused_q or problem.seqused_k or problem.leftpad
    )
    return not lengths_vary and problem.max_q <= problem.max_k and problem.max_k > 0
