"""Small calls of every portable kernel and of the Hopper forward, for compute-sanitizer (docs/perf has what it said):

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 7 python tests/gpu/sanitize.py dense
compute-sanitizer --tool racecheck --error-exitcode 7 python tests/gpu/sanitize.py dense # packed, cache, rotary, hopper
"""

import itertools
import sys

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, use_backend
from flash_attn.layers.rotary import apply_rotary_emb

MAKE = dict(device="cuda", dtype=torch.bfloat16)
FEATURES = (dict(causal=True), dict(window_size=(60, 10)), dict(dropout_p=0.2))


def angles(rows, half):
    angle = torch.rand(rows, half, device="cuda") * 6.28
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def grads(out, *leaves):
    return torch.autograd.grad(out, leaves, torch.randn_like(out))


def dense():
    for head_dim, features in itertools.product((64, 128, 256), FEATURES):
        q, k, v = (torch.randn(2, 130, h, head_dim, **MAKE, requires_grad=True) for h in (4, 2, 2))
        out = flash_attn_func(q, k, v, **features)
        yield (head_dim, features), (out, *grads(out, q, k, v))


def packed():
    cu = torch.tensor([0, 70, 70, 71, 200], device="cuda", dtype=torch.int32)
    for head_dim, features in itertools.product((64, 128, 256), FEATURES):
        q, k, v = (torch.randn(200, h, head_dim, **MAKE, requires_grad=True) for h in (4, 2, 2))
        out = flash_attn_varlen_func(q, k, v, cu, cu, 129, 129, **features)
        yield (head_dim, features), (out, *grads(out, q, k, v))


def cache():
    """Decode with and without splits, on pages, after an append with rotary."""
    B, N = 3, 560
    lengths = torch.tensor([500, 3, 557], device="cuda", dtype=torch.int32)
    for page, splits, new in itertools.product((0, 16, 7), (1, 3), (0, 2)):
        shape = (B * N // page, page) if page else (B, N)
        k_cache, v_cache = torch.randn(2, *shape, 2, 64, **MAKE)
        table = torch.randperm(shape[0], device="cuda").int().view(B, -1) if page else None
        k, v = torch.randn(2, B, new, 2, 64, **MAKE) if new else (None, None)
        cos, sin = angles(N + 4, 16) if new else (None, None)
        out = flash_attn_with_kvcache(
            torch.randn(B, 2, 8, 64, **MAKE), k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin,
            cache_seqlens=lengths, block_table=table, causal=True, num_splits=splits,
        )  # fmt: skip
        yield (page, splits, new), (out,)


def rotary():
    for interleaved in (False, True):
        x = torch.randn(2, 37, 3, 64, **MAKE, requires_grad=True)
        offsets = torch.tensor([0, 5], device="cuda")
        out = apply_rotary_emb(x, *angles(50, 24), interleaved, seqlen_offsets=offsets)
        yield interleaved, (out, *grads(out, x))


def hopper():
    """The Hopper forward alone. racecheck does not know what its mbarriers order."""
    cu = torch.tensor([0, 70, 70, 71, 300], device="cuda", dtype=torch.int32)
    for head_dim, features in itertools.product((64, 128, 256), (dict(), *FEATURES[:2])):
        q, k, v = (torch.randn(300, h, head_dim, **MAKE) for h in (4, 2, 2))
        dense_out = flash_attn_func(q[None], k[None], v[None], **features)
        yield (head_dim, features), (dense_out, flash_attn_varlen_func(q, k, v, cu, cu, 229, 229, **features))


if __name__ == "__main__":
    torch.manual_seed(0)
    with use_backend("hopper" if sys.argv[1] == "hopper" else "triton"):
        for case, results in {f.__name__: f for f in (dense, packed, cache, rotary, hopper)}[sys.argv[1]]():
            torch.cuda.synchronize()
            assert all(x.isfinite().all() for x in results), case
            print(sys.argv[1], case, "ran")
