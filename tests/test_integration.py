"""The pieces together, on the CPU: training, checkpointing, padding, cached generation, threads."""

import copy
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.utils.testing import max_error


class Block(nn.Module):
    """One causal transformer layer; `attend` maps q, k, v (B, L, H, D) to (B, L, H, D)."""

    def __init__(self, attend, dim=32, heads=4, vocabulary=17):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.head(x + self.out(self.attend(q, k, v).flatten(2)))


def naive(q, k, v):
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v)


def flash(q, k, v):
    return flash_attn_func(q, k, v, causal=True)


def test_training_follows_the_curve_of_naive_attention():
    tokens = torch.randint(0, 17, (4, 65))
    models = [Block(flash).double(), Block(naive).double()]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    curves = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.5
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-9


def test_checkpointing_recomputes_with_the_same_dropout():
    q, k, v = (torch.randn(2, 33, 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(*inputs):
        return flash_attn_func(*inputs, dropout_p=0.4, causal=True)

    results = []
    for wrapped in (run, lambda *x: checkpoint(run, *x, use_reentrant=False)):
        torch.manual_seed(5)
        out = wrapped(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(run(q, k, v), results[0][0])


def test_dropout_keeps_the_mean():
    q, k, v = (torch.randn(1, 16, 2, 8, dtype=torch.float64) for _ in range(3))
    mean = torch.stack([flash_attn_func(q, k, v, dropout_p=0.3) for _ in range(400)]).mean(0)
    spread = 6 * v.abs().max() * math.sqrt(0.3 / 0.7 / 400)
    assert max_error(mean, flash_attn_func(q, k, v)) < spread


@pytest.mark.parametrize("causal", [False, True])
def test_unpadded_equals_padded(causal):
    """unpad -> varlen -> pad against the padded batch, gradients too."""
    lengths = torch.tensor([9, 1, 14])
    mask = torch.arange(14) < lengths[:, None]
    qkv = torch.randn(3, 14, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    packed, indices, cu, longest, _ = unpad_input(qkv, mask)
    q, k, v = packed.unbind(1)
    out = pad_input(flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal), indices, 3, 14)
    keep = mask[:, None, None, :]
    if causal:
        keep = keep & torch.ones(14, 14, dtype=torch.bool).tril()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    want = F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2) * mask[..., None, None]
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    dout = torch.randn_like(out)
    (got_grad,), (want_grad,) = (torch.autograd.grad(x, qkv, dout) for x in (out, want))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("Hk", [4, 1])
def test_cached_generation_equals_the_whole_sequence(Hk):
    B, L, H, D = 2, 21, 4, 16
    q = torch.randn(B, L, H, D, dtype=torch.float64)
    k, v = (torch.randn(B, L, Hk, D, dtype=torch.float64) for _ in range(2))
    want = flash_attn_func(q, k, v, causal=True)
    caches = [torch.full((B, 32, Hk, D), math.nan, dtype=torch.float64) for _ in range(2)]
    got, at = [], 0
    for step in (7, 1, 1, 5, 1, 6):  # a prompt, then tokens and chunks
        new = slice(at, at + step)
        lengths = torch.full((B,), at, dtype=torch.int32)
        got.append(
            flash_attn_with_kvcache(
                q[:, new], *caches, k[:, new], v[:, new], cache_seqlens=lengths, causal=True
            )
        )
        at += step
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-10, atol=1e-12)
    assert torch.equal(caches[0][:, :L], k) and caches[0][:, L:].isnan().all()


def test_packed_and_separate_forms_agree():
    qkv = torch.randn(2, 19, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    packed = flash_attn_qkvpacked_func(qkv, causal=True, window_size=(6, 0))
    separate = flash_attn_func(*qkv.unbind(2), causal=True, window_size=(6, 0))
    torch.testing.assert_close(packed, separate, rtol=0, atol=0)
    dout = torch.randn_like(packed)
    (a,), (b,) = (torch.autograd.grad(x, qkv, dout) for x in (packed, separate))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_threads_do_not_disturb_each_other():
    inputs = [[torch.randn(1, n, 2, 8, dtype=torch.float64) for _ in range(3)] for n in range(20, 60, 5)]
    want = [flash_attn_func(*x, window_size=(7, 2)) for x in inputs]
    got = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            got[i] = flash_attn_func(*inputs[i], window_size=(7, 2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


SHARDED = """
import copy, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_integration import Block, flash

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
plain = torch.nn.ModuleList([Block(flash), Block(flash)])
sharded = copy.deepcopy(plain)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
for block in sharded:
    fully_shard(block, mesh=mesh)
tokens, losses = torch.randint(0, 17, (2, 9)), []
for model in (plain, sharded):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    row = []
    for _ in range(3):
        loss = sum(block(tokens).square().mean() for block in model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        row.append(loss.item())
    losses.append(row)
dist.destroy_process_group()
assert losses[0] == losses[1] and losses[0][0] > losses[0][2], losses
print("equal")
"""


def test_sharded_training_equals_plain_training():
    """FSDP gathers and frees parameters in hooks round forward and backward; a group of one runs them all."""
    pytest.importorskip("torch.distributed.fsdp", reason="torch without distributed")
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]{SHARDED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_hooks_see_every_gradient_once():
    model = Block(flash)
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    model.out.register_full_backward_hook(lambda module, into, out: seen.append("module"))
    model(torch.randint(0, 17, (2, 9))).sum().backward()
    assert sorted(map(str, seen)) == sorted([*(str(id(p)) for p in model.parameters()), "module"])


def test_training_under_autocast():
    """Linear layers give bfloat16 to attention; parameters and their gradients stay float32."""
    model, tokens = Block(flash), torch.randint(0, 17, (2, 33))
    dtypes, grads = [], []
    model.attend = lambda q, k, v: dtypes.append(q.dtype) or flash(q, k, v)
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        grads.append(model.qkv.weight.grad.clone())
    assert dtypes == [torch.float32, torch.bfloat16] and grads[1].dtype == torch.float32
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()
