"""The FlagGems backend against a module that has FlagGems' defects (fake_flag_gems.py); the real one needs a GPU."""

import importlib.machinery
import sys

import cases
import fake_flag_gems
import pytest
import torch

import flash_attn
from flash_attn import dispatch, use_backend
from flash_attn import flash_attn_flaggems_backend as backend
from flash_attn.errors import UnsupportedError
from flash_attn.reference import attention as oracle
from flash_attn.utils.testing import check_backend, max_error


def forget():
    backend.probe.cache_clear()
    backend._function.cache_clear()
    dispatch.forget()


@pytest.fixture
def fake(monkeypatch):
    """flag_gems is the fake, and the backend takes CPU tensors."""
    monkeypatch.setattr(fake_flag_gems, "__spec__", importlib.machinery.ModuleSpec("flag_gems", None))
    monkeypatch.setitem(sys.modules, "flag_gems", fake_flag_gems)
    monkeypatch.setattr(backend, "DEVICES", ("cuda", "cpu"))
    forget()
    yield fake_flag_gems
    forget()


def problem_of(name: str, **fields):
    return cases.build(cases.Case(name, dtype=torch.bfloat16, **fields))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", cases.CASES, ids=cases.ids)
def test_named_cases(fake, case, seed):
    """Either right, forward and backward, or refused with a reason."""
    built = cases.build(case, seed=seed, dtype=torch.bfloat16)
    reason = backend.supports(built.problem, "forward")
    if reason is None:
        check_backend(backend, built.problem, built.operands, seed)
    else:
        with use_backend("flaggems"), pytest.raises(UnsupportedError, match="flaggems: "):
            dispatch.select(built.problem)


def test_most_features_run_on_it(fake):
    supported = [
        c for c in cases.CASES if not backend.supports(c.problem()._replace(dtype=torch.float16), "forward")
    ]
    for feature in ("causal", "window_left", "window_right", "softcap", "alibi", "packed", "cache", "paged"):
        assert any(c.id == feature for c in supported), feature
    assert len(supported) > 25


# --- a test for each defect that concerns us: what FlagGems gives is wrong, what the backend gives is right --------


def both(built, **call):
    """(error of the backend, error of the call as a user of FlagGems would make it), of out and of lse."""
    p, ops = built.problem, built.operands
    want = oracle.forward(p, ops)
    got = backend.forward(p, ops)
    # FlagGems' dense q, k and v are packed sequences of equal lengths
    q, k, v = (x if x.ndim == 3 or ops.block_table is not None else x.flatten(0, 1) for x in ops[:3])
    q = ops.q.flatten(0, 1) if ops.q.ndim == 4 else ops.q
    plain = fake_flag_gems.flash_attn_varlen_func(
        q, k, v, p.max_q, backend._steps(p.batch, p.max_q, q), p.max_k, softmax_scale=p.scale,
        alibi_slopes=ops.alibi_slopes, return_softmax_lse=True, **call,
    )  # fmt: skip
    shape = (p.batch, p.max_q, p.heads, p.head_dim)
    wild = plain[0].view(shape), plain[1].view(p.heads, p.batch, p.max_q).transpose(0, 1)
    return [[max_error(g, w) for g, w in zip(x, want, strict=True)] for x in (got, wild)]


def keys(p):
    return {"cu_seqlens_k": torch.arange(0, (p.batch + 1) * p.max_k, p.max_k, dtype=torch.int32)}


@pytest.mark.parametrize("window", [(4, -1), (-1, 2)])
def test_d4_windows_open_to_one_side(fake, window):
    built = problem_of("window", window=window)
    ours, wild = both(built, window_size=window, **keys(built.problem))
    assert ours[0] < 0.05 and wild[0] > 0.3


def test_d5_window_and_causal_with_one_query(fake):
    built = problem_of("window", window=(4, -1), max_q=1, causal=True)
    ours, wild = both(built, window_size=(4, -1), causal=True, **keys(built.problem))
    assert ours[0] < 0.05 and wild[0] > 0.1


def test_d6_layouts_of_k_and_v_that_differ(fake):
    built = problem_of("plain")
    ops = built.operands._replace(v=built.operands.v.transpose(1, 2).contiguous().transpose(1, 2))
    assert ops.v.stride() != ops.k.stride()
    want = backend.forward(built.problem, built.operands)
    for g, w in zip(backend.forward(built.problem, ops), want, strict=True):
        assert torch.equal(g, w)


def test_d6_pages_that_do_not_follow_each_other(fake):
    built = problem_of("paged", seqused_k=(5, 24), max_k=24, page_size=8)
    wide = [torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0] for x in built.operands[1:3]]
    want = backend.forward(built.problem, built.operands)
    got = backend.forward(built.problem, built.operands._replace(k=wide[0], v=wide[1]))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_d7_dropout_is_refused(fake):
    built = problem_of("dropout", dropout_p=0.5)
    assert "D7" in backend.supports(built.problem, "forward")
    q = torch.zeros(64, 1, 16, dtype=torch.float16)
    cu = torch.tensor([0, 64], dtype=torch.int32)
    out = fake.flash_attn_varlen_func(
        q, q, q + 1, 64, cu, 64, cu_seqlens_k=cu, dropout_p=0.5, softmax_scale=1.0
    )
    assert out.float().mean() < 0.7, "the mean of ones, dropped and scaled, is 1"


