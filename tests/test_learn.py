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


def test_every_lesson_has_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from learn.pictures import PICTURES, draw

    assert sorted(PICTURES) == list(range(1, len(LESSONS) + 1))
    for number in PICTURES:
        assert draw(number, tmp_path).stat().st_size > 5000


def test_exercises_are_solvable_and_the_stubs_are_not_solved():
    from learn.exercises import check, solutions, stubs

    assert set(check.grade(solutions).values()) == {"solved"}
    assert set(check.grade(stubs).values()) == {"not started"}
    named = {name for name in vars(stubs) if getattr(vars(stubs)[name], "__module__", "") == stubs.__name__}
    assert named == set(check.CHECKS)


def test_a_wrong_answer_is_told_what_is_wrong():
    from types import SimpleNamespace

    import torch

    from learn.exercises import check

    wrong = SimpleNamespace(**{name: lambda *a: torch.zeros(1) for name in check.CHECKS})
    assert "solved" not in check.grade(wrong).values()
