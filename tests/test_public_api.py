"""The public surface is FlashAttention-2.8's: names, signatures, what comes back."""

import importlib
import inspect

import cases
import pytest
import torch

import flash_attn
from flash_attn import flash_attn_interface

TAIL = dict(
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
)  # fmt: skip
EMPTY = inspect.Parameter.empty
VARLEN = dict(cu_seqlens_q=EMPTY, cu_seqlens_k=EMPTY, max_seqlen_q=EMPTY, max_seqlen_k=EMPTY)

# Recorded from flash-attn 2.8.4, flash_attn/flash_attn_interface.py.
SIGNATURES = {
    "flash_attn_func": dict(q=EMPTY, k=EMPTY, v=EMPTY, **TAIL),
    "flash_attn_kvpacked_func": dict(q=EMPTY, kv=EMPTY, **TAIL),
    "flash_attn_qkvpacked_func": dict(qkv=EMPTY, **TAIL),
    "flash_attn_varlen_func": dict(q=EMPTY, k=EMPTY, v=EMPTY, **VARLEN, **TAIL, block_table=None),
    "flash_attn_varlen_kvpacked_func": dict(q=EMPTY, kv=EMPTY, **VARLEN, **TAIL),
    "flash_attn_varlen_qkvpacked_func": dict(qkv=EMPTY, cu_seqlens=EMPTY, max_seqlen=EMPTY, **TAIL),
    "flash_attn_with_kvcache": dict(
        q=EMPTY, k_cache=EMPTY, v_cache=EMPTY, k=None, v=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None,
        num_splits=0, return_softmax_lse=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name):
    function = getattr(flash_attn, name)
    parameters = inspect.signature(function).parameters
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert inspect.isfunction(function) and function.__doc__


def test_version_and_exports():
    assert flash_attn.__version__ == "2.8.4"
    for name in flash_attn.__all__:
        assert getattr(flash_attn, name) is not None
    for name in SIGNATURES:
        assert getattr(flash_attn_interface, name) is getattr(flash_attn, name)


@pytest.mark.parametrize(
    "name, function",
    [(f"FlashAttn{kind}Func", f"flash_attn_{low}func") for kind, low in (
        ("", ""), ("KVPacked", "kvpacked_"), ("QKVPacked", "qkvpacked_"), ("Varlen", "varlen_"),
        ("VarlenKVPacked", "varlen_kvpacked_"), ("VarlenQKVPacked", "varlen_qkvpacked_"),
    )],
)  # fmt: skip
def test_function_classes_apply(name, function):
    """Old clients call `FlashAttnFunc.apply(...)` with every argument, the last of them is_grad_enabled."""
    x, cu = torch.randn(9, 3, 2, 16, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    given = {"qkv": x, "kv": x[:, 1:], "q": x[:, 0], "k": x[:, 1], "v": x[:, 2]}
    if "varlen" not in function:
        given = {n: t[None] for n, t in given.items()}
    given |= dict(
        cu_seqlens=cu, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen=5, max_seqlen_q=5, max_seqlen_k=5
    )
    tail = {n: p for n, p in SIGNATURES[function].items() if p is not EMPTY} | dict(return_attn_probs=True)
    arguments = [given[n] if n in given else tail[n] for n in SIGNATURES[function]]
    apply = getattr(flash_attn_interface, name).apply
    want = getattr(flash_attn, function)(*arguments)
    for got, w in zip(apply(*arguments, True), want, strict=True):
        torch.testing.assert_close(got, w, rtol=0, atol=0)
    assert apply(*arguments)[0].requires_grad and not apply(*arguments, False)[0].requires_grad
    with pytest.raises(TypeError, match=f"{name}.apply takes at most"):
        apply(*arguments, True, True)


# What tests/test_flash_attn.py and tests/test_rotary.py of flash-attn 2.8.4 import.
IMPORTED = {
    "flash_attn": list(SIGNATURES),
    "flash_attn.bert_padding": ["pad_input", "unpad_input"],
    "flash_attn.flash_attn_interface": [
        "_get_block_size_n", "USE_TRITON_ROCM", "_flash_attn_varlen_forward", "flash_attn_gpu",
    ],
    "flash_attn.layers.rotary": [
        "apply_rotary_emb", "apply_rotary_emb_torch", "apply_rotary_emb_qkv_", "apply_rotary_emb_kv_",
    ],
    "flash_attn.losses.cross_entropy": ["CrossEntropyLoss"],
}  # fmt: skip


@pytest.mark.parametrize("module", IMPORTED)
def test_names_that_upstreams_tests_import(module):
    found = importlib.import_module(module)
    assert [name for name in IMPORTED[module] if not hasattr(found, name)] == []


def test_warmup_runs_each_problem_once(monkeypatch):
    from flash_attn.backends import cpu

    seen = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda problem, ops: seen.append(problem) or forward(problem, ops))
    problems = [cases.Case("a").problem(), cases.Case("b", causal=True).problem()]
    flash_attn.warmup(problems, backward=True)
    assert seen == problems
    with pytest.raises(flash_attn.ArgumentTypeError, match="must hold Problem, got str"):
        flash_attn.warmup(["a"])
