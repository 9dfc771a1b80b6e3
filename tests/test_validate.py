"""Bad input raises before any work; good but unusual input is understood."""

from pathlib import Path

import cases
import pytest
import torch
from error_cases import ERROR_CASES, VAR, call, document, valid

import flash_attn
from flash_attn import validate
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, FlashAttnError
from flash_attn.validate import describe, describe_varlen
from flash_attn.validate_cache import describe_kvcache


def no_work(*args, **kwargs):
    raise AssertionError("a backend or the cache append was reached")


@pytest.mark.parametrize("remembered", [False, True], ids=["first", "after a good call"])
@pytest.mark.parametrize("case", ERROR_CASES, ids=lambda c: c.id)
def test_bad_input(case, remembered, monkeypatch):
    """Class, message, no work begun, no tensor changed; and the same when the good call is remembered."""
    monkeypatch.setattr(validate, "_known", {})
    if remembered:
        describe_valid(case.function)
    monkeypatch.setattr("flash_attn.attention.run_forward", no_work)
    monkeypatch.setattr("flash_attn.flash_attn_interface.attention", no_work)
    run, arguments = call(case)
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    before = {n: x.to_dense().clone() for n, x in tensors.items()}
    for error in (case.error, RuntimeError):
        with pytest.raises(error, match=f"^{case.argument}") as raised:
            run()
        assert type(raised.value) is case.error
    for n, x in tensors.items():
        assert torch.equal(x.to_dense(), before[n]), n


@pytest.mark.parametrize("function", sorted({c.function for c in ERROR_CASES}))
def test_valid_arguments_of_the_table_pass(function):
    """The rows of the table fail for what they change and for nothing else."""
    describe_valid(function)


def describe_valid(function):
    kwargs = valid(function)
    for packed in ("kv", "qkv"):
        if packed in kwargs:
            kwargs |= dict(zip(packed, kwargs.pop(packed).unbind(-3), strict=True))
    if "cu_seqlens" in kwargs:
        cu, longest = kwargs.pop("cu_seqlens"), kwargs.pop("max_seqlen")
        kwargs |= dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
    if "k_cache" in kwargs:
        describe_kvcache(**kwargs)
    elif "cu_seqlens_q" in kwargs:
        describe_varlen(**kwargs)
    else:
        describe(**kwargs)


# What FlashAttention-2 says in the same place: clients and its own tests match these.
UPSTREAM = {
    "heads_do_not_divide": "Number of heads in key/value must divide number of heads in query",
    "head_dim_too_large": "FlashAttention .*only supports head dimension at most",
    "mixed_dtypes": "query and key must have the same dtype",
    "rank_k": r"k must have shape \(batch_size, seqlen_k, num_heads_k, head_size\)",
    "alibi_dtype": "ALiBi slopes must have dtype fp32",
    "cu_dtype": "cu_seqlens_q must have dtype int32",
    "cache_strided": "k_cache must have contiguous last dimension",
    "seqlens_dtype": "must have dtype int32",
    "k_without_v": "If key is supplied, value",
    "k_without_seqlens": "If key is supplied, seqlens_k",
    "append_longer": "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
    "rotary_without_k": "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be",
    "rotary_wide": "rotary_dim must be <= headdim",
    "rotary_short": "cos/sin seqlen must be at least the seqlen of KV cache",
    "splits_many": "num_splits > 128 not supported",
    "paged_overflow": "exceeds the capacity addressable by block_table",
    "paged_batch_idx": "Paged KVcache does not support cache_batch_idx",
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_messages_hold_what_upstream_says(name):
    run, _ = call(next(c for c in ERROR_CASES if c.id == name))
    with pytest.raises(RuntimeError, match=UPSTREAM[name]):
        run()


def test_errors_have_python_and_upstream_classes():
    assert issubclass(ArgumentValueError, ValueError) and issubclass(ArgumentTypeError, TypeError)
    assert issubclass(flash_attn.UnsupportedError, NotImplementedError)
    assert issubclass(FlashAttnError, RuntimeError)


def test_the_documented_table_is_this_one():
    path = Path(__file__).parent.parent / "docs" / "errors.md"
    assert path.read_text() == document(), "run: python tests/error_cases.py > docs/errors.md"


@pytest.mark.parametrize("case", cases.CASES, ids=cases.ids)
def test_descriptions_of_named_cases(case, monkeypatch):
    """The public call of a case gives the problem and the operands that the case says."""
    built = cases.build(case)
    if built.function is None:
        pytest.skip("the public API has no words for it")
    seen = {}

    def capture(problem, ops, packed=None, new=None):
        seen.update(problem=problem, ops=ops)
        return ops.q, torch.zeros(1)

    monkeypatch.setattr("flash_attn.flash_attn_interface.attention", capture)
    getattr(flash_attn, built.function)(**built.kwargs)
    assert seen["problem"] == built.problem
    for name, want, got in zip(built.operands._fields, built.operands, seen["ops"], strict=True):
        if name != "rng_state":  # drawn later
            assert got is want, name


@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.batch_idx], ids=cases.ids)
def test_descriptions_of_every_storage(case):
    """`describe_varlen` says everything but a cache index, also what only other front ends ask for."""
    built = cases.build(case)
    ops, packed_q, packed_k = built.operands, case.packed_q is not None, case.packed_k is not None
    problem, got = describe_varlen(
        ops.q, ops.k, ops.v, ops.cu_seqlens_q, ops.cu_seqlens_k, case.max_q if packed_q else None,
        case.max_k if packed_k else None, case.dropout_p, case.scale, case.causal, case.window, case.softcap,
        ops.alibi_slopes, case.deterministic, ops.block_table, seqused_q=ops.seqused_q, seqused_k=ops.seqused_k,
        leftpad_k=ops.leftpad_k, sink=ops.sink,
    )  # fmt: skip
    assert problem == built.problem
    for name, want, x in zip(ops._fields, ops, got, strict=True):
        assert name == "rng_state" or x is want, name


