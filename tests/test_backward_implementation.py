"""The functions that the project's plan named, and proof that the errors in its sketches are caught.

`sketches.py` keeps the sketches as they were written. Each test shows two things: our function passes the checker,
and the sketch does not.
"""

import pytest
import sketches
import torch
import torch.nn.functional as F
from cases import Case, build

from flash_attn import flash_attn_func
from flash_attn.backward.autograd_function import FlashAttnFunction
from flash_attn.backward.flash_backward import flash_attention_backward, flash_attention_forward
from flash_attn.backward.varlen_backward import flash_attention_varlen_backward
from flash_attn.problem import Gradients
from flash_attn.reference import attention as oracle
from flash_attn.utils.testing import assert_gradients_as_close_as_torch

CLOSE = dict(rtol=1e-9, atol=1e-11)


def inputs(B=2, L=128, H=8, D=64, N=None, Hk=None, dtype=torch.float64):
    shapes = (L, H), (N or L, Hk or H), (N or L, Hk or H)
    return [torch.randn(B, length, heads, D, dtype=dtype) for length, heads in shapes]


def sdpa_gradients(dout, q, k, v, keep=None, scale=None):
    """PyTorch's autograd through its own attention, (B, L, H, D)."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    t = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(*t, attn_mask=keep, scale=scale, enable_gqa=True).transpose(1, 2)
    return torch.autograd.grad(out, leaves, dout)


def bottom_right(M, N):
    return torch.ones(M, N, dtype=torch.bool).tril(N - M)


def close(got, want) -> bool:
    return all(torch.allclose(g, w, **CLOSE) for g, w in zip(got, want, strict=True))


class TestFlashAttentionBackward:
    def test_gradient_shapes(self):
        """E1: the sketch passes this test with gradients that are wrong by far, so shapes prove nothing."""
        q, k, v = inputs()
        out = flash_attention_forward(q, k, v)
        dout = torch.randn_like(out)
        dq, dk, dv = flash_attention_backward(dout, q, k, v, out, None)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
        sketch = sketches.flash_attention_backward(dout, q, k, v, out, None)
        assert [x.shape for x in sketch] == [q.shape, k.shape, v.shape]
        want = sdpa_gradients(dout, q, k, v)
        assert close((dq, dk, dv), want)
        assert not close(sketch, want)
        assert max((s - w).abs().max() for s, w in zip(sketch, want, strict=True)) > 1

    def test_inputs_that_require_gradients(self):
        """As in the plan's own test; what comes back is a plain tensor."""
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (x.requires_grad_() for x in inputs(1, 8, 2, 16, dtype=dtype))
            out = flash_attention_forward(q, k, v, causal=True)
            results = out, *flash_attention_backward(torch.randn_like(out), q, k, v, out, None, causal=True)
            assert not any(x.requires_grad for x in results)

    def test_gradient_correctness(self):
        """Against finite differences, and against the yardstick in half precision."""
        q, k, v = inputs(1, 5, 2, 3)
        out = flash_attention_forward(q, k, v)
        dout = torch.randn_like(out)
        got = flash_attention_backward(dout, q, k, v, out, None)
        step = 1e-6
        for x, g in zip((q, k, v), got, strict=True):
            for index in torch.randint(0, x.numel(), (10,)).tolist():
                flat = x.view(-1)
                before = flat[index].item()
                flat[index] = before + step
                up = (flash_attention_forward(q, k, v) * dout).sum()
                flat[index] = before - step
                down = (flash_attention_forward(q, k, v) * dout).sum()
                flat[index] = before
                assert abs((up - down) / (2 * step) - g.flatten()[index]) < 1e-7

    def test_causal_gradients(self):
        """E1, E3: the sketch crashes, or masks from the top left; ours aligns to the bottom right corner."""
        for M, N in ((24, 24), (16, 40), (40, 16)):
            q, k, v = inputs(2, M, 4, 16, N)
            out = flash_attention_forward(q, k, v, causal=True)
            dout = torch.randn_like(out)
            keep = bottom_right(M, N)
            dout[:, ~keep.any(1)] = 0  # torch has no gradient for a row without keys
            want = sdpa_gradients(dout, q, k, v, keep)
            got = flash_attention_backward(dout, q, k, v, out, None, causal=True)
            used = keep.any(1)
            assert close((got[0][:, used], *got[1:]), (want[0][:, used], *want[1:]))
            with pytest.raises(RuntimeError, match="size of tensor"):
                sketches.flash_attention_backward(dout, q, k, v, out, None, causal=True)

    @pytest.mark.parametrize("Hk", [4, 2, 1])
    def test_key_gradients_sum_over_the_group(self, Hk):
        """E3: grouped heads."""
        q, k, v = inputs(2, 24, 4, 16, Hk=Hk)
        out = flash_attention_forward(q, k, v)
        dout = torch.randn_like(out)
        got = flash_attention_backward(dout, q, k, v, out, None)
        assert close(got, sdpa_gradients(dout, q, k, v))

    def test_scale_zero_is_a_scale(self):
        """E3: `softmax_scale or default` takes 0.0 for None."""
        q, k, v = (
            x.transpose(1, 2).contiguous() for x in inputs(1, 6, 2, 4)
        )  # the layout the sketch is right in
        dout = torch.randn_like(q)
        sketch = sketches.flash_attention_backward(dout, q, k, v, q, None, softmax_scale=0.0)
        assert sketch[0].any()
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
        out = flash_attention_forward(q, k, v, softmax_scale=0.0)
        got = flash_attention_backward(dout, q, k, v, out, None, softmax_scale=0.0)
        assert not got[0].any() and not got[1].any()
        assert close(got, sdpa_gradients(dout, q, k, v, scale=0.0))

    def test_out_and_lse_are_used(self):
        """E3: the sketch ignores them. With those of twice as many keys the gradients are a part of the whole."""
        q, k, v = inputs(1, 8, 2, 4, N=20)
        problem, ops, *_ = build(Case("whole", batch=1, max_q=8, max_k=20, heads=2, kv_heads=2, head_dim=4))
        ops = ops._replace(q=q, k=k, v=v)
        out, lse = oracle.forward(problem, ops)
        dout = torch.randn_like(out)
        want = sdpa_gradients(dout, q, k, v)
        halves = [
            flash_attention_backward(dout, q, x, y, out, lse)
            for x, y in zip(k.split(10, 1), v.split(10, 1), strict=True)
        ]
        assert close([halves[0][0] + halves[1][0]], want[:1])
        assert close([torch.cat([h[i] for h in halves], 1) for i in (1, 2)], want[1:])
        alone = flash_attention_backward(dout, q, k[:, :10], v[:, :10], out, None)
        assert not close([alone[1]], [want[1][:, :10]])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("causal", [False, True])
    def test_half_precision_is_as_close_as_torch(self, dtype, causal):
        """E3, E5: the sketch takes its softmax in 16 bits and drops what autograd keeps; the checker says so."""
        case = Case("half", max_q=64, max_k=64, kv_heads=4, causal=causal, dtype=dtype)
        problem, ops, *_ = build(case)
        out = flash_attention_forward(*ops[:3], causal=causal)
        dout = torch.randn_like(out)
        got = flash_attention_backward(dout, *ops[:3], out, None, causal=causal)
        assert_gradients_as_close_as_torch(Gradients(*got), problem, ops, dout)
        if not causal:
            sketch = sketches.flash_attention_backward(dout, *ops[:3], out, None)
            with pytest.raises(AssertionError, match="exceeds"):
                assert_gradients_as_close_as_torch(Gradients(*sketch), problem, ops, dout)


