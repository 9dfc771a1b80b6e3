"""Diffusers itself, and the calls that TransformerEngine and Megatron-LM make (they need CUDA to be installed).

The patterns were written down from those projects' sources of August 2026.
"""

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import tiny_models
import torch

import flash_attn
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch

HERE = Path(__file__).parent


def test_diffusers_runs_a_transformer_on_this_package(tmp_path):
    pytest.importorskip("diffusers")
    tiny_models.write_metadata(tmp_path)
    path = os.pathsep.join([str(HERE.parent), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, HERE / "client_diffusers.py", tmp_path / "out.pt"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outputs, calls = torch.load(tmp_path / "out.pt")
    assert calls == {"flash_attn_func": 2 + 3, "flash_attn_varlen_func": 2}  # two layers; three direct calls
    for name in ("flash", "flash_varlen"):
        assert_as_close_as_torch(outputs[name], outputs["exact"], outputs["native"], name=name)
    assert torch.equal(outputs["negligible"], outputs["none"])


# --- TransformerEngine, attention/dot_product_attention/backends.py ---------------------------------------------


def test_importing_transformer_engine_does_not_break():
    """It imports these names outside of any try, when the version is one it knows."""
    from flash_attn.flash_attn_interface import (
        _flash_attn_backward,
        _flash_attn_forward,
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
        flash_attn_func,
        flash_attn_varlen_func,
    )
    from flash_attn_2_cuda import varlen_bwd

    for function in (flash_attn_func, flash_attn_varlen_func, varlen_bwd):
        assert callable(function)
    for operator in (_flash_attn_forward, _flash_attn_varlen_forward):
        assert {"window_size_left", "softcap"} <= set(inspect.signature(operator._init_fn).parameters)
    for operator in (_flash_attn_backward, _flash_attn_varlen_backward):
        assert "rng_state" in inspect.signature(operator._init_fn).parameters


def test_context_parallel_calls_of_transformer_engine():
    """Halves of the keys attended to apart, joined by their lse; then backward per half from the joined out and lse."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    built = cases.build(cases.Case("halves", max_q=12, max_k=24, heads=4, kv_heads=4, dtype=torch.bfloat16))
    p, (q, k, v, *_) = built.problem, built.operands
    common = dict(dropout_p=0.0, softmax_scale=p.scale, causal=False, softcap=0.0, alibi_slopes=None)
    window = dict(window_size_left=-1, window_size_right=-1)
    halves = [(k[:, a:b], v[:, a:b]) for a, b in ((0, 12), (12, 24))]
    parts = [_flash_attn_forward(q, *kv, **common, **window, return_softmax=False) for kv in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o.float() * (part_lse - lse).exp().transpose(1, 2)[..., None] for o, part_lse, *_ in parts).to(
        q.dtype
    )
    want, plain = oracle.forward(p, built.operands), eager.forward(p, built.operands)
    assert_as_close_as_torch(out, want[0], plain[0])
    dout = torch.randn_like(out)
    dq = torch.zeros(q.shape)
    for kv in halves:
        grads = [torch.full_like(x, torch.nan) for x in (q, *kv)]
        _flash_attn_backward(
            dout, q, *kv, out, lse, *grads, **common, **window, deterministic=False, rng_state=None
        )
        assert all(g.isfinite().all() for g in grads), "dq, dk and dv are written in place"
        dq += grads[0].float()
    exact, rounded = oracle.backward(p, built.operands, *want, dout), eager.backward(p, built.operands, dout)
    assert_as_close_as_torch(dq.to(q.dtype), exact.dq, rounded.dq, factor=3, name="dq")


def test_the_version_is_one_that_clients_accept():
    """Megatron-LM: at least 2.7.3 for dynamic batching. TransformerEngine: from 2.8.4 on it warns and skips FA2."""
    from packaging.version import Version

    assert Version(flash_attn.__version__) >= Version("2.7.3")
    try:
        installed = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return
    assert Version(installed) >= Version(flash_attn.__version__)


# --- Megatron-LM, core/transformer/attention.py -------------------------------------------------------------------


def test_megatron_dynamic_batching():
    """Prefill over pages with varlen, then decode with the cache function; both ask for the lse."""
    built = cases.build(
        cases.Case(
            "paged", batch=3, max_q=1, max_k=24, seqused_k=(5, 24, 9), page_size=4, dtype=torch.bfloat16
        )
    )
    ops, p = built.operands, built.problem
    want, plain = oracle.forward(p, ops), eager.forward(p, ops)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q=ops.q, k_cache=ops.k, v_cache=ops.v, cache_seqlens=ops.seqused_k, causal=True, window_size=(-1, -1),
        block_table=ops.block_table, return_softmax_lse=True,
    )  # fmt: skip
    assert lse.shape == (3, 4, 1)
    assert_as_close_as_torch(out, want[0], plain[0])
    cu_q = torch.arange(4, dtype=torch.int32)
    cu_k = torch.nn.functional.pad(ops.seqused_k.cumsum(0), (1, 0)).int()
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        ops.q.flatten(0, 1), ops.k, ops.v, cu_q, cu_k, 1, 24, softmax_scale=None, causal=True, window_size=(-1, -1),
        block_table=ops.block_table, return_attn_probs=True,
    )  # fmt: skip
    assert lse.shape == (4, 3)
    assert_as_close_as_torch(out, want[0].flatten(0, 1), plain[0].flatten(0, 1))
    assert_as_close_as_torch(lse, want[1][..., 0].T, plain[1][..., 0].T)


def test_megatron_rotary():
    from flash_attn.layers.rotary import apply_rotary_emb

    t = torch.randn(2, 6, 4, 16)
    angles = torch.outer(torch.arange(6.0), 1.0 / 100 ** (torch.arange(8) / 8))
    got = apply_rotary_emb(t, angles.cos(), angles.sin(), interleaved=False)
    first, second = t.chunk(2, -1)
    cos, sin = (f(angles)[:, None] for f in (torch.cos, torch.sin))
    want = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    torch.testing.assert_close(got, want)
