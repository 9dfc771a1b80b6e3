"""Repeated calls give the bits of calls that were never seen before, wherever their tensors lie."""

import pytest
import torch

pytest.importorskip("triton")
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, use_backend  # noqa: E402
from flash_attn.backends import hopper  # noqa: E402
from flash_attn.forward import hopper_launch  # noqa: E402
from flash_attn.utils import launcher, replay  # noqa: E402
from flash_attn.validate import describe  # noqa: E402

pytestmark = pytest.mark.gpu

# elements by which q, k, v and dout are moved from an aligned address; 8 are 16 bytes
ALIGNED = (0, 0, 0, 0)
MOVED = [(1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 8, 0), (0, 0, 0, 1), (4, 4, 4, 4), (8, 16, 24, 32)]
SHIFTS = [ALIGNED] * 4 + MOVED + [ALIGNED]


@pytest.fixture(autouse=True)
def _fresh():
    replay.forget()
    yield
    replay.forget()


def moved(shift, *shape):
    memory = torch.randn(torch.Size(shape).numel() + 64, device="cuda", dtype=torch.bfloat16)
    return memory[shift:][: torch.Size(shape).numel()].view(shape)


def poison():
    """Fill memory that is about to be handed out again."""
    for power in range(8, 22):
        torch.full((2**power,), float("nan"), device="cuda")


def anew(call):
    """call(), as if nothing had been seen before; recordings stay."""
    kept, seen = dict(replay._kept), set(replay._seen)
    replay.forget()
    result = call()
    replay._kept.update(kept)
    replay._seen.update(seen)
    return result


def recorded():
    return [x for x in replay._kept.values() if isinstance(x, replay.Launches)]


CASES = {
    "causal": (64, dict(causal=True), False),
    "full": (128, {}, False),
    "window": (128, dict(window_size=(40, 10)), False),
    "softcap": (64, dict(softcap=5.0), False),
    "packed": (64, dict(causal=True), True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_training_calls(backend, name):
    head_dim, options, packed = CASES[name]
    cu = torch.tensor([0, 100, 100, 256], dtype=torch.int32, device="cuda")
    q = torch.empty(1, 8, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    with use_backend(backend):
        reason = hopper.supports(describe(q, q, q)[0], "backward")
    if backend == "hopper" and reason:
        pytest.skip(reason)

    def run(q, k, v, dout):
        poison()
        if packed:
            out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, 160, 160, return_attn_probs=True, **options)
        else:
            out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        poison()
        return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

    for shifts in SHIFTS:
        lead = (256,) if packed else (2, 160)
        q, k, v, dout = (
            moved(shift, *lead, heads, head_dim) for shift, heads in zip(shifts, (8, 4, 4, 8), strict=True)
        )
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with use_backend(backend):
            got = run(q, k, v, dout)
            want = anew(lambda: run(q, k, v, dout))  # noqa: B023
        for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            if backend == "hopper" and what == "dq":  # summed in any order
                torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2)
            else:
                assert torch.equal(a, b), (what, shifts)
    assert len(recorded()) == 2


@pytest.mark.parametrize("rotary", [None, "halves", "pairs"])
@pytest.mark.parametrize("paged", [False, True])
def test_cache_calls(paged, rotary):
    table = None
    for shift in (0, 0, 0, 0, 1, 8, 0):
        k_cache, v_cache = (torch.randn(3, 512, 4, 64, device="cuda").bfloat16() for _ in range(2))
        if paged:
            k_cache, v_cache = k_cache.view(96, 16, 4, 64), v_cache.view(96, 16, 4, 64)
            table = torch.randperm(96, device="cuda").view(3, 32).int()
        q, k, v = moved(shift, 3, 2, 8, 64), moved(0, 3, 2, 4, 64), moved(shift, 3, 2, 4, 64)
        angles = [torch.rand(512, 32, device="cuda").bfloat16() if rotary else None for _ in range(2)]
        lengths = torch.randint(0, 500, (3,), device="cuda").int()

        def run(k_cache, v_cache, q=q, k=k, v=v, angles=angles, lengths=lengths, table=table):
            k_cache, v_cache = k_cache.clone(), v_cache.clone()
            poison()
            out = flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, *angles, lengths, block_table=table, causal=True,
                rotary_interleaved=rotary == "pairs", return_softmax_lse=True,
            )  # fmt: skip
            return *out, k_cache, v_cache

        got = run(k_cache, v_cache)
        for a, b in zip(got, anew(lambda: run(k_cache, v_cache)), strict=True):  # noqa: B023
            assert torch.equal(a, b), shift
    assert len(recorded()) == 1  # the append and the attention together


def test_calls_of_tritons_own_launcher_repeat_too(monkeypatch):
    """As with a Triton whose launcher has no shortcut here."""
    monkeypatch.setattr(launcher, "shortcut", lambda run: None)
    monkeypatch.setattr(launcher, "_cache", {})
    monkeypatch.setattr(hopper_launch, "_ready", {})
    q, k, v = (torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = flash_attn_func(q, k, v, causal=True)
    for _ in range(4):
        assert torch.equal(flash_attn_func(q.clone(), k.clone(), v.clone(), causal=True), want)
    (launches,) = recorded()
    assert [type(step.launch).__name__ for step in launches.steps] == ["CudaLauncher"]
