"""Every lesson runs, and checks itself."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "learn").glob("step_*.py"))


def test_the_ladder_has_no_missing_rung():
    assert [int(name.split("_")[1]) for name in LESSONS] == list(range(1, len(LESSONS) + 1))
    assert len(LESSONS) >= 15


@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson(lesson):
    if "triton" in lesson:
        pytest.importorskip("triton")
    # own process: a lesson sets what it needs (the Triton interpreter) before importing
    done = subprocess.run(
        [sys.executable, "-m", f"learn.{lesson}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a lesson says what it has shown"
