"""What the Hopper forward's compiler must know, and the named barriers that follow from it."""

from typing import NamedTuple

from triton.experimental import gluon


class Config(NamedTuple):
    """Everything the compiler must know; `left`, `right`, `softcap`, `alibi` are what `tile/` asks for."""

    D0: int  # head dim of q and k as one or two power-of-two boxes (D1 0: one)
    D1: int
    V0: int  # the same for v and out
    V1: int
    WARPGROUPS: int  # consumers, 64 query rows each
    BN: int  # keys per tile
    STAGES: int  # key tiles in shared memory
    PINGPONG: bool  # warpgroups issue their products in turn
    CHAIN: (
        bool  # the first scores of the next tile are computed while this one is stored; Q is double buffered
    )
    OVERLAP: (
        bool  # P V is in flight under the next softmax; else it and the next scores go one behind the other
    )
    QREG: int  # columns of Q kept in registers: all, half or none; saves shared-memory bandwidth
    SHARE: bool  # O is staged where Q was
    left: bool = False
    right: bool = False
    softcap: bool = False
    alibi: bool = False
    sink: bool = False
    packed_q: bool = False
    packed_k: bool = False
    used_q: bool = False
    used_k: bool = False
    DELAY: int = 0  # debug: random sleeps up to this many ns in every role


@gluon.constexpr_function
def passes_over(C):
    """Whether a warpgroup passes over the key tiles behind its diagonal. Two would gain half a tile at most of 64 keys,
    which measured as nothing, for registers that they need."""
    return C.right and C.WARPGROUPS > 2


# First id of each group of named barriers, counted down from the top: V free and K free (one per stage), Q free (one
# per Q buffer), and whose turn it is to issue products (one per warpgroup).


@gluon.constexpr_function
def v_free(C):
    return 16 - C.STAGES


@gluon.constexpr_function
def k_free(C):
    return 16 - 2 * C.STAGES


@gluon.constexpr_function
def q_free(C):
    return 16 - 2 * C.STAGES - (2 if C.CHAIN else 1)


@gluon.constexpr_function
def turn(C):
    return 16 - 2 * C.STAGES - (2 if C.CHAIN else 1) - C.WARPGROUPS


@gluon.constexpr_function
def threads(C):
    return C.WARPGROUPS * 128 + 32
