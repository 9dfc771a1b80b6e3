"""Find the constants of the kernel families from measured rows: `python -m flash_attn.cost.fit`.

Every second row of a family (in the order of its description, so that the choice does not depend on the file's order)
calibrates; the others are kept to validate.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flash_attn.cost import measured
from flash_attn.cost.kernels import Constants, _stored, constants

START = {
    "forward": Constants(0.8, 1.0, 2e-7, 1e-6, 5e-6),
    "backward": Constants(0.7, 2.0, 2e-7, 2e-6, 1e-5),
    "decode": Constants(0.85, 1.0, 5e-6, 5e-7, 5e-6),
}
LOWEST = Constants(0.05, 0.0, 0.0, 0.0, 1e-6)
HIGHEST = Constants(1.0, 6.0, 3e-6, 1e-5, 1.5e-5)


def loss(rows: Sequence[measured.Row], c: Constants) -> float:
    """Mean squared logarithm of predicted over measured; beyond a factor 1.5 it grows linearly, so that one
    outlier does not rule."""
    total = 0.0
    for row in rows:
        e = abs(math.log(row.predict(c).time_s / row.time_s))
        total += e * e if e < 0.4 else 0.8 * e - 0.16
    return total / len(rows)


def fit(rows: Sequence[measured.Row], start: Constants) -> Constants:
    """The constants with the least loss: a pattern search, each constant in steps of its own."""
    best, lowest = start, loss(rows, start)
    step = 0.25
    while step > 0.004:
        improved = False
        for i in range(len(best)):
            for factor in (1 + step, 1 / (1 + step)):
                value = max(best[i], 1e-3 * HIGHEST[i]) * factor
                value = min(max(value, LOWEST[i]), HIGHEST[i])
                trial = best._replace(**{Constants._fields[i]: value})
                if (now := loss(rows, trial)) < lowest:
                    best, lowest, improved = trial, now, True
        step = step if improved else step / 2
    return best


def calibration_half(rows: Sequence[measured.Row]) -> list[measured.Row]:
    return sorted(rows, key=lambda row: row.label)[::2]


def validation_half(rows: Sequence[measured.Row]) -> list[measured.Row]:
    return sorted(rows, key=lambda row: row.label)[1::2]


def families(rows: Sequence[measured.Row]) -> dict[str, list[measured.Row]]:
    found: dict[str, list[measured.Row]] = {}
    for row in rows:
        found.setdefault(row.family, []).append(row)
    return found


def main(argv: Sequence[str], report: Callable[[str], None] = print) -> None:
    paths = [Path(arg) for arg in argv] or measured.result_files()
    target = Path(__file__).parent / "data" / "kernels.json"
    stored = json.loads(target.read_text())
    for family, rows in sorted(families(measured.load(paths)).items()):
        chosen = calibration_half(rows)
        kind = family.split("/")[1]
        candidates = [START[kind]] + ([constants(*family.split("/"))] if family in _stored() else [])
        best = min((fit(chosen, start) for start in candidates), key=lambda c: loss(chosen, c))
        stored["families"][family] = {name: float(f"{value:.4g}") for name, value in best._asdict().items()}
        stored["provenance"][family] = {"rows": len(chosen), "files": sorted({row.source for row in chosen})}
        report(
            f"{family}: {len(chosen)} of {len(rows)} rows, rms error {math.sqrt(loss(chosen, best)):.1%}, {best}"
        )
    target.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
