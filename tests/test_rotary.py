"""flash_attn.layers.rotary on the CPU, against complex multiplication in fp64; the kernel in the interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from flash_attn.errors import ArgumentTypeError, ArgumentValueError
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
FRACTIONS = pytest.mark.parametrize("rotary_dim", [4, 8, 16])
B, S, H, D, POSITIONS = 2, 5, 3, 16, 24


def table(rotary_dim, dtype=torch.float32, positions=POSITIONS):
    angle = torch.rand(positions, rotary_dim // 2, dtype=torch.float64) * 6.28
    return angle.cos().to(dtype), angle.sin().to(dtype)


def oracle(x, cos, sin, positions, interleaved, sign=1):
    """Pairs as complex numbers, in fp64, one row at a time; positions (rows,) for x (rows, H, D)."""
    out = x.double().clone()
    half = cos.shape[1]
    for r, p in enumerate(positions):
        turn = torch.complex(cos[p].double(), sign * sin[p].double())
        first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
        z = torch.complex(x[r][:, first].double(), x[r][:, second].double()) * turn
        out[r][:, first], out[r][:, second] = z.real, z.imag
    return out


def bound(expected, dtype):
    """One rounding to `dtype` plus fp32 arithmetic (fp64 for fp64)."""
    return expected.abs().max().item() * (
        torch.finfo(dtype).eps + (1e-15 if dtype == torch.float64 else 1e-6)
    )


def assert_close(actual, expected):
    error = (actual.double() - expected).abs().max().item()
    assert error <= bound(expected, actual.dtype), error


@STYLES
@FRACTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", ["int", "tensor"])
@pytest.mark.parametrize("inplace", [False, True])
def test_dense(interleaved, rotary_dim, dtype, offset, inplace):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(B, S, H, D, dtype=dtype), table(rotary_dim, dtype)
    starts = [7, 7] if offset == "int" else [3, 11]
    before = x.clone()
    out = apply_rotary_emb(
        x, cos, sin, interleaved, inplace, seqlen_offsets=7 if offset == "int" else torch.tensor(starts)
    )
    assert (out.data_ptr() == x.data_ptr()) == inplace
    if not inplace:
        assert torch.equal(x, before)
    for b in range(B):
        assert_close(out[b], oracle(before[b], cos, sin, range(starts[b], starts[b] + S), interleaved))
    assert torch.equal(out[..., rotary_dim:], before[..., rotary_dim:])


@STYLES
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_packed(interleaved, rotary_dim):
    torch.manual_seed(1)
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    x, (cos, sin) = torch.randn(11, H, D), table(rotary_dim)
    offsets = torch.tensor([2, 5, 9], dtype=torch.int32)
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=5)
    assert_close(out[:9], oracle(x[:9], cos, sin, [*range(2, 6), *range(9, 14)], interleaved))
    assert torch.equal(out[9:], x[9:])  # rows behind the last sequence


@STYLES
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_is_the_inverse_rotation(interleaved, inplace, packed):
    torch.manual_seed(2)
    cos, sin = table(8)
    x = torch.randn(S, H, D) if packed else torch.randn(1, S, H, D)
    leaf = x.clone().requires_grad_()
    extra = {"cu_seqlens": torch.tensor([0, S], dtype=torch.int32), "max_seqlen": S} if packed else {}
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, seqlen_offsets=3, **extra)
    dout = torch.randn_like(out)
    kept = dout.clone()
    out.backward(dout)
    assert torch.equal(dout, kept)  # somebody else may hold the incoming gradient
    assert_close(
        leaf.grad.view(S, H, D), oracle(dout.view(S, H, D), cos, sin, range(3, 3 + S), interleaved, sign=-1)
    )


def test_in_place_on_an_intermediate_is_seen_by_autograd():
    """Without mark_dirty the gradient of `y * y` would silently use the rotated y."""
    cos, sin = table(D)
    x = torch.randn(1, S, H, D, requires_grad=True)
    y = x * 1.0
    square = y * y
    apply_rotary_emb(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@STYLES
def test_torch_reference_and_rotate_half(interleaved):
    x, (cos, sin) = torch.randn(B, S, H, D), table(8, positions=S)
    expected = apply_rotary_emb(x, cos, sin, interleaved)
    assert (apply_rotary_emb_torch(x, cos, sin, interleaved) - expected).abs().max() < 1e-6
    turned = rotate_half(x, interleaved)
    assert torch.equal(rotate_half(turned, interleaved), -x)
    quarter = apply_rotary_emb(x, torch.zeros(S, D // 2), torch.ones(S, D // 2), interleaved)
    assert torch.equal(quarter, turned)
    assert apply_rotary_emb_func is apply_rotary_emb


@STYLES
@pytest.mark.parametrize("layout", ["five", "gqa"])
@pytest.mark.parametrize("own_k", [False, True])
def test_qkv(interleaved, layout, own_k):
    torch.manual_seed(3)
    shape, heads = ((B, S, 3, H, D), None) if layout == "five" else ((B, S, 4 + 2 * 2, D), 4)
    qkv, (cos, sin) = torch.randn(shape), table(8)
    cos_k, sin_k = table(8) if own_k else (None, None)
    q, k, v = qkv.unbind(2) if layout == "five" else qkv.split([4, 2, 2], dim=2)
    want_q = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=2)
    want_k = apply_rotary_emb(
        k, cos_k if own_k else cos, sin_k if own_k else sin, interleaved, seqlen_offsets=2
    )
    leaf = qkv.clone().requires_grad_()
    out = apply_rotary_emb_qkv_(leaf, cos, sin, cos_k, sin_k, interleaved, 2, heads)
    assert out.data_ptr() == leaf.data_ptr()
    got = out.unbind(2) if layout == "five" else out.split([4, 2, 2], dim=2)
    for a, e in zip(got, (want_q, want_k, v), strict=True):
        assert torch.equal(a, e)
    # a rotation keeps inner products: <R x, R x> has gradient 2 x
    (out * out.detach()).sum().backward()
    assert (leaf.grad - qkv).abs().max() < 1e-5


@STYLES
def test_kv(interleaved):
    kv, (cos, sin) = torch.randn(B, S, 2, H, D), table(D)
    want = apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, seqlen_offsets=4)
    out = apply_rotary_emb_kv_(kv.clone(), cos, sin, interleaved, 4)
    assert torch.equal(out[:, :, 0], want)
    assert torch.equal(out[:, :, 1], kv[:, :, 1])


class TestModule:
    def test_angles(self):
        rotary = RotaryEmbedding(8)
        qkv = torch.randn(B, S, 3, H, D)
        angles = torch.outer(torch.arange(9.0), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
        want = apply_rotary_emb(qkv[:, :, 0], angles.cos(), angles.sin(), seqlen_offsets=4)
        out = rotary(qkv.clone(), seqlen_offset=4)
        assert (out[:, :, 0] - want).abs().max() < 1e-6
        assert rotary._seq_len_cached == 9
        assert rotary._cos_cached.shape == (9, 4)
        assert "inv_freq" not in rotary.state_dict()

    def test_the_table_grows_and_changes_dtype(self):
        rotary = RotaryEmbedding(8)
        rotary._update_cos_sin_cache(4, torch.device("cpu"), torch.float32)
        first = rotary._cos_cached
        rotary._update_cos_sin_cache(3, torch.device("cpu"), torch.float32)
        assert rotary._cos_cached is first
        rotary._update_cos_sin_cache(6, torch.device("cpu"), torch.bfloat16)
        assert rotary._cos_cached.shape == (6, 4)
        assert rotary._cos_cached.dtype == torch.bfloat16

    def test_a_cast_module_computes_its_angles_in_fp32(self):
        exact, cast = RotaryEmbedding(8), RotaryEmbedding(8).bfloat16()
        for rotary in (exact, cast):
            rotary._update_cos_sin_cache(4096, torch.device("cpu"), torch.float32)
        assert torch.equal(exact._sin_cached, cast._sin_cached)

    def test_inference_tables_are_replaced_for_training(self):
        rotary = RotaryEmbedding(8)
        with torch.inference_mode():
            rotary(torch.randn(1, S, 3, H, D))
        qkv = torch.randn(1, S, 3, H, D, requires_grad=True)
        rotary(qkv).sum().backward()
        assert qkv.grad is not None

    def test_xpos_products_depend_on_distance_only(self):
        rotary = RotaryEmbedding(D, scale_base=64)
        q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)
        rotary._update_cos_sin_cache(20, torch.device("cpu"), torch.float32)

        def product(i, j):
            a = apply_rotary_emb(q, rotary._cos_cached, rotary._sin_cached, seqlen_offsets=i)
            b = apply_rotary_emb(k, rotary._cos_k_cached, rotary._sin_k_cached, seqlen_offsets=j)
            return (a * b).sum()

        assert (product(5, 2) - product(15, 12)).abs() < 1e-4
        assert (product(5, 2) - product(5, 3)).abs() > 1e-3

    def test_q_and_kv(self):
        rotary = RotaryEmbedding(D, interleaved=True)
        q, kv = torch.randn(B, S, H, D), torch.randn(B, S, 2, 1, D)
        offsets = torch.tensor([1, 6])
        out_q, out_kv = rotary(q.clone(), kv.clone(), seqlen_offset=offsets, max_seqlen=S + 6)
        cos, sin = rotary._cos_cached, rotary._sin_cached
        assert torch.equal(out_q, apply_rotary_emb(q, cos, sin, True, seqlen_offsets=offsets))
        assert torch.equal(
            out_kv[:, :, 0], apply_rotary_emb(kv[:, :, 0], cos, sin, True, seqlen_offsets=offsets)
        )
        with pytest.raises(ArgumentValueError, match="max_seqlen"):
            RotaryEmbedding(D)(q, kv, seqlen_offset=offsets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (S, H, D)}, ArgumentValueError, r"x must have shape \(batch, seqlen, heads, dim\)"),
        ({"cos": (POSITIONS, 9), "sin": (POSITIONS, 9)}, ArgumentValueError, "at most the head dim 16, got 18"),
        ({"cos": (POSITIONS, 3)}, ArgumentValueError, "cos and sin must both have shape"),
        ({"seqlen_offsets": 20}, ArgumentValueError, "at least 25 positions, got 24"),
        ({"seqlen_offsets": torch.zeros(3).int()}, ArgumentValueError, r"seqlen_offsets must have shape \(2,\)"),
        ({"seqlen_offsets": torch.zeros(2)}, ArgumentTypeError, "seqlen_offsets must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ArgumentValueError, "x must have shape"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    given = {"x": (B, S, H, D), "cos": (POSITIONS, 4), "sin": (POSITIONS, 4)} | change
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    with pytest.raises(error, match=message):
        apply_rotary_emb(given.pop("x"), given.pop("cos"), given.pop("sin"), **given)


def test_layers_rotary_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import flash_attn.layers.rotary"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
class TestKernel:
    @STYLES
    @FRACTIONS
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("conjugate", [False, True])
    def test_dense(self, interleaved, rotary_dim, inplace, conjugate):
        from flash_attn.ops.triton.rotary import apply_rotary

        x, (cos, sin) = torch.randn(B, S, H, D), table(rotary_dim)
        before, starts = x.clone(), [3, 11]
        out = apply_rotary(
            x, cos, sin, torch.tensor(starts), interleaved=interleaved, inplace=inplace, conjugate=conjugate
        )
        assert (out.data_ptr() == x.data_ptr()) == inplace
        for b in range(B):
            rows = range(starts[b], starts[b] + S)
            assert_close(out[b], oracle(before[b], cos, sin, rows, interleaved, -1 if conjugate else 1))

    @STYLES
    def test_packed(self, interleaved):
        from flash_attn.ops.triton.rotary import apply_rotary

        cu = torch.tensor([0, 20, 20, 25], dtype=torch.int32)
        x, (cos, sin) = torch.randn(27, 2, H, D)[:, 1], table(8)  # strided rows
        out = apply_rotary(x, cos, sin, 2, cu, 20, interleaved)
        assert_close(out[:25], oracle(x[:25], cos, sin, [*range(2, 22), *range(2, 7)], interleaved))
        assert torch.equal(out[25:], x[25:])


OFFSETS = torch.tensor([3, 7], dtype=torch.int32)
PACKED_STARTS = torch.tensor([0, 5, 12], dtype=torch.int32)
COMPILED = {
    "integer offset": ((2, 9, 4, 16), lambda x, c, s: apply_rotary_emb(x, c, s, seqlen_offsets=5)),
    "tensor offset": ((2, 9, 4, 16), lambda x, c, s: apply_rotary_emb(x, c, s, True, seqlen_offsets=OFFSETS)),
    "packed": (
        (12, 4, 16),
        lambda x, c, s: apply_rotary_emb(x, c, s, cu_seqlens=PACKED_STARTS, max_seqlen=7),
    ),
    "in place": ((2, 9, 4, 16), lambda x, c, s: apply_rotary_emb(x, c, s, inplace=True)),
    "used later": ((2, 9, 4, 16), lambda x, c, s: (apply_rotary_emb(x, c, s, inplace=True), 2 * x)[1]),
    "qkv": ((2, 9, 3, 4, 16), lambda x, c, s: apply_rotary_emb_qkv_(x, c, s, seqlen_offsets=2)),
    "qkv of unlike heads": ((2, 9, 8, 16), lambda x, c, s: apply_rotary_emb_qkv_(x, c, s, num_heads_q=4)),
    "kv": ((2, 9, 2, 4, 16), lambda x, c, s: apply_rotary_emb_kv_(x, c, s, seqlen_offsets=OFFSETS)),
}


@pytest.mark.parametrize("leaf", [False, True], ids=["", "leaf"])
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_in_one_graph_equals_eager(form, leaf):
    """torch.compile traced the in-place functions to other numbers (kv), or refused them; a leaf may be rotated too."""
    if leaf and form == "used later":
        pytest.skip("later uses of a leaf that was written to have no gradient to agree on")
    torch.compiler.reset()  # else its limit of recompilations counts all forms together
    shape, function = COMPILED[form]
    torch.manual_seed(0)
    angles = torch.outer(torch.arange(20.0), 0.1 ** torch.arange(6.0))
    tables, start = (angles.cos(), angles.sin()), torch.randn(shape)
    dout, results = torch.randn(shape), []

    def call(x, *tables):
        given = x if leaf else x * 1.0
        return function(given, *tables), given

    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        x = start.clone().requires_grad_()
        out, given = run(x, *tables)
        out.backward(dout.clone())
        results.append((out.detach(), x.grad, given.detach()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