def test_d8_lse_of_one_query_with_grouped_heads(fake):
    built = problem_of("decode", max_q=1, batch=3, heads=6, kv_heads=2)
    ours, wild = both(built, **keys(built.problem))
    assert ours[1] < 1e-2 and wild[1] > 0.1


def test_d9_lse_of_causal_alibi(fake):
    built = problem_of("alibi", alibi="h", causal=True)
    ours, wild = both(built, causal=True, **keys(built.problem))
    assert ours[1] < 1e-2 and wild[1] > 0.5


def test_d11_lengths_go_with_a_page_table(fake):
    built = problem_of("cache", seqused_k=(5, 23))
    check_backend(backend, built.problem, built.operands)
    q = built.operands.q.flatten(0, 1)
    cu = backend._steps(2, 17, q)
    with pytest.raises(NameError, match="D11"):
        fake.flash_attn_varlen_func(q, q, q, 17, cu, 23, seqused_k=cu[1:])
    packed = problem_of("p", packed_q=(3, 5), packed_k=(4, 9), seqused_k=(2, 9))
    assert "D11" in backend.supports(packed.problem, "forward")


def test_d13_the_backward_is_ours(fake):
    built = problem_of("causal", causal=True)
    assert backend.supports(built.problem, "backward") is None
    with use_backend("flaggems"):
        assert dispatch.select_unforced(built.problem, "backward").__name__ == "flash_attn.backends.cpu"
    q, k, v = (x.requires_grad_() for x in built.operands[:3])
    with use_backend("flaggems"):
        out = flash_attn.flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    with use_backend("cpu"):
        want = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


def test_d18_head_dims_are_padded_to_a_power_of_two(fake):
    built = problem_of("dim", head_dim=80, head_dim_v=72)
    check_backend(backend, built.problem, built.operands)


def test_one_query_in_most_sequences(fake):
    """max_seqlen_q 1 makes FlagGems reshape the queries to one a sequence, also where a sequence has none."""
    built = problem_of("ragged", batch=3, max_q=1, packed_q=(1, 0, 1), packed_k=(4, 7, 5), max_k=7)
    check_backend(backend, built.problem, built.operands)


def test_offsets_past_32_bits_are_refused(fake, monkeypatch):
    monkeypatch.setattr(backend, "MAX_ELEMENTS", 100)
    built = problem_of("plain")
    with pytest.raises(UnsupportedError, match="32 bits"):
        backend.forward(built.problem, built.operands)


# --- probing ----------------------------------------------------------------------------------------------------


def test_a_cache_call_runs_on_it(fake):
    q, new = torch.randn(2, 1, 4, 16).bfloat16(), torch.randn(2, 2, 1, 2, 16).bfloat16()
    caches = [torch.randn(2, 2, 24, 2, 16).bfloat16() for _ in range(2)]
    caches[1] = caches[0].clone()
    results = []
    for name, cache in zip(("flaggems", "cpu"), caches, strict=True):
        with use_backend(name):
            results.append(
                flash_attn.flash_attn_with_kvcache(
                    q, *cache, *new, cache_seqlens=7, causal=True, return_softmax_lse=True
                )
            )
    assert torch.equal(*caches)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    forget()
    problem = cases.Case("plain", dtype=torch.float16).problem("cuda")
    assert "not installed" in backend.supports(problem, "forward")
    forget()


@pytest.mark.parametrize(
    "error", [RuntimeError("No device were detected"), AssertionError("no CUDA"), TypeError("x")]
)
def test_an_import_that_fails_is_a_reason(fake, monkeypatch, error):
    """Without a GPU `import flag_gems` raises RuntimeError, AssertionError or TypeError, not ImportError."""

    def fail(name):
        raise error

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    assert backend.supports(problem_of("plain").problem, "forward") == (
        f"import flag_gems fails with {type(error).__name__}: {error}"
    )


@pytest.mark.parametrize("what", ["causal", "window to the left", "paged decode"])
def test_wrong_results_disable_it_with_the_reason(fake, monkeypatch, what):
    true = fake.flash_attn_varlen_func

    def broken(*args, **kwargs):
        out, lse = true(*args, **kwargs)
        kind = "paged decode" if kwargs.get("block_table") is not None else (
            "causal" if kwargs["causal"] else "window to the left"
        )  # fmt: skip
        return (out * 1.05 if kind == what else out), lse

    monkeypatch.setattr(fake, "flash_attn_varlen_func", broken)
    reason = backend.supports(problem_of("plain").problem, "forward")
    assert reason.startswith(f"its self-test fails with AssertionError: {what}, out: error")
    with use_backend("flaggems"), pytest.raises(UnsupportedError, match="self-test fails"):
        q = torch.randn(1, 4, 2, 16, dtype=torch.float16)
        flash_attn.flash_attn_func(q, q, q)


def test_nothing_is_imported_before_it_is_asked_for():
    assert "flag_gems" not in sys.modules


def test_chosen_by_environment(fake, environment):
    environment("FLASH_ATTN_BACKEND", "flaggems")
    assert dispatch.select(problem_of("plain").problem) is backend
    assert dispatch.select_unforced(problem_of("plain").problem, "forward") is not backend


def test_never_chosen_by_itself(fake):
    assert dispatch.select(problem_of("plain").problem) is not backend
