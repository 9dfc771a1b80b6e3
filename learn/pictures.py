"""One picture a lesson, drawn from the lesson's own functions: `flash-attn learn draw N`."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

from learn import (
    step_01_softmax,
    step_02_standard_attention,
    step_03_online_softmax,
    step_04_tiling,
    step_07_masks,
    step_08_grouped_heads,
    step_15_hopper_kernel,
)


def softmax(axes) -> None:
    x = torch.linspace(0, 120, 200)
    scores = torch.stack([x, torch.zeros(200)], -1)
    axes.plot(x, step_01_softmax.naive_softmax(scores)[:, 0], "r.", label="naive (NaN from 89 on)")
    axes.plot(x, step_01_softmax.safe_softmax(scores)[0][:, 0], label="maximum subtracted")
    axes.set(xlabel="score (the other one is 0)", ylabel="softmax")


def score_memory(axes) -> None:
    lengths = [2**i for i in range(9, 18)]
    tensors, scores = zip(*(step_02_standard_attention.memory_mib(n) for n in lengths), strict=True)
    axes.loglog(lengths, tensors, label="Q, K, V, O", base=2)
    axes.loglog(lengths, scores, label="S and P", base=2)
    axes.set(xlabel="tokens", ylabel="MiB, one head of D = 64")


def online(axes) -> None:
    torch.manual_seed(0)
    scores, values = 2 * torch.randn(1, 64), torch.randn(64, 1)
    steps = range(1, 65)
    states = [
        step_03_online_softmax.run(step_03_online_softmax.online_softmax_update, scores[:, :n], values, 1)
        for n in steps
    ]
    axes.plot(steps, [float(m) for m, _, _ in states], label="running maximum m")
    axes.plot(steps, [float(l) for _, l, _ in states], label="running sum l")
    axes.plot(steps, [float(o / l) for _, l, o in states], label="output o / l")
    axes.axhline(
        float(torch.softmax(scores, -1) @ values), color="k", ls=":", label="softmax of the whole row"
    )
    axes.set(xlabel="keys seen")


def traffic(axes) -> None:
    blocks = [16, 32, 64, 128, 256]
    standard = step_04_tiling.standard_traffic(8192, 8192, 64) / 2**20
    axes.plot(
        blocks, [step_04_tiling.tiled_traffic(8192, 8192, 64, b) / 2**20 for b in blocks], "o-", label="tiled"
    )
    axes.axhline(standard, color="r", label="standard")
    axes.set(xlabel="queries a tile", ylabel="MiB moved, one head, 8192 tokens")


def loops(axes) -> None:
    """The order in which a program meets the tiles of S."""
    order = torch.arange(1, 33).reshape(4, 8)
    axes.imshow(order.numpy(), cmap="viridis", aspect="auto")
    for i in range(4):
        for j in range(8):
            axes.text(j, i, f"{j + 1}", color="w", ha="center", va="center")
    axes.set(xlabel="key tiles: one after the other", ylabel="query tiles: one program each")
    axes.set(xticks=range(8), yticks=range(4))


def backward_graph(axes) -> None:
    """What is computed from what in the backward pass."""
    places = {
        "Q, K": (0, 3), "lse": (0, 2), "V, dO": (0, 1), "dO, O": (0, 0), "P": (1, 2.5), "dP": (1, 1),
        "delta": (1, 0), "dV": (2, 3), "dS": (2, 1.2), "dQ": (3, 1.7), "dK": (3, 0.7),
    }  # fmt: skip
    edges = (
        ("Q, K:P lse:P V, dO:dP dO, O:delta P:dV P:dS dP:dS delta:dS dS:dQ dS:dK").replace(", ", ",_").split()
    )
    for edge in edges:
        start, end = (places[name.replace(",_", ", ")] for name in edge.split(":"))
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 18, "shrinkB": 18})
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", bbox={"boxstyle": "round", "fc": "w"})
    axes.set(xlim=(-0.5, 3.5), ylim=(-0.5, 3.5), xticks=[], yticks=[])


def bands(axes) -> None:
    keep = [step_07_masks.visible(24, 32, *band).float() for band in ((None, 0), (7, 0), (4, 4))]
    gap = torch.full((24, 2), float("nan"))
    axes.imshow(torch.cat([keep[0], gap, keep[1], gap, keep[2]], 1).numpy(), cmap="Blues")
    axes.set(xlabel="keys: causal | window of 8 | 4 to each side", ylabel="queries")


def caches(axes) -> None:
    tokens = [2**i for i in range(10, 18)]
    for heads in (32, 8, 1):
        sizes = [step_08_grouped_heads.cache_bytes(n, 32, heads, 128) / 2**30 for n in tokens]
        axes.loglog(tokens, sizes, "o-", label=f"{heads} key/value heads", base=2)
    axes.set(xlabel="tokens", ylabel="GiB of cache, 32 layers, D = 128")


def splits(axes) -> None:
    counts = range(1, 33)
    busy = [min(1.0, 8 * s / 132) for s in counts]
    axes.step(counts, busy, where="mid", label="share of 132 multiprocessors with work")
    axes.set(xlabel="splits of the keys (batch 1, 8 key/value heads)", ylim=(0, 1.05))


def pages(axes) -> None:
    owner = torch.tensor([[2, 0, 1, 1], [0, 2, 1, 0], [3, 0, 2, 3]])
    axes.imshow(owner.numpy(), cmap="Pastel1")
    for i in range(3):
        for j in range(4):
            name = "free" if owner[i, j] == 3 else f"seq. {owner[i, j]}"
            axes.text(j, i, f"page {4 * i + j}\n{name}", ha="center", va="center")
    axes.set(xticks=[], yticks=[])


def dropped(axes) -> None:
    from flash_attn.reference.dropout import keep_mask

    mask = keep_mask(torch.tensor([1, 2]), 0.2, 0, 0, range(48), range(96), 1)
    axes.imshow(mask.numpy(), cmap="gray")
    axes.set(xlabel="column", ylabel="row", title="white: kept, p = 0.2")


def accumulators(axes) -> None:
    torch.manual_seed(0)
    terms = torch.rand(8192, dtype=torch.float64) + 0.5
    exact = terms.cumsum(0)
    for dtype in (torch.float16, torch.float32):
        total, sums = torch.zeros((), dtype=dtype), []
        for term in terms.half().to(dtype):
            total = total + term  # rounded after every addition, as an accumulator of this type does
            sums.append(total.double())
        error = (torch.stack(sums) - exact).abs()
        axes.semilogy(
            range(16, 8193, 16), error[15::16], label=f"fp16 terms near 1, {str(dtype)[6:]} accumulator"
        )
    axes.set(xlabel="terms", ylabel="error of the sum")


def overhang(axes) -> None:
    """What the programs of lesson 13 load of a 40 x 16 tensor in tiles of 16 rows: the last one hangs over the edge."""
    rows = torch.arange(48)
    owner = (rows // 16).float()[:, None].expand(48, 16).clone()
    owner[rows >= 40] = float("nan")
    axes.imshow(owner.T.numpy(), cmap="Pastel1", vmax=8)
    for program in range(3):
        axes.text(16 * program + 7.5, 7.5, f"program {program}", ha="center")
    axes.axvline(39.5, color="r", label="end of the tensor: beyond it mask=False, other=0")
    axes.set(xlabel="rows = program_id * BLOCK_M + arange(BLOCK_M)", ylabel="dims = arange(D)")


def packed_rows(axes) -> None:
    """The three sequences of lesson 14, padded and packed."""
    lengths = (5, 12, 9)
    padded = torch.full((3, 26), float("nan"))
    for b, n in enumerate(lengths):
        padded[b, :n], padded[b, n:12] = b, 3
    packed = torch.repeat_interleave(torch.arange(3.0), torch.tensor(lengths))
    gap = torch.full((1, 26), float("nan"))
    axes.imshow(torch.cat([padded, gap, packed[None]]).numpy(), cmap="Pastel1", vmax=8)
    for start in (0, 5, 17, 26):
        axes.text(start - 0.5, 4.9, str(start), ha="center")
    axes.set(xticks=[], yticks=[0, 1, 2, 4], yticklabels=["padded: 0", "1", "2", "packed"])
    axes.set(xlabel="36 rows padded (violet: padding), 26 packed; below: cu_seqlens", ylim=(5.4, -0.6))


def overlap(axes) -> None:
    for i, d in enumerate((64, 128, 256)):
        matrix, special = step_15_hopper_kernel.cycles(d)
        axes.barh(2 * i, matrix, color="C0")
        axes.barh(2 * i, special, left=matrix, color="C1")
        axes.barh(2 * i + 0.8, max(matrix, special), color="C2")
        axes.text(10, 2 * i, f"D = {d}, one after the other", va="center", color="w")
        axes.text(10, 2 * i + 0.8, "overlapped", va="center", color="w")
    axes.set(xlabel="cycles a tile: products (blue), exps (orange), both at once (green)", yticks=[])


PICTURES = {
    1: softmax, 2: score_memory, 3: online, 4: traffic, 5: loops, 6: backward_graph, 7: bands, 8: caches, 9: splits,
    10: pages, 11: dropped, 12: accumulators, 13: overhang, 14: packed_rows, 15: overlap,
}  # fmt: skip


def draw(lesson: int, output: Path) -> Path:
    """Write lesson_<n>.png into `output`; returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    PICTURES[lesson](axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    path = output / f"lesson_{lesson:02}.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
