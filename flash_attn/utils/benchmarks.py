"""Time and peak extra memory of a call, on the CPU and on a GPU."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flash_attn.flash_attn_interface import flash_attn_func

MB = 2**20


class Measured(NamedTuple):
    time_ms: float  # median
    memory_mb: float  # 2^20 bytes


def measure(
    run: Callable[[], Any], device: str | torch.device, warmup: int = 3, repeats: int = 10
) -> Measured:
    """Median time of `run()` over `repeats` calls, after `warmup` calls, and its `peak_extra_mb`."""
    for _ in range(warmup):
        run()
    on_gpu = torch.device(device).type == "cuda"
    times = sorted(_gpu_ms(run) if on_gpu else _cpu_ms(run) for _ in range(repeats))
    return Measured(median(times), peak_extra_mb(run, device))


def _cpu_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _gpu_ms(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_extra_mb(run: Callable[[], Any], device: str | torch.device) -> float:
    """The most memory that `run()` holds at once beyond what was held before it, results included.

    It counts the tensors that torch allocates: on a GPU as `torch.cuda.max_memory_allocated` does, reset before; on
    the CPU every allocation and release that the profiler sees. Resident memory of the process would be no measure
    on the CPU: the C library keeps what was freed. What a matrix library takes for itself is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MB
    # acc_events only says that events are kept, which torch 2.11 else warns about
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    held = peak = 0
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MB


class FlashAttentionBenchmark:
    """Forward and backward of `flash_attn_func` on random self-attention inputs, float16, not causal."""

    def __init__(self, device: str = "cuda", warmup: int = 10, repeats: int = 100):
        self.device = device
        self.warmup = warmup
        self.repeats = repeats

    def _inputs(self, *shape: int) -> list[Tensor]:
        return [
            torch.randn(shape, device=self.device, dtype=torch.float16, requires_grad=True) for _ in range(3)
        ]

    def _report(self, run: Callable[[], Any]) -> dict[str, Any]:
        shape = run().shape
        measured = measure(run, self.device, self.warmup, self.repeats)
        return {
            "avg_time_ms": measured.time_ms,
            "memory_used_mb": measured.memory_mb,
            "output_shape": shape,
        }

    def benchmark_forward(
        self, batch_size: int, seq_len: int, num_heads: int, head_dim: int
    ) -> dict[str, Any]:
        """Forward without gradients.

        Returns:
            avg_time_ms: median of `repeats` calls, by events on a GPU. memory_used_mb: `peak_extra_mb` of one
            call: the output and what the call needs beside it, not the inputs. output_shape.
        """
        q, k, v = (x.detach() for x in self._inputs(batch_size, seq_len, num_heads, head_dim))
        return self._report(lambda: flash_attn_func(q, k, v))

    def benchmark_backward(
        self, batch_size: int, seq_len: int, num_heads: int, head_dim: int
    ) -> dict[str, Any]:
        """Backward alone: dq, dk and dv from a forward that was done before. Keys as in `benchmark_forward`."""
        inputs = self._inputs(batch_size, seq_len, num_heads, head_dim)
        out = cast(Tensor, flash_attn_func(*inputs))
        dout = torch.randn_like(out)
        return self._report(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)[0])
