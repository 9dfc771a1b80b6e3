"""Grades learn/exercises/stubs.py: `flash-attn learn check`, or `python -m learn.exercises.check [--solutions]`."""

import sys
import traceback
from types import ModuleType

import torch

from learn.exercises import solutions, stubs
from learn.step_05_forward import flash_forward
from learn.step_07_masks import visible

close = torch.testing.assert_close


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check_safe_softmax(x: ModuleType) -> None:
    s = random(4, 9)
    close(x.safe_softmax(s), torch.softmax(s, -1))
    close(x.safe_softmax(s + 1000), torch.softmax(s, -1))


def check_score_bytes(x: ModuleType) -> None:
    assert x.score_bytes(2048, 96) == 3 * 2**30, "GPT-3's layer of 96 heads at 2048 tokens: 3 GiB"


def check_online_update(x: ModuleType) -> None:
    s, v = 5 * random(3, 20), random(20, 4)
    m, l, o = torch.full((3,), float("-inf"), dtype=s.dtype), s.new_zeros(3), s.new_zeros(3, 4)
    for j in range(0, 20, 6):
        m, l, o = x.online_update(m, l, o, s[:, j : j + 6], v[j : j + 6])
    close(o / l[:, None], torch.softmax(s, -1) @ v)
    close(m, s.amax(-1))


def check_tiled_reads(x: ModuleType) -> None:
    assert x.tiled_reads(128, 100, 64) == 200
    assert x.tiled_reads(130, 100, 64) == 300, "the last tile of queries is short, but it reads all keys"


def check_forward(x: ModuleType) -> None:
    for n in (1, 17, 32):
        q, k, v = random(5, 8), random(n, 8), random(n, 8)
        for got, want in zip(x.forward(q, k, v, 8), flash_forward(q, k, v), strict=True):
            close(got, want)
    out, lse = x.forward(q, k[:0], v[:0], 8)
    assert not out.isnan().any() and out.abs().max() == 0, "a row without keys gives 0"
    assert (lse == float("-inf")).all(), "and lse = -inf"


def check_backward(x: ModuleType) -> None:
    leaves = [random(n, 8).requires_grad_() for n in (6, 11, 11)]
    dout = random(6, 8)
    reference = torch.softmax(leaves[0] @ leaves[1].T * 8**-0.5, -1) @ leaves[2]
    want = torch.autograd.grad(reference, leaves, dout)
    q, k, v = (t.detach() for t in leaves)
    for got, expected in zip(x.backward(dout, q, k, v, *flash_forward(q, k, v)), want, strict=True):
        close(got, expected)


def check_causal_mask(x: ModuleType) -> None:
    for M, N in ((4, 4), (2, 5), (5, 2)):
        assert torch.equal(x.causal_mask(M, N), visible(M, N, None, 0)), (M, N)


def check_grouped(x: ModuleType) -> None:
    q, k, v = random(3, 4, 8), random(5, 2, 8), random(5, 2, 8)
    out = x.grouped(q, k, v)
    for h in range(4):
        close(out[:, h], flash_forward(q[:, h], k[:, h // 2], v[:, h // 2])[0])


def check_merge(x: ModuleType) -> None:
    q, k, v = random(3, 8), random(20, 8), random(20, 8)
    for cut in (6, 0, 20):
        parts = (*flash_forward(q, k[:cut], v[:cut]), *flash_forward(q, k[cut:], v[cut:]))
        for got, want in zip(x.merge(*parts), flash_forward(q, k, v), strict=True):
            close(got, want)


def check_read_page(x: ModuleType) -> None:
    pool, table = random(6, 4, 8), torch.tensor([5, 0, 3])
    close(x.read_page(pool, table, 9), pool[3, 1])


def check_window_tokens(x: ModuleType) -> None:
    for tokens, window in ((8, 3), (5, 5), (4, 9), (1, 1)):
        assert x.window_tokens(tokens, window) == int(visible(tokens, tokens, window - 1, 0).sum())


def check_expected_output(x: ModuleType) -> None:
    p, v = torch.softmax(random(3, 6), -1), random(6, 4)
    total = torch.zeros(3, 4, dtype=p.dtype)
    for bits in range(
        2**6
    ):  # all masks of one row: the rows are independent and share their columns' chances
        mask = torch.tensor([(bits >> i) & 1 for i in range(6)], dtype=p.dtype)
        chance = 0.75 ** mask.sum() * 0.25 ** (6 - mask.sum())
        total += chance * ((p * mask / 0.75) @ v)
    close(x.expected_output(p, v, 0.75), total)


def check_folded_exponent(x: ModuleType) -> None:
    s, m = random(3, 7), random(3)
    close(x.folded_exponent(s, m, 0.125), torch.exp(0.125 * (s - m[:, None])))


CHECKS = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def grade(answers: ModuleType) -> dict[str, str]:
    """Exercise -> "solved", "not started" or what is wrong."""
    results = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check(answers)
            results[name] = "solved"
        except NotImplementedError:
            results[name] = "not started"
        except Exception as error:  # whatever a learner's code raises is the answer to show
            where = traceback.extract_tb(error.__traceback__)[-1]
            lines = [line for line in str(error).splitlines() if line.strip()] or [where.line or ""]
            results[name] = (
                f"{type(error).__name__}: {' '.join(lines[:3])}"  # of tensors: how many differ, how much
            )
    return results


def main() -> int:
    results = grade(solutions if "--solutions" in sys.argv else stubs)
    for name, verdict in results.items():
        print(f"{name:<18} {verdict}")
    solved = sum(verdict == "solved" for verdict in results.values())
    print(f"{solved} of {len(results)} solved; the exercises are in learn/exercises/stubs.py")
    return 0 if solved == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
