"""Compares every step with PyTorch and with a float64 reference: its error may be at most twice PyTorch's.

python -m learn.cuda.check_with_torch                     every step, on the GPU
python -m learn.cuda.check_with_torch --emulate           every step, on a CPU, by the emulator
python -m learn.cuda.check_with_torch step_07_mma --head-dim 128
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from flash_attn.reference.dropout import keep_mask
from learn.cuda import ladder

# (seqlen_q, seqlen_k, options): whole tiles, partial tiles, one row, no key at all
SHAPES = [(128, 128, {}), (100, 150, {}), (150, 100, {}), (1, 70, {}), (5, 0, {})]
CAUSAL = [(m, n, {"causal": True}) for m, n in ((128, 128), (100, 150), (150, 100))]
DROPOUT = [
    (100, 150, {"dropout_p": 0.3, "rng": (12345678901, 98765432109)}),
    (100, 100, {"dropout_p": 0.1, "rng": (7, 9), "causal": True}),
]


def reference(q, k, v, causal=False, dropout_p=0.0, rng=(0, 0)):
    """(out, lse) by the definition, in the precision of its arguments; rows without a key give 0 and -inf."""
    (b, m, h, d), n = q.shape, k.shape[1]
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * d**-0.5
    if causal:
        rows, cols = torch.arange(m, device=q.device), torch.arange(n, device=q.device)
        s = s.masked_fill(cols > rows[:, None] + n - m, -torch.inf)
    lse = torch.logsumexp(s, -1) if n else s.new_full((b, h, m), -torch.inf)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if dropout_p:
        ranges = torch.arange(b), torch.arange(h), range(m), range(n)
        p = p * keep_mask(torch.tensor(rng), dropout_p, *ranges, h).to(p.device) / (1 - dropout_p)
    return torch.einsum("bhmn,bnhd->bmhd", p, v), lse


def pytorch(q, k, v, causal=False, dropout_p=0.0, rng=(0, 0)):
    """What PyTorch gives in the precision of its arguments."""
    if dropout_p or not k.shape[1]:
        return reference(q, k, v, causal, dropout_p, rng)[0]
    m, n = q.shape[1], k.shape[1]
    mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m) if causal else None
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(
        1, 2
    )
    return out if mask is None else out.masked_fill(~mask.any(1)[None, :, None, None], 0.0)


def error(got, want) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return float((got.double() - want.double()).abs().nan_to_num(torch.inf).max()) if got.numel() else 0.0


def with_gradients(function, q, k, v, dout, options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def check(library, m, n, d, dtype, device, options, gradients=False, batch=2, heads=3):
    """Rows (name, error of the step, error of PyTorch) of one case."""
    q, k, v, dout = (torch.randn(batch, x, heads, d, device=device).to(dtype) for x in (m, n, n, m))
    out, lse = ladder.forward(library, q, k, v, **options)
    exact = [x.double() for x in (q, k, v)]
    if gradients:
        want = with_gradients(reference, *exact, dout, options)
        theirs = with_gradients(pytorch, q, k, v, dout, options)
        ours = [out, *ladder.backward(library, q, k, v, out, lse, dout, **options)]
    else:
        want, theirs, ours = [reference(*exact, **options)[0]], [pytorch(q, k, v, **options)], [out]
    rows = [
        (x, error(o, w), error(t, w))
        for x, o, w, t in zip(("out", "dq", "dk", "dv"), ours, want, theirs, strict=False)
    ]
    want_lse = reference(*exact, **options)[1]
    # fp32 arithmetic on numbers of this size; both -inf is no difference
    gap = torch.where(lse.double() == want_lse, 0.0, (lse.double() - want_lse).abs())
    rows.append(("lse", float(gap.nan_to_num(torch.inf).max()) if gap.numel() else 0.0, 2e-6))
    return rows


def passes(ours: float, theirs: float) -> bool:
    # 1e-6: a few rounding steps of float32, for results in which PyTorch happens to be exact
    return ours <= 2 * theirs + 1e-6


def workload(library, head_dim: int, device: str) -> tuple[list, list[int], list[torch.dtype], bool]:
    """What a step can do: (cases, head dims, dtypes, whether it has a backward)."""
    can = library.flash_can()
    cases = SHAPES + (CAUSAL if can & 8 else []) + (DROPOUT if can & 16 else [])
    any_dim = [32, 40, 64, 96, 128, 200, 256] if device == "cuda" else [40, 96]  # the emulator is slow
    dims = [head_dim] if library.flash_head_dim() else any_dim
    return cases, dims, [dtype for dtype, code in ladder.DTYPES.items() if can >> code & 1], bool(can & 32)


def check_step(step: str, library, head_dim: int, device: str) -> bool:
    """Prints the worst case of each result of a step; whether all pass."""
    cases, dims, dtypes, has_backward = workload(library, head_dim, device)
    good = True
    for dtype in dtypes:
        worst: dict[str, tuple[float, float, float, str]] = {}
        for d in dims:
            for m, n, options in cases:
                for name, ours, theirs in check(
                    library, m, n, d, dtype, device, options, has_backward and n > 0
                ):
                    good &= passes(ours, theirs)
                    share = ours / (2 * theirs + 1e-6)
                    where = f"M={m} N={n} D={d} {options or ''}"
                    worst[name] = max(worst.get(name, (-1.0, 0.0, 0.0, "")), (share, ours, theirs, where))
        for name, (share, ours, theirs, where) in worst.items():
            verdict = "ok" if share <= 1 else "WRONG"
            print(
                f"{step:24} {str(dtype)[6:]:9} {name:4} error {ours:.1e}, PyTorch {theirs:.1e}  {verdict}  {where}",
                flush=True,
            )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", default=ladder.steps())
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--emulate", action="store_true", help="run on a CPU, no GPU and no nvcc needed")
    parser.add_argument("--arch", default=ladder.gpu_arch(), help="GPU to compile for, like sm_90")
    words = parser.parse_args()
    device, arch = ("cpu", None) if words.emulate else ("cuda", words.arch)
    with ThreadPoolExecutor() as pool:  # the compilers run in their own processes
        paths = list(pool.map(lambda step: ladder.build(step, words.head_dim, arch), words.steps))
    torch.manual_seed(0)
    good = [
        check_step(s, ladder.load(p), words.head_dim, device) for s, p in zip(words.steps, paths, strict=True)
    ]
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
