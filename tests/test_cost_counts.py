"""Counting and accounting: closed forms against brute force, the identities between the modes, bad input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn.cost import accounting
from flash_attn.cost.accounting import account, softmax_factor
from flash_attn.cost.counts import count, tile_steps, visible_keys, visible_pairs
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

LLAMA = Problem(1, 32, 32, 4096, 4096, 128, 128, torch.bfloat16)  # one layer of Llama 2 7B


def keep(m, n, left, right):
    """The mask of the contract, pair by pair."""
    return [
        [
            (left is None or i + n - m - left <= j) and (right is None or j <= i + n - m + right)
            for j in range(n)
        ]
        for i in range(m)
    ]  # fmt: skip


SMALL = list(itertools.product(range(8), range(8), (None, 0, 1, 3, 20), (None, 0, 1, 4, 20)))


def test_visible_pairs_and_keys_are_those_of_the_mask():
    for m, n, left, right in SMALL:
        mask = keep(m, n, left, right)
        assert visible_pairs(m, n, left, right) == sum(map(sum, mask)), (m, n, left, right)
        assert visible_keys(m, n, left, right) == sum(any(col) for col in zip(*mask, strict=True)), (
            m,
            n,
            left,
            right,
        )


def test_tile_steps_cover_exactly_the_tiles_that_hold_a_visible_pair_and_know_the_masked_ones():
    for m, n, left, right in SMALL:
        mask = keep(m, n, left, right)
        for bm, bn in ((1, 1), (2, 3), (4, 2)):
            got = tile_steps(m, n, left, right, bm, bn)
            want = []
            for i in range(0, m, bm):
                rows = mask[i : i + bm]
                seen = [j for row in rows for j, k in enumerate(row) if k]
                # The kernel walks from the first to the last visible tile.
                tiles = range(min(seen) // bn, max(seen) // bn + 1) if seen else ()
                hidden = [
                    t
                    for t in tiles
                    if any(t * bn + j >= n or not row[t * bn + j] for row in rows for j in range(bn))
                ]
                want.append((len(tiles), len(hidden)))
            assert got == want, (m, n, left, right, bm, bn)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
    left=st.none() | st.integers(0, 9),
    right=st.none() | st.integers(0, 9),
    group=st.integers(1, 3),
)
def test_varlen_counts_are_the_sum_of_the_sequences(lens, left, right, group):
    lens_q, lens_k = zip(*lens, strict=True)
    pairs = sum(sum(map(sum, keep(m, n, left, right))) for m, n in lens)
    p = Problem(
        len(lens), 2 * group, 2, max(lens_q), max(lens_k), 8, 4, torch.float16,
        left=left, right=right, varlen_q=True, varlen_k=True,
    )  # fmt: skip
    if pairs == 0:
        with pytest.raises(ArgumentValueError, match="left and right"):
            count(p, "forward", lens_q, lens_k)
        return
    forward, backward = (count(p, d, lens_q, lens_k) for d in ("forward", "backward"))
    heads = 2 * group
    assert forward.pairs == backward.pairs == pairs * heads
    assert forward.macs == {"S = Q K^T": pairs * heads * 8, "O = P V": pairs * heads * 4}
    assert sum(backward.macs.values()) == pairs * heads * (3 * 8 + 2 * 4)
    assert forward.exps == backward.exps == pairs * heads
    keys = sum(sum(any(col) for col in zip(*keep(m, n, left, right), strict=True)) for m, n in lens)
    assert forward.tensors["k"] == keys * 2 * 8 * 2 and forward.tensors["v"] == keys * 2 * 4 * 2
    assert forward.tensors["out"] == sum(lens_q) * heads * 4 * 2
    assert backward.tensors["dk"] == forward.tensors["k"]


def test_decode_and_chunked_are_ordinary_problems():
    decode = count(LLAMA._replace(max_q=1))
    assert decode.pairs == 32 * 4096
    chunk = count(LLAMA._replace(max_q=512, max_k=2048, right=0))
    assert chunk.pairs == 32 * (512 * 1536 + 512 * 513 // 2)


def test_modes_give_the_published_values():
    paper, original = account(LLAMA, "paper"), account(LLAMA, "genz-original")
    assert paper.flops == original.flops == 4 * 4096**2 * 128 * 32 == 274_877_906_944  # seed 003
    assert account(LLAMA._replace(right=0), "paper").flops == 137_438_953_472
    assert account(LLAMA, "paper", "backward").flops == 2.5 * paper.flops
    corrected = account(LLAMA, "genz-corrected")
    assert corrected.logit == corrected.attend == 206_158_430_208  # B H M N D C
    assert corrected.flops_reported == 824_633_720_832
    exact = account(LLAMA)
    assert (exact.mode, exact.unit, exact.flops) == ("exact", "MAC", 277_562_261_504)
    assert account(LLAMA._replace(right=0)).flops == 138_815_012_864


@pytest.mark.parametrize("constant", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("shape", [{}, {"max_q": 1}, {"max_q": 512, "max_k": 2048}])
def test_corrected_over_original_is_exactly_the_constant(constant, shape):
    p = LLAMA._replace(**shape)
    original, corrected = account(p, "genz-original"), account(p, "genz-corrected", softmax_constant=constant)
    assert corrected.logit == constant * original.logit and corrected.attend == constant * original.attend
    assert corrected.flops_reported == constant * original.flops_reported


def test_sequence_parallelism_divides_keys_in_the_original_only():
    assert (
        account(LLAMA, "genz-original", sequence_parallel=4).logit
        == account(LLAMA, "genz-original").logit / 4
    )
    assert account(LLAMA, "genz-corrected", sequence_parallel=4) == account(LLAMA, "genz-corrected")


def test_exact_tends_to_paper_without_softmax():
    work = count(LLAMA)
    assert work.matmul_flops == account(LLAMA, "paper").flops
    causal = LLAMA._replace(right=0)
    ratios = [
        count(causal._replace(max_q=s, max_k=s)).matmul_flops
        / account(causal._replace(max_q=s, max_k=s), "paper").flops
        for s in (64, 1024, 16384)
    ]
    assert ratios[0] > ratios[1] > ratios[2] > 1 and ratios[2] == pytest.approx(1 + 1 / 16384)


def test_flash_changes_no_operation_and_the_memory_ratio_is_the_documented_one():
    work = count(LLAMA)
    assert work.flash_bytes == 128.5 * 2**20 and work.standard_bytes == (128.5 + 4096) * 2**20
    assert accounting.memory_efficiency_coefficient(LLAMA) == pytest.approx(4224.5 / 128.5)


def test_table_of_seed_001_is_one_fp32_score_matrix_of_one_head():
    """Its "standard" column leaves out P, Q, K, V and O; its 0.5 MB is a tile in shared memory, no tensor."""
    want = {1: 4, 2: 16, 4: 64, 8: 256, 16: 1024}
    for k, mib in want.items():
        p = Problem(1, 1, 1, 1024 * k, 1024 * k, 128, 128, torch.float32)
        work = count(p)
        assert work.score_bytes == mib * 2**20 and work.score_bytes / (0.5 * 2**20) == 8 * k * k
        # What flash attention really keeps in memory grows with the length.
        assert work.flash_bytes == 1024 * k * (4 * 128 * 4 + 4)


def test_softmax_factor_says_what_three_could_mean():
    factor = softmax_factor(LLAMA, 989e12, 132 * 16 * 1.83e9)
    assert factor.asked == 3.0
    assert factor.flops == pytest.approx(1 + 5 / (4 * 128))
    assert factor.time == pytest.approx(1.5, abs=0.02)  # the exps cost half the products at D = 128


BAD = [
    ("batch", {"batch": 0}),
    ("max_q", {"max_q": -1}),
    ("max_k", {"max_k": 2**60}),
    ("head_dim", {"head_dim": 1.5}),
    ("kv_heads", {"kv_heads": 5}),
    ("left and right", {"max_q": 8, "max_k": 4, "left": 0, "right": -9}),
    ("left and right", {"max_q": 1, "left": -4097}),
]


@pytest.mark.parametrize("name,change", BAD)
def test_bad_sizes_name_the_field(name, change):
    with pytest.raises(ArgumentValueError, match=name):
        count(LLAMA._replace(**change))


def test_bad_modes_and_arguments_say_what_is_known():
    with pytest.raises(ArgumentValueError, match="paper, genz-original, genz-corrected, exact"):
        account(LLAMA, "precise")
    with pytest.raises(ArgumentValueError, match="direction"):
        account(LLAMA, direction="sideways")
    with pytest.raises(ArgumentValueError, match="backward"):
        account(LLAMA, "genz-original", "backward")
    with pytest.raises(ArgumentValueError, match="softmax_constant"):
        account(LLAMA, "genz-corrected", softmax_constant=0)
    with pytest.raises(ArgumentValueError, match="sequence_parallel"):
        account(LLAMA, sequence_parallel=0)
    with pytest.raises(ArgumentValueError, match="lens_q"):
        account(LLAMA, "paper", lens_q=[4096])
    with pytest.raises(ArgumentValueError, match="lens_k must hold batch = 1"):
        count(LLAMA, lens_k=[1, 2])
    with pytest.raises(ArgumentValueError, match="lens_q must lie"):
        count(LLAMA, lens_q=[5000])