VARLEN_ERRORS = {
    "block_table needs cu_seqlens_k or seqused_k": ("varlen paged", lambda a: dict(cu_seqlens_k=None)),
    "seqused_q must have dtype int32": (VAR, lambda a: dict(seqused_q=torch.tensor([1, 2]))),
    r"seqused_q\[1\] must lie in \[0, 4\]": (VAR, lambda a: dict(seqused_q=torch.tensor([5, 5]).int())),
    r"seqused_k\[0\] must lie in \[0, 8\]": (VAR, lambda a: dict(seqused_k=torch.tensor([9, 6]).int())),
    r"leftpad_k\[1\] must lie in \[0, 6\]": (VAR, lambda a: dict(leftpad_k=torch.tensor([0, 7]).int())),
    # beyond max_seqlen_k, for which kernels are planned, though the pages could hold them
    r"seqused_k\[1\] must lie in \[0, 6\]": (
        "varlen paged",
        lambda a: dict(cu_seqlens_k=None, max_seqlen_k=6, seqused_k=torch.tensor([6, 7]).int()),
    ),
    "seqused_k must have shape": (VAR, lambda a: dict(seqused_k=torch.tensor([1]).int())),
    r"sink must have shape \(num_heads,\) with num_heads 4, got \(3,\)": (
        VAR,
        lambda a: dict(sink=torch.zeros(3)),
    ),
    "sink must have a floating point dtype": (VAR, lambda a: dict(sink=torch.zeros(4).int())),
    "sink must be on the device of q": (VAR, lambda a: dict(sink=torch.zeros(4, device="meta"))),
}


@pytest.mark.parametrize("message", VARLEN_ERRORS)
def test_errors_of_what_has_no_public_name(message):
    function, change = VARLEN_ERRORS[message]
    kwargs = valid(function)
    with pytest.raises(FlashAttnError, match=message):
        describe_varlen(**kwargs | change(kwargs))


def test_a_described_call_is_remembered_and_a_changed_one_is_not_mistaken_for_it():
    q, k, v = torch.randn(3, 2, 6, 4, 16).unbind(0)
    first, _ = describe(q, k, v, causal=True)
    assert describe(q.clone(), k, v, causal=True)[0] is first
    assert describe(q.double(), k.double(), v.double(), causal=True)[0].dtype == torch.float64
    assert describe(q, k[:, :3], v[:, :3], causal=True)[0].max_k == 3
    assert describe(q, k, v, causal=True, softcap=2.0)[0].softcap == 2.0
    assert describe(q, k, v, window_size=(1, 0))[0] == first._replace(left=1)
    with pytest.raises(ArgumentValueError, match="device of q"):
        describe(q, k, v.to("meta"), causal=True)


def test_the_memory_of_descriptions_is_bounded(monkeypatch):
    monkeypatch.setattr(validate, "_KNOWN_MAX", 10)
    q = torch.randn(2, 6, 4, 16)
    for scale in range(1, 100):
        describe(q, q, q, softmax_scale=float(scale))
        assert len(validate._known) <= 10


@pytest.mark.parametrize(
    "window", [[2, 1], torch.tensor([2, 1]), (torch.tensor(2), 1)], ids=["list", "tensor", "mixed"]
)
def test_window_forms(window):
    q = torch.randn(1, 6, 2, 8)
    problem, _ = describe(q, q, q, window_size=window)
    assert (problem.left, problem.right) == (2, 1)


@pytest.mark.parametrize(
    ("causal", "window", "M", "N", "want"),
    [
        (False, (-1, -1), 5, 7, (None, None)),
        (True, (-1, -1), 5, 7, (None, 0)),
        (False, (-1, 0), 5, 7, (None, 0)),
        (True, (3, 2), 5, 7, (3, 0)),
        (False, (7, 2), 5, 7, (None, 2)),
        (False, (3, 7), 5, 7, (3, None)),
        (True, (-1, -1), 1, 7, (None, None)),
        (True, (3, 3), 1, 7, (3, None)),
    ],
)
def test_causal_and_window_fold_into_bounds(causal, window, M, N, want):
    q, k = torch.randn(1, M, 2, 8), torch.randn(1, N, 2, 8)
    problem, _ = describe(q, k, k, causal=causal, window_size=window)
    assert (problem.left, problem.right) == want


