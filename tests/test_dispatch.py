"""Which backend runs: order, reasons, forced choices, threads, devices."""

import threading

import cases
import pytest
import torch

import flash_attn
from flash_attn import dispatch
from flash_attn.dispatch import explain, select, use_backend
from flash_attn.errors import ArgumentValueError, UnsupportedError
from flash_attn.problem import Gradients
from flash_attn.utils import device

PROBLEM = cases.Case("plain").problem()


class Stub:
    """A backend that answers with its own name in every element."""

    def __init__(self, value: float, reason: str | None = None):
        self.value, self.reason, self.asked = value, reason, 0

    def supports(self, problem, direction):
        self.asked += 1
        return self.reason

    def forward(self, problem, ops):
        return torch.full_like(ops.q, self.value), torch.zeros(problem.batch, problem.heads, problem.max_q)

    def backward(self, problem, ops, out, lse, dout, dlse=None, into=(None, None, None)):
        return Gradients(*(torch.full_like(x, self.value) for x in ops[:3]))


@pytest.fixture
def stubs(monkeypatch, environment):
    """Backends first, second (in this order) and hidden (only by name), instead of the real ones."""
    made = {"first": Stub(1.0), "second": Stub(2.0), "hidden": Stub(3.0)}
    monkeypatch.setattr(dispatch, "BACKENDS", {"first": "", "second": ""})
    monkeypatch.setattr(dispatch, "FORCED_ONLY", {"hidden": ""})
    monkeypatch.setattr(dispatch, "load", lambda name: made[name])
    dispatch.forget()
    yield made
    dispatch.forget()


def test_the_first_that_can_runs(stubs):
    assert select(PROBLEM) is stubs["first"]
    stubs["first"].reason = "is busy"
    assert select(PROBLEM) is stubs["first"], "a choice is remembered"
    dispatch.forget()
    assert select(PROBLEM) is stubs["second"]


def test_a_remembered_choice_is_not_asked_for_again(stubs):
    for _ in range(3):
        select(PROBLEM)
    assert stubs["first"].asked == 1


def test_directions_are_chosen_apart(stubs):
    stubs["first"].supports = lambda problem, direction: "no backward" if direction == "backward" else None
    assert select(PROBLEM, "forward") is stubs["first"]
    assert select(PROBLEM, "backward") is stubs["second"]


def test_nobody_can(stubs):
    stubs["first"].reason, stubs["second"].reason = "is busy", "is old"
    with pytest.raises(
        UnsupportedError, match=r"no backend can run this forward: first: is busy; second: is old"
    ):
        select(PROBLEM)


def test_a_forced_backend_never_falls_back(stubs):
    stubs["second"].reason = "is old"
    with (
        use_backend("second"),
        pytest.raises(UnsupportedError, match="forced backend cannot run.*second: is old"),
    ):
        select(PROBLEM)
    with use_backend("hidden"):
        assert select(PROBLEM) is stubs["hidden"]
    assert select(PROBLEM) is stubs["first"]


def test_forcing_nests_and_ends_with_an_error(stubs):
    with use_backend("second"):
        with pytest.raises(KeyError), use_backend("hidden"):
            assert select(PROBLEM) is stubs["hidden"]
            raise KeyError
        assert select(PROBLEM) is stubs["second"]
    assert dispatch.forced_backend() is None


def test_forcing_by_environment(stubs, environment):
    environment("FLASH_ATTN_BACKEND", "second")
    assert select(PROBLEM) is stubs["second"]
    with use_backend("hidden"):
        assert select(PROBLEM) is stubs["hidden"]


def test_an_unknown_backend_is_refused(environment):
    with pytest.raises(ArgumentValueError, match="backend must be one of hopper, triton, cpu.*got 'gpu'"):
        use_backend("gpu").__enter__()
    environment("FLASH_ATTN_BACKEND", "gpu")
    with pytest.raises(ArgumentValueError, match="got 'gpu'"):
        select(PROBLEM)


def test_forcing_stays_in_its_thread(stubs):
    seen = {}
    with use_backend("second"):
        thread = threading.Thread(target=lambda: seen.update(other=select(PROBLEM)))
        thread.start()
        thread.join()
        assert select(PROBLEM) is stubs["second"]
    assert seen["other"] is stubs["first"]


def test_a_backward_runs_where_its_forward_was_told_to(stubs):
    """Autograd may call backward in another thread, and the block may have ended."""
    q = torch.zeros(1, 4, 2, 8, requires_grad=True)
    with use_backend("second"):
        out = flash_attn.flash_attn_func(q, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))
    assert out.eq(2.0).all()
    assert torch.autograd.grad(out.sum(), q)[0].eq(2.0).all()
    out = flash_attn.flash_attn_func(q, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))
    assert torch.autograd.grad(out.sum(), q)[0].eq(1.0).all()


def test_a_backward_may_need_the_name_that_its_forward_was_given(stubs):
    """Interpreted kernels run only when asked for by name; their backward behind the block was refused."""
    stubs["hidden"].supports = lambda problem, direction: (
        None if dispatch.forced_backend() == "hidden" else "only when asked for by name"
    )
    q = torch.zeros(1, 4, 2, 8, requires_grad=True)
    with use_backend("hidden"):
        out = flash_attn.flash_attn_func(q, q, q)
    torch.autograd.grad(out.sum(), q)


def test_the_choice_depends_on_the_device(stubs):
    """It used to be remembered by problem alone: a choice made for one GPU was kept for another."""
    problem = PROBLEM._replace(device="cuda")
    stubs["first"].supports = lambda problem, direction: (
        None if device.info() and device.info().capability >= (9, 0) else "needs sm_90"
    )
    with device.assume(device.KNOWN["h100"]):
        assert select(problem) is stubs["first"]
    with device.assume(device.KNOWN["a100"]):
        assert select(problem) is stubs["second"]


def test_explain_asks_everyone(stubs):
    stubs["first"].reason = "is busy"
    assert explain(PROBLEM) == [("first", "is busy"), ("second", None), ("hidden", None)]


def test_on_the_cpu_the_cpu_backend_runs():
    reasons = dict(explain(PROBLEM))
    assert select(PROBLEM).__name__ == "flash_attn.backends.cpu"
    assert reasons["cpu"] is None and reasons["hopper"] and reasons["triton"]