def test_docstring_formulas_are_wrong_and_ours_are_right():
    """E2: dQ and dK of the plan's docstring; its dV is right."""
    q, k, v = inputs(1, 6, 2, 4)
    out = flash_attention_forward(q, k, v)
    dout = torch.randn_like(out)
    want = sdpa_gradients(dout, q, k, v)
    dq, dk, dv = sketches.docstring_gradients(*(x.transpose(1, 2) for x in (dout, q, k, v)))
    assert close([dv.transpose(1, 2)], [want[2]])
    assert dk.shape[-2:] == (4, 4)  # head_dim x head_dim: not a gradient of k at all
    assert not close([dq.transpose(1, 2)], [want[0]])
    assert close(flash_attention_backward(dout, q, k, v, out, None), want)


def test_autograd_gets_one_gradient_per_input():
    """E3: a backward that returns three tensors fails as soon as forward takes a scale."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 6, 2, 4))
    wrong = sketches.FlashAttnFunction.apply(q, k, v, True, None)
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        wrong.sum().backward()
    assert issubclass(FlashAttnFunction, torch.autograd.Function)
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    assert close(got, sdpa_gradients(dout, q, k, v, bottom_right(6, 6)))


def test_seed_benchmark_memory_is_not_that_of_the_call():
    """E4 is in tests/test_benchmarks.py; here: what the sketch reads never goes down again."""
    from flash_attn.utils.benchmarks import peak_extra_mb

    big, small = (lambda n=n: torch.ones(n * 2**20, dtype=torch.uint8) for n in (64, 1))
    assert peak_extra_mb(big, "cpu") > 60
    assert peak_extra_mb(small, "cpu") < 2


def softmax_oracle(q, k, v, causal=False):
    """One head, (M, D), scale 1."""
    s = q @ k.T
    if causal:
        s = s.masked_fill(~bottom_right(*s.shape), -torch.inf)
    return s.softmax(-1) @ v


def one_head(M, N, D=8):
    return [torch.randn(n, D, dtype=torch.float64) for n in (M, N, N)]


def ours(q, k, v, causal=False):
    return flash_attention_forward(*(x[None, :, None] for x in (q, k, v)), causal, 1.0)[0, :, 0]


@pytest.mark.parametrize("M, N", [(64, 64), (40, 64), (48, 50)])
def test_online_softmax_state_belongs_to_a_row_tile(M, N):
    """E6: the tutorial overwrites its length-N state with that of a tile."""
    q, k, v = one_head(M, N)
    torch.testing.assert_close(ours(q, k, v), softmax_oracle(q, k, v), **CLOSE)
    with pytest.raises(RuntimeError):
        sketches.tutorial_flash_attention(q, k, v, 16, 16)


def test_correction_formula_needs_the_final_division():
    """E12: unnormalised accumulation without the division by l; with it the formula is right."""
    q, k, v = one_head(32, 64)
    want = softmax_oracle(q, k, v)
    torch.testing.assert_close(ours(q, k, v), want, **CLOSE)
    torch.testing.assert_close(sketches.key_formula(q, k, v, 16, divide=True), want, **CLOSE)
    assert (sketches.key_formula(q, k, v, 16, divide=False) - want).abs().max() > 1


def test_a_tile_without_visible_keys_gives_no_nan():
    """E12: the normalised form is 0 / 0 where a row has seen nothing yet."""
    q, k, v = one_head(32, 16)
    out = ours(q, k, v, causal=True)
    assert not out[:16].any()
    torch.testing.assert_close(out[16:], softmax_oracle(q, k, v, causal=True)[16:], **CLOSE)
    assert sketches.quick_reference(q, k, v, 16, causal=True).isnan().any()


@pytest.mark.parametrize("M, N", [(48, 80), (50, 50), (50, 80)])
def test_lengths_that_differ_and_do_not_divide(M, N):
    """E13: the quick reference loops over M where it means N, and allocates whole tiles."""
    q, k, v = one_head(M, N)
    want = softmax_oracle(q, k, v)
    torch.testing.assert_close(ours(q, k, v), want, **CLOSE)
    try:
        sketch = sketches.quick_reference(q, k, v, 16)
    except RuntimeError:
        return
    assert not torch.allclose(sketch, want, **CLOSE)


def test_causal_snippet_is_inverted():
    """E14: it hides the past and keeps the future."""
    q, k, v = one_head(16, 16)
    want = softmax_oracle(q, k, v, causal=True)
    torch.testing.assert_close(ours(q, k, v, causal=True), want, **CLOSE)
    sketch = sketches.snippet_causal(q, k, v)
    assert not torch.allclose(sketch, want, **CLOSE)
    torch.testing.assert_close(sketch[-1], v[-1], **CLOSE)  # the last row sees only itself


@pytest.mark.parametrize("with_lse", [False, True])
def test_varlen_backward_is_the_dense_one_in_each_sequence(with_lse):
    lengths_q, lengths_k = (5, 0, 9), (7, 3, 4)
    problem, ops, *_ = build(
        Case("packed", batch=3, max_q=9, max_k=7, packed_q=lengths_q, packed_k=lengths_k, causal=True),
        dtype=torch.float64,
    )
    out, lse = oracle.forward(problem, ops)
    dout = torch.randn_like(out)
    got = flash_attention_varlen_backward(
        dout, *ops[:3], out, lse if with_lse else None, ops.cu_seqlens_q, ops.cu_seqlens_k, 9, 7, causal=True
    )
    q_at, k_at = 0, 0
    for m, n in zip(lengths_q, lengths_k, strict=True):
        rows, keys = slice(q_at, q_at + m), slice(k_at, k_at + n)
        q_at, k_at = q_at + m, k_at + n
        dense = [x[s][None] for x, s in zip(ops[:3], (rows, keys, keys), strict=True)]
        want = flash_attention_backward(dout[rows][None], *dense, out[rows][None], None, causal=True)
        assert close((got[0][rows], got[1][keys], got[2][keys]), [w[0] for w in want])
    assert not any(g[end:].any() for g, end in zip(got, (q_at, k_at, k_at), strict=True))