@pytest.mark.parametrize(
    ("given", "kept"), [(0.0, 0.0), (1e-30, 0.0), (2.0**-25, 0.0), (1e-7, 1e-7), (0.5, 0.5)]
)
def test_a_dropout_that_fp32_cannot_see_counts_as_none(given, kept):
    """diffusers passes 1e-30 to be given the lse."""
    q = torch.randn(1, 4, 2, 8)
    assert describe(q, q, q, given)[0].dropout_p == kept


def test_scale_defaults_to_the_root_of_the_query_dimension():
    q, v = torch.randn(1, 4, 2, 24), torch.randn(1, 4, 2, 16)
    problem, _ = describe(q, q, v)
    assert problem.scale == 24**-0.5 and problem.head_dim_v == 16


def test_max_seqlen_may_be_a_tensor():
    kwargs = valid("flash_attn_varlen_func")
    want, _ = describe_varlen(**kwargs)
    got, _ = describe_varlen(
        **kwargs | dict(max_seqlen_q=torch.tensor(5), max_seqlen_k=torch.tensor(8, dtype=torch.int32))
    )
    assert got == want


def test_a_strided_last_dimension_is_copied_and_other_strides_are_kept():
    wide = torch.randn(2, 6, 4, 32)
    strided, swapped = wide[..., ::2], torch.randn(2, 4, 6, 16).transpose(1, 2)
    _, ops = describe(strided, swapped, swapped)
    assert ops.q.is_contiguous() and torch.equal(ops.q, strided)
    assert ops.k is swapped


def test_a_negation_that_was_put_off_is_done():
    """The imaginary part of a conjugate is its memory with a sign that only torch knows of; a kernel took it plain."""
    parts = [torch.randn(2, 5, 4, 16) for _ in range(3)]
    lazy = [torch.complex(x, x).conj().imag for x in parts]
    assert all(x.is_neg() for x in lazy)
    for tensors in (lazy, [torch._neg_view(x) for x in parts]):
        ops = describe(*tensors)[1]
        for x, want in zip(ops[:3], parts, strict=True):
            assert not x.is_neg() and torch.equal(x, -want)


def test_strided_index_tensors_are_copied():
    kwargs = valid("flash_attn_varlen_func")
    cu = torch.stack([kwargs["cu_seqlens_q"]] * 2, 1)[:, 0]
    _, ops = describe_varlen(**kwargs | dict(cu_seqlens_q=cu))
    assert ops.cu_seqlens_q.is_contiguous() and torch.equal(ops.cu_seqlens_q, cu)


def test_packed_totals_are_not_part_of_the_description():
    kwargs = valid("flash_attn_varlen_func")
    first, _ = describe_varlen(**kwargs)
    longer = {n: torch.cat([kwargs[n]] * 2) for n in "qkv"}
    assert describe_varlen(**kwargs | longer)[0] is first


def test_paged_varlen_takes_lengths_from_cu_seqlens():
    problem, ops = describe_varlen(**valid("varlen paged"))
    assert problem.page_size == 4 and problem.seqused_k and not problem.varlen_k and problem.max_k == 8
    assert ops.seqused_k.tolist() == [8, 6] and ops.cu_seqlens_k is None


def test_unneeded_block_table_entries_may_hold_anything():
    kwargs = valid("varlen paged")
    describe_varlen(**kwargs | dict(block_table=torch.tensor([[4, 0, -1], [2, 1, 99]], dtype=torch.int32)))


def test_integer_cache_length_becomes_a_tensor():
    kwargs = valid("flash_attn_with_kvcache") | dict(cache_seqlens=4)
    problem, ops, new = describe_kvcache(**kwargs)
    assert problem.seqused_k and ops.seqused_k.tolist() == [4, 4] and ops.seqused_k.dtype == torch.int32
    assert new.cache_seqlens is ops.seqused_k and new.k is kwargs["k"]


def test_a_cache_without_lengths_is_valid_throughout():
    kwargs = valid("flash_attn_with_kvcache") | dict(k=None, v=None, cache_seqlens=None)
    problem, ops, new = describe_kvcache(**kwargs)
    assert not problem.seqused_k and ops.seqused_k is None and new is None and problem.max_k == 8


def test_a_cache_may_have_more_rows_than_the_batch():
    kwargs = valid("flash_attn_with_kvcache")
    kwargs |= {n: torch.cat([kwargs[n]] * 2) for n in ("k_cache", "v_cache")}
    assert describe_kvcache(**kwargs)[0].batch == 2


def test_values_of_gpu_tensors_are_read_only_when_asked(environment):
    from flash_attn import validate_values

    problem = cases.Case("gpu").problem("cuda")
    assert not validate_values.wanted(problem)
    environment("FLASH_ATTN_CHECK", "1")
    assert validate_values.wanted(problem)
    assert validate_values.wanted(problem._replace(device="cpu"))
