"""Measure our own kernels over shapes that differ in everything: rows for `flash-attn cost --validate`.

    python3 bench/cost_rows.py --check ok.json          correctness of every kind of call on small shapes
    python3 bench/cost_rows.py --time rows.json --ok ok.json

With --drawn SEED the shapes are random instead, and the rows held out: they judge the model and never calibrate it.
A kind of call that fails its check, or that a backend refuses, is left out and said so.
"""

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import time
import zlib

import torch

from flash_attn import dispatch
from flash_attn.cost.hardware import HARDWARE
from flash_attn.cost.tiles import tiles_of
from flash_attn.problem import Operands, Problem

CAUSAL, FULL = (None, 0), (None, None)


def shapes():
    """(kind, backend, B, H, Hk, M, N, D, (left, right), lens_k or None)."""
    found = []

    def add(kind, backend, B, H, Hk, M, D, mask, N=None, lens=None):
        found.append((kind, backend, B, H, Hk, M, N or M, D, mask, lens))

    for kind in ("forward", "backward"):
        for backend in ("hopper", "triton"):
            add(kind, backend, 32, 16, 16, 512, 128, CAUSAL)
            add(kind, backend, 32, 16, 16, 512, 128, FULL)
            add(kind, backend, 8, 16, 4, 2048, 128, CAUSAL)
            add(kind, backend, 4, 16, 16, 2048, 128, FULL)
            add(kind, backend, 2, 16, 8, 8192, 128, CAUSAL)
            add(kind, backend, 1, 8, 8, 32768, 128, CAUSAL)
            add(kind, backend, 1, 2, 2, 65536, 128, FULL)
            add(kind, backend, 2, 16, 16, 8192, 128, (1024, 0))
            add(kind, backend, 1, 16, 2, 16384, 128, (4096, 0))
            add(kind, backend, 4, 16, 16, 4096, 128, (256, 256))
            add(kind, backend, 16, 32, 32, 1024, 64, CAUSAL)
            add(kind, backend, 16, 32, 8, 1024, 64, FULL)
            add(kind, backend, 4, 32, 32, 4096, 64, CAUSAL)
            add(kind, backend, 2, 24, 24, 8192, 64, FULL)
            add(kind, backend, 1, 4, 4, 65536, 64, CAUSAL)
            add(kind, backend, 4, 32, 32, 4096, 64, (512, 0))
            add(kind, backend, 16, 8, 8, 1024, 256, CAUSAL)
            add(kind, backend, 8, 8, 8, 2048, 256, FULL)
            add(kind, backend, 2, 8, 2, 8192, 256, CAUSAL)
            add(kind, backend, 1, 4, 4, 16384, 256, FULL)
            add(kind, backend, 4, 8, 8, 4096, 256, (1024, 0))
            for D, H in ((64, 32), (128, 16), (256, 8)):
                add(kind, backend, 16, H, H, 1024, D, FULL if D > 64 else (256, 0))
                add(kind, backend, 3, H, H, 5120, D, CAUSAL)
                add(kind, backend, 1, H, H // 2, 12288, D, FULL)
                add(kind, backend, 1, H, H, 24576, D, (2048, 0))
                add(kind, backend, 40, H, H, 640, D, CAUSAL)
            # packed batches: many short, a few long, one giant
            add(kind, backend, 24, 16, 16, 2048, 128, CAUSAL, lens=tuple(range(128, 2048, 80)))
            add(kind, backend, 6, 32, 32, 4096, 64, FULL, lens=(4096, 3000, 2000, 1200, 700, 100))
            add(kind, backend, 9, 8, 8, 8192, 128, CAUSAL, lens=(8192, *(512,) * 8))
            add(kind, backend, 5, 8, 8, 3000, 256, CAUSAL, lens=(3000, 2500, 2000, 1500, 1000))
    for B, H, Hk, N, D in (
        (1, 32, 8, 8192, 128), (16, 32, 8, 8192, 128), (128, 32, 8, 4096, 128), (1, 64, 8, 131072, 128),
        (16, 32, 32, 4096, 128), (4, 32, 8, 2048, 128), (64, 32, 8, 1024, 128), (8, 16, 16, 16384, 64),
        (2, 32, 4, 32768, 64), (32, 8, 1, 8192, 256), (8, 64, 8, 32768, 128), (256, 32, 8, 512, 128),
    ):  # fmt: skip
        add("decode", "triton", B, H, Hk, 1, D, FULL, N)
    add("decode", "triton", 16, 32, 8, 4, 128, CAUSAL, 8192)
    add("decode", "triton", 8, 32, 8, 1, 128, FULL, 16384, tuple(range(2048, 16385, 2048)))
    add("decode", "triton", 32, 32, 8, 1, 128, FULL, 8192, tuple(range(256, 8193, 256)))
    add("decode", "triton", 16, 32, 8, 1, 128, (4095, 0), 32768)
    return found


def drawn(seed):
    """Shapes that nobody chose, of at most 5 TFLOP forward."""
    pick = random.Random(seed)
    found = []
    for kind in ("forward", "backward"):
        for backend in ("hopper", "triton"):
            for D in (64, 128, 256):
                for _ in range(4):
                    B = 0
                    while not B:
                        S = 8 * round(2 ** pick.uniform(6, 13))
                        Hk, groups = pick.choice((1, 2, 4, 8, 12)), pick.choice((1, 1, 2, 4))
                        B = round(min(2 ** pick.uniform(13, 16) / S, 1e12 / (Hk * groups * S * S * D)))
                    mask = pick.choice((FULL, CAUSAL, (round(2 ** pick.uniform(7, 12)), 0)))
                    lens = None
                    if B > 2 and pick.random() < 0.4:
                        lens = tuple(round(S * pick.uniform(0.1, 1)) for _ in range(B - 1)) + (S,)
                    found.append((kind, backend, B, Hk * groups, Hk, S, S, D, mask, lens))
    for _ in range(16):
        D, Hk, N = pick.choice((64, 128, 256)), pick.choice((1, 2, 4, 8)), round(2 ** pick.uniform(10, 16))
        B = max(1, min(256, int(2 ** pick.uniform(24, 29) / (N * Hk * D))))
        found.append(("decode", "triton", B, Hk * pick.choice((1, 4, 8)), Hk, 1, N, D, FULL, None))
    return found


def group(shape):
    """What decides whether a shape is correct: all shapes of a group run the same code."""
    kind, backend, _, H, Hk, _, _, D, (left, right), lens = shape
    mask = "window" if left is not None else "causal" if right == 0 else "full"
    return f"{kind} {backend} D{D} {mask} {'ragged' if lens else 'dense'}"


def build(shape, seed=0):
    """(problem, operands, dout) with fresh normal inputs on the GPU."""
    kind, _, B, H, Hk, M, N, D, (left, right), lens = shape
    g = torch.Generator("cuda").manual_seed(seed)
    packed = lens is not None and kind != "decode"

    def rand(*size):
        return torch.randn(*size, dtype=torch.bfloat16, device="cuda", generator=g)

    cu = used = None
    if packed:
        cu = torch.tensor([0, *lens], device="cuda").cumsum(0).to(torch.int32)
        total = sum(lens)
        q, k, v, dout = rand(total, H, D), rand(total, Hk, D), rand(total, Hk, D), rand(total, H, D)
    else:
        q, k, v, dout = rand(B, M, H, D), rand(B, N, Hk, D), rand(B, N, Hk, D), rand(B, M, H, D)
        used = torch.tensor(lens, device="cuda", dtype=torch.int32) if lens else None
    if M == 1:
        right = None
    problem = Problem(
        B, H, Hk, M, N, D, D, torch.bfloat16, "cuda", left=left, right=right, scale=D**-0.5,
        varlen_q=packed, varlen_k=packed, seqused_k=used is not None,
    )  # fmt: skip
    return problem, Operands(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=used), dout


def run(shape, problem, ops, saved=None):
    if shape[0] == "decode":
        from flash_attn.forward import decode

        if not decode.wants(problem):
            raise RuntimeError("the split kernel does not want this problem")
        return decode.forward(problem, ops)
    backend = dispatch.load(shape[1])
    reason = backend.supports(problem, "backward" if saved else "forward")
    if reason:
        raise RuntimeError(f"refused: {reason}")
    return backend.backward(problem, ops, *saved) if saved else backend.forward(problem, ops)


def reference(problem, ops, dout):
    """out, dq, dk, dv in fp32, sequence by sequence, from the definition."""
    q, k, v = (x.detach().float().requires_grad_() for x in (ops.q, ops.k, ops.v))
    outs = []
    for b in range(problem.batch):
        if problem.varlen_q:
            s, e = int(ops.cu_seqlens_q[b]), int(ops.cu_seqlens_q[b + 1])
            qb, kb, vb = q[s:e], k[s:e], v[s:e]
        else:
            n = int(ops.seqused_k[b]) if ops.seqused_k is not None else problem.max_k
            qb, kb, vb = q[b], k[b, :n], v[b, :n]
        kb, vb = (x.repeat_interleave(problem.group, 1) for x in (kb, vb))
        M, N = qb.shape[0], kb.shape[0]
        s = torch.einsum("mhd,nhd->hmn", qb, kb) * problem.scale
        diagonal = torch.arange(N, device="cuda")[None] - torch.arange(M, device="cuda")[:, None] - (N - M)
        hidden = torch.zeros(M, N, dtype=torch.bool, device="cuda")
        if problem.left is not None:
            hidden |= diagonal < -problem.left
        if problem.right is not None:
            hidden |= diagonal > problem.right
        outs.append(torch.einsum("hmn,nhd->mhd", s.masked_fill(hidden, -math.inf).softmax(-1), vb))
    out = torch.cat(outs) if problem.varlen_q else torch.stack(outs)
    out.backward(dout.float())
    return out.detach(), q.grad, k.grad, v.grad


def small(shape):
    kind, backend, B, H, Hk, M, N, D, (left, right), lens = shape
    left = None if left is None else min(left, 200)
    lens = None if lens is None else (704, 130, 333)
    m = M if kind == "decode" else 704  # multiples of 16 share the compiled kernel of the timed shapes
    n = 1120 if kind == "decode" and lens is None else 704
    return kind, backend, 3, 2 * (H // Hk), 2, m, n, D, (left, right and min(right, 100)), lens


def check(path, chosen, part, parts, only):
    """Groups whose name starts with `only`, each `parts`-th of them, and then the calls of a group that will be timed,
    so that they are compiled. What is done is in the file at once: a cut leaves the rest unchecked, not all. A CUDA
    error ends the process's usefulness, so run backends apart."""
    groups = {}
    for shape in chosen:
        if group(shape).startswith(only):
            groups.setdefault(group(shape), []).append(shape)
    report, ran = {}, []
    torch.backends.cuda.matmul.allow_tf32 = False
    for number, (name, members) in enumerate(groups.items(), 1):
        if number % parts != part:
            continue
        try:
            report[name] = verdict(members[0], number)
        except Exception as error:  # any failure of one kind of call must not hide the others
            report[name] = f"{type(error).__name__}: {str(error)[:200]}"
        print(name, report[name], flush=True)
        for shape in members if report[name] == "ok" else ():
            try:
                problem, ops, dout = build(shape)
                out, lse = run(shape, problem, ops)
                if shape[0] == "backward":
                    run(shape, problem, ops, (out, lse, dout))
                torch.cuda.synchronize()
                ran.append(repr(shape))
            except Exception as error:
                print("cannot run", shape, type(error).__name__, str(error)[:200], flush=True)
        with open(path, "w") as f:
            json.dump({"groups": report, "ran": ran}, f)


def verdict(shape, seed):
    """Whether a small call of the kind of `shape` agrees with fp32: "ok" or its errors."""
    problem, ops, dout = build(small(shape), seed)
    want = reference(problem, ops, dout)
    out, lse = run(shape, problem, ops)
    got = [out] if shape[0] != "backward" else run(shape, problem, ops, (out, lse, dout))[:3]
    want = want[:1] if shape[0] != "backward" else want[1:]
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    # bf16 inputs and P: 2^-8 relative rounding gives 2.5e-3 in norm; a wrong key or row gives far more
    return "ok" if max(errors) < 6e-3 else f"wrong: {errors}"


def captured(call):
    """`call` as a CUDA graph: what is timed is the device, not how fast Python fills its queue."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def measure(path, chosen, held_out, ok_paths, budget):
    from triton.testing import do_bench

    ok, ran = {}, set()
    for p in ok_paths:
        checked = json.loads(pathlib.Path(p).read_text())
        ok |= checked["groups"]
        ran.update(checked["ran"])
    rows, started, skipped = [], time.time(), {}
    order = sorted(chosen, key=lambda s: zlib.crc32(repr(s).encode()))  # what a cut leaves out is no pattern
    for shape in order:
        kind, backend, B, H, Hk, M, N, D, (left, right), lens = shape
        if ok.get(group(shape)) != "ok":
            skipped[group(shape)] = ok.get(group(shape), "not checked")
            continue
        if repr(shape) not in ran:
            skipped[str(shape)] = "not compiled by --check"
            continue
        if time.time() - started > budget:
            skipped["time"] = "budget spent"
            break
        try:
            problem, ops, dout = build(shape)
            saved = None
            if kind == "backward":
                out, lse = run(shape, problem, ops)
                saved = (out, lse, dout)
            graph = captured(functools.partial(run, shape, problem, ops, saved))
            q20, q50, q80 = do_bench(graph.replay, warmup=8, rep=20, quantiles=[0.2, 0.5, 0.8])
        except Exception as error:
            skipped[str(shape)] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        tiles = None
        if kind != "decode":
            tiles = [list(tile) for tile in tiles_of(problem, backend, kind, HARDWARE["h200"]) if tile]
        rows.append(
            dict(
                kind=kind, backend=backend, B=B, H=H, Hk=Hk, M=M, N=N, D=D, dtype="bfloat16",
                causal=right == 0 and left is None, left=left, right=right,
                lens_q=lens if kind != "decode" else None, lens_k=lens,
                time_us=round(q50 * 1e3, 3), p20_us=round(q20 * 1e3, 3), p80_us=round(q80 * 1e3, 3),
                tiles=tiles,
            )
        )  # fmt: skip
        print(f"{group(shape)} B{B} H{H}/{Hk} M{M} N{N}: {q50 * 1e3:.1f} us", flush=True)
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    meta = dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        commit=commit or os.environ.get("COMMIT", "unknown"),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        command=f"python3 bench/cost_rows.py --time{held_out}", held_out=bool(held_out),
        timing="CUDA graph, do_bench (cold L2)",
    )  # fmt: skip
    with open(path, "w") as f:
        f.write(
            '{"meta": ' + json.dumps(meta) + ',\n"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
        )
    print(f"{len(rows)} rows; skipped: {json.dumps(skipped, indent=1)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--only", default="", help="groups that start so, such as 'backward hopper'")
    parser.add_argument("--time")
    parser.add_argument("--ok", nargs="*", default=[])
    parser.add_argument("--budget", type=float, default=45)
    parser.add_argument(
        "--drawn", type=int, metavar="SEED", help="random shapes, held out of the calibration"
    )
    args = parser.parse_args()
    chosen = shapes() if args.drawn is None else drawn(args.drawn)
    if args.check:
        check(args.check, chosen, *map(int, args.part.split("/")), args.only)
    elif args.time:
        how = "" if args.drawn is None else f" --drawn {args.drawn}"
        measure(args.time, chosen, how, args.ok, args.budget)
    else:
        sys.exit(parser.format_help())
