"""A race times right results only, and says why another has no time."""

import pytest
import torch

from flash_attn.problem import Problem
from flash_attn.utils import race
from flash_attn.utils.peers import CPU_PEERS, OURS, CannotRun, Peer

SMALL = Problem(2, 4, 2, 64, 64, 32, 32, torch.float32, scale=32**-0.5, right=0)


def _refuse(p):
    raise CannotRun("never")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_times_right_results_and_says_why_others_have_none(direction):
    zeros = Peer("zeros", lambda p: lambda q, k, v: q * 0)
    rows = race.measure(SMALL, direction, (OURS, *CPU_PEERS, zeros, Peer("none", _refuse)), 0.01)
    assert [row["impl"] for row in rows] == ["ours", "torch-sdpa", "zeros", "none"]
    for row in rows[:2]:
        assert row["time_us"] > 0 and "note" not in row
        assert row["tflops"] == pytest.approx(race.work_flop(SMALL, direction) / row["time_us"] / 1e6)
    assert "time_us" not in rows[2] and rows[2]["note"].startswith("WrongResult")
    assert "time_us" not in rows[3] and rows[3]["note"] == "CannotRun: never"
