"""What a public call costs the host before a backend gets it: validation, description, dispatch, autograd.

The backend that would run the call is replaced by one that returns ready tensors, so that nothing else
is timed. A decode kernel takes less than 20 microseconds; the way to it must not take longer.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch

import flash_attn
from flash_attn import dispatch
from flash_attn.problem import Gradients
from flash_attn.validate import describe


class HostCost(NamedTuple):
    name: str
    median_us: float  # of the rounds; each round is a mean over many calls
    best_us: float


def measure(device: str = "cpu", calls: int = 2000, rounds: int = 9, whole: bool = False) -> list[HostCost]:
    """One row per kind of call, in microseconds from the public function to the backend and back.

    whole: run the backend too. On a GPU, where these small problems take the device less time than the
    host, and nothing waits for the device, that is the host time of a whole call.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = torch.randn(3, 2, 64, 4, 64, device=device, dtype=dtype).unbind(0)
    cu = torch.tensor([0, 64, 128], dtype=torch.int32, device=device)
    lengths = torch.tensor([60, 61], dtype=torch.int32, device=device)
    qf, kf, vf = (x.flatten(0, 1) for x in (q, k, v))
    qg, kg, vg = (x.clone().requires_grad_() for x in (q, k, v))
    one = q[:, :1].contiguous()
    func, varlen, cached = (
        flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache
    )  # fmt: skip
    kinds: dict[str, Callable[[], object]] = {
        "flash_attn_func": lambda: func(q, k, v, causal=True),
        "flash_attn_func, with gradient": lambda: func(qg, kg, vg, causal=True),
        "flash_attn_func, and backward": lambda: torch.autograd.backward(func(qg, kg, vg, causal=True), q),
        "flash_attn_varlen_func": lambda: varlen(qf, kf, vf, cu, cu, 64, 64, causal=True),
        "flash_attn_with_kvcache": lambda: cached(one, k, v, cache_seqlens=lengths, causal=True),
    }
    out, lse = torch.empty_like(q), torch.empty(2, 4, 64, device=device)
    ready = Gradients(*(torch.empty_like(x) for x in (q, k, v)))
    if whole:
        return [HostCost(name, *_time(call, calls, rounds)) for name, call in kinds.items()]
    backend = dispatch.select(describe(q, k, v, causal=True)[0])

    def forward(problem, ops):
        return out, lse

    def backward(problem, ops, out, lse, dout, dlse=None, into=(None, None, None)):
        return ready

    with (
        mock.patch.object(backend, "forward", forward),
        mock.patch.object(backend, "backward", backward),
        mock.patch.object(backend, "supports", lambda problem, direction: None),
    ):
        dispatch.forget()
        rows = [HostCost(name, *_time(call, calls, rounds)) for name, call in kinds.items()]
    dispatch.forget()
    return rows


def _time(call: Callable[[], object], calls: int, rounds: int) -> tuple[float, float]:
    """(median, best) microseconds per call."""
    for _ in range(calls // 10 + 1):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times), min(times)


if __name__ == "__main__":
    for whole in (False, True):
        print("whole call" if whole else "to the backend and back")
        for row in measure("cuda" if torch.cuda.is_available() else "cpu", whole=whole):
            print(f"  {row.name:32s} {row.median_us:7.1f} us (best {row.best_us:.1f})")
