"""What the benchmark reports is what happened."""

import time

import pytest
import torch

from flash_attn.utils.benchmarks import FlashAttentionBenchmark, measure, peak_extra_mb

MB = 2**20


def test_peak_counts_what_is_held_at_once():
    def run():
        a = torch.ones(8 * MB, dtype=torch.uint8)
        del a
        b = torch.ones(5 * MB, dtype=torch.uint8)
        c = torch.ones(6 * MB, dtype=torch.uint8)
        return b, c

    before = torch.ones(50 * MB, dtype=torch.uint8)  # neither inputs nor an earlier peak count
    assert peak_extra_mb(run, "cpu") == pytest.approx(11, abs=0.01)
    del before
    assert peak_extra_mb(run, "cpu") == pytest.approx(11, abs=0.01)


def test_time_is_that_of_one_call():
    measured = measure(lambda: time.sleep(0.02), "cpu", warmup=0, repeats=3)
    assert 20 <= measured.time_ms < 60


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_seed_keys_and_what_they_hold(direction):
    bench = FlashAttentionBenchmark("cpu", warmup=1, repeats=2)
    B, S, H, D = 1, 512, 4, 32
    result = getattr(bench, f"benchmark_{direction}")(B, S, H, D)
    assert set(result) == {"avg_time_ms", "memory_used_mb", "output_shape"}
    assert tuple(result["output_shape"]) == (B, S, H, D)
    assert result["avg_time_ms"] > 0
    tensor = B * S * H * D * 2 / MB
    outputs = 1 if direction == "forward" else 3
    # E4: the seed reported the peak of the whole process, whatever had been there before
    hold = torch.ones(200 * MB, dtype=torch.uint8)
    again = getattr(bench, f"benchmark_{direction}")(B, S, H, D)
    del hold
    assert outputs * tensor <= again["memory_used_mb"] == pytest.approx(result["memory_used_mb"], rel=0.05)
    assert again["memory_used_mb"] < 64
