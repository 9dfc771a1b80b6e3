"""Writes the measured figures of the README from result files, so that they cannot differ:

    python scripts/figures.py bench/results/forward-h200-fce30b0.json bench/results/backward-h200-fce30b0.json

makes docs/assets/speed.svg and the blocks between `<!-- figures: ... -->` and `<!-- /figures -->` in the pages below.
Without arguments it takes the files that README.md names. tests/test_docs.py compares.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "docs/assets/speed.svg"
BLOCK = re.compile(r"<!-- figures: (.*?) -->\n.*?<!-- /figures -->", re.DOTALL)
PEERS = {
    "ours": "this package",
    "fa4": "FlashAttention-4",
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
}
COLOURS = {"ours": "#c2410c", "fa4": "#1d4ed8", "fa3": "#60a5fa", "cudnn": "#15803d", "fa2": "#9ca3af"}
DIMS, LENGTHS = (64, 128, 256), (1024, 4096, 16384)

Cells = dict[tuple, dict[str, float]]  # (kind, D, causal, length) -> implementation -> TFLOP/s


def read(paths: list[Path]) -> tuple[Cells, dict]:
    """TFLOP/s of every cell, and the fields that all files share."""
    cells: Cells = {}
    meta: dict = {}
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        if meta and any(meta[name] != data["meta"][name] for name in ("gpu", "commit", "torch", "triton")):
            raise ValueError(f"{path.name} is of another run than {paths[0].name}")
        meta = data["meta"]
        for row in data["rows"]:
            if "tflops" in row:
                cell = (row["kind"], row["D"], row["causal"], row["M"])
                cells.setdefault(cell, {})[row["impl"]] = row["tflops"]
    return cells, meta


def share(found: dict[str, float]) -> str:
    """Speed of ours as a share of the best other."""
    return f"{found['ours'] / max(rate for name, rate in found.items() if name != 'ours'):.2f}"


def shares(cells: Cells, words: dict[str, str]) -> list[str]:
    """The README's table: a row a head dimension and mask, a column a direction and length."""
    names = [f"{words[kind]} {length // 1024}k" for kind in ("forward", "backward") for length in LENGTHS]
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for dim in DIMS:
        for causal in (False, True):
            row = [share(cells[kind, dim, causal, n]) for kind in ("forward", "backward") for n in LENGTHS]
            lines.append(f"| D = {dim}, {words['causal' if causal else 'full']} | {' | '.join(row)} |")
    return lines


def rates(cells: Cells, words: dict[str, str]) -> list[str]:
    """The log's table: TFLOP/s of everybody."""
    lines = [f"| | {' | '.join(PEERS.values())} |", "| --- |" + " --- |" * len(PEERS)]
    for (kind, dim, causal, length), found in cells.items():
        row = [f"{found[name]:.0f}" if name in found else "-" for name in PEERS]
        mask = words["causal" if causal else "full"]
        lines.append(f"| {words[kind]}, D = {dim}, {mask}, {length // 1024}k | {' | '.join(row)} |")
    return lines


ENGLISH = {"forward": "forward", "backward": "backward", "full": "full", "causal": "causal"}
CHINESE = {"forward": "前向", "backward": "反向", "full": "无掩码", "causal": "因果"}
CAPTION = {
    "README.md": "{date}, {gpu}, torch {torch}, triton {triton}, commit {commit}; bf16, 16k tokens, heads x D = 2048: "
    "speed as a share of the fastest other implementation in the same run (1.00 is equal).",
    "README.zh.md": "{date}，{gpu}，torch {torch}，triton {triton}，提交 {commit}；bf16，共 16k 个 token，"
    "头数 × D = 2048：速度与同一次运行中最快的其他实现之比（1.00 为持平）。",
    "docs/performance-log.md": "{date}, {gpu}, torch {torch}, triton {triton}, commit {commit}; bf16, 16k tokens, "
    "heads x D = 2048; TFLOP/s, where causal counts half of the operations.",
}
TABLES = {
    "README.md": (shares, ENGLISH),
    "README.zh.md": (shares, CHINESE),
    "docs/performance-log.md": (rates, ENGLISH),
}


def block(page: str, names: str) -> str:
    """The text between the marks, marks included; `names` are the result files, relative to the repository."""
    cells, meta = read([ROOT / name for name in names.split()])
    table, words = TABLES[page]
    body = [CAPTION[page].format(**meta), "", *table(cells, words)]
    return "\n".join([f"<!-- figures: {names} -->", *body, "<!-- /figures -->"])


def sources() -> str:
    found = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError("README.md has no figures block")
    return found[1]


def picture(names: str) -> str:
    """Causal attention, forward above backward, a panel a head dimension, a group of bars a sequence length."""
    cells, meta = read([ROOT / name for name in names.split()])
    top = max(max(found.values()) for found in cells.values())
    width, height, panel, bars = 900, 410, 280, 130
    text: list[str] = []
    for line, kind in enumerate(("forward", "backward")):
        for column, dim in enumerate(DIMS):
            left, base = 30 + column * (panel + 10), 208 + line * 178
            text.append(
                f'<text x="{left}" y="{base - bars - 12}" font-weight="bold">{kind}, D = {dim}, causal</text>'
            )
            text.append(f'<line x1="{left}" y1="{base}" x2="{left + panel - 20}" y2="{base}" stroke="#555"/>')
            for group, length in enumerate(LENGTHS):
                x = left + 4 + group * 88
                label = (
                    f'<text x="{x + 36}" y="{base + 14}" text-anchor="middle">{length // 1024}k tokens</text>'
                )
                text.append(label)
                for name in PEERS:
                    rate = cells[kind, dim, True, length].get(name)
                    if rate is None:
                        continue
                    tall = bars * rate / top
                    y, colour = base - tall, COLOURS[name]
                    text.append(f'<rect x="{x}" y="{y:.1f}" width="15" height="{tall:.1f}" fill="{colour}"/>')
                    label = f'<text x="{x + 7.5}" y="{y - 2:.1f}" font-size="7" text-anchor="middle">{rate:.0f}</text>'
                    text.append(label)
                    x += 16
    for index, (name, title) in enumerate(PEERS.items()):
        x = 30 + index * 130
        text.append(f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[name]}"/>')
        text.append(f'<text x="{x + 14}" y="39">{title}</text>')
    title = f"TFLOP/s on one {meta['gpu']}, bf16 (more is better)"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="11" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="30" y="18" font-size="14" font-weight="bold">{title}</text>',
            *text,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    names = " ".join(Path(name).resolve().relative_to(ROOT).as_posix() for name in sys.argv[1:]) or sources()
    for page in TABLES:
        path = ROOT / page
        path.write_text(
            BLOCK.sub(lambda _, page=page: block(page, names), path.read_text(encoding="utf-8")), "utf-8"
        )
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    (ROOT / PICTURE).write_text(picture(names), encoding="utf-8")


if __name__ == "__main__":
    main()
