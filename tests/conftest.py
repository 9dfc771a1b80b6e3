"""Fixtures that every test file shares."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import cases` also where pytest does not set the path

from flash_attn.utils import env


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def environment(monkeypatch):
    """Set environment variables of the package; they are read once, so forget what was read."""

    def forget():
        env.backend.cache_clear()
        env.check_values.cache_clear()

    def set_variable(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        forget()

    forget()
    yield set_variable
    monkeypatch.undo()
    forget()


@pytest.fixture
def reference_backend():
    """Run the test on the fp64 oracle."""
    from flash_attn import use_backend

    with use_backend("reference"):
        yield
