"""A Llama block, eager and compiled: time of a training step, and the error of its gradients.

python -m bench.block    # prints one line a case; JSON with --json FILE
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn import flash_attn_func


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its formula, in the dtype of q; M = N."""
    group = q.shape[2] // k.shape[2]
    s = torch.einsum("bmhd,bnhd->bhmn", q * q.shape[-1] ** -0.5, k.repeat_interleave(group, 2))
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v.repeat_interleave(group, 2))


class Block(nn.Module):
    """Norm, grouped-query attention with rotary positions, norm, gated feed-forward; x (B, S, dim)."""

    def __init__(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], dim: int, heads: int, kv_heads: int
    ):
        super().__init__()
        self.attend, self.head_dim = attend, dim // heads
        narrow = kv_heads * self.head_dim
        self.q, self.k, self.v = (nn.Linear(dim, n, bias=False) for n in (dim, narrow, narrow))
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))
        x = x + self.out(self.attend(_rotated(q, cos, sin), _rotated(k, cos, sin), v).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def angles(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (S, 1, head_dim / 2)."""
    rate = 10000.0 ** -(torch.arange(0, head_dim, 2, device=like.device).double() / head_dim)
    turn = torch.outer(torch.arange(length, device=like.device).double(), rate)[:, None]
    return turn.cos().to(like.dtype), turn.sin().to(like.dtype)


def gradients(block: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor], dout: Tensor) -> list[Tensor]:
    """Of x and of every parameter."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(block(x, *positions), [x, *block.parameters()], dout))


def gradient_errors(
    dim: int = 1024, heads: int = 16, kv_heads: int = 4, length: int = 512
) -> dict[str, list[float]]:
    """Relative error (norm against fp64 with the same bf16 weights) of each gradient: {how: [x, parameters...]}."""
    torch.manual_seed(0)
    low = Block(ours, dim, heads, kv_heads).cuda().bfloat16()
    x, dout = (torch.randn(2, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    exact = copy.deepcopy(low).double()
    exact.attend = formula
    by_formula = copy.deepcopy(low)
    by_formula.attend = formula
    kinds = {
        "formula": by_formula, "eager": low, "aot_eager": torch.compile(low, fullgraph=True, backend="aot_eager"),
        "inductor": torch.compile(low, fullgraph=True, dynamic=True),
    }  # fmt: skip
    want = gradients(exact, x.double(), angles(length, low.head_dim, x.double()), dout.double())
    positions = angles(length, low.head_dim, x)
    return {
        name: [
            ((g.double() - w).norm() / w.norm()).item()
            for g, w in zip(gradients(block, x, positions, dout), want, strict=True)
        ]
        for name, block in kinds.items()
    }


def step_times(batch: int, length: int, dim: int = 2048, rounds: int = 9) -> dict[str, float]:
    """Milliseconds of forward and backward, the median of `rounds` in turns."""
    torch.manual_seed(0)
    steps = {}
    x, dout = (torch.randn(batch, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    positions = angles(length, dim // 16, x)
    for name, attend in (("ours", ours), ("sdpa", sdpa)):
        block = Block(attend, dim, 16, 4).cuda().bfloat16()
        for how, module in (
            ("eager", block),
            ("compiled", torch.compile(block, fullgraph=True, dynamic=True)),
        ):
            steps[f"{name} {how}"] = lambda m=module: gradients(m, x, positions, dout)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(5):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / 20 * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "errors": gradient_errors()}
    for how, errors in found["errors"].items():
        print(
            f"relative error of gradients, {how:10s} x {errors[0]:.2e}, parameters at most {max(errors[1:]):.2e}"
        )
    for batch, length in ((4, 512), (4, 2048)):
        times = found[f"step_ms {batch}x{length}"] = step_times(batch, length)
        print(f"B {batch} S {length}: " + ", ".join(f"{name} {t:.3f} ms" for name, t in times.items()))
    file = parser.parse_args().json
    if file:
        with open(file, "w") as f:
            json.dump(found, f, indent=1)


if __name__ == "__main__":
    main()
