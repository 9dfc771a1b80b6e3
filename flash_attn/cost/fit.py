"""Find the constants of the kernel families from measured rows: `python -m flash_attn.cost.fit`.

Every second row of a family (in the order of its description, so that the choice does not depend on the file's order)
calibrates; the others are kept to validate.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flash_attn.cost import measured
from flash_attn.cost.kernels import AnyConstants, Constants, DecodeConstants, _stored, constants

START: dict[str, AnyConstants] = {
    "forward": Constants(0.8, 0.7, 2e-7, 1e-7, 1e-6),
    "backward": Constants(0.7, 1.5, 2e-7, 1e-7, 2e-6),
    "decode": DecodeConstants(0.88, 5e-7, 3e-6, 4e-6),
}
# Shares may pass 1: the data sheet states rates at 1.83 GHz, the clock goes to 1.98.
HIGHEST = {
    Constants: Constants(1.08, 6.0, 3e-6, 3e-6, 2e-5),
    DecodeConstants: DecodeConstants(1.0, 5e-6, 2e-5, 3e-5),
}
LOWEST = 0.02  # of the highest for shares; the others may vanish
ROUNDS = 40


def errors(rows: Sequence[measured.Row], c: AnyConstants) -> torch.Tensor:
    """log(predicted / measured) of every row."""
    return torch.tensor([math.log(row.predict(c).time_s / row.time_s) for row in rows], dtype=torch.float64)


def loss(rows: Sequence[measured.Row], c: AnyConstants) -> float:
    """Mean squared logarithm of predicted over measured; linear beyond 20 %, so that one outlier does not rule."""
    return _loss(errors(rows, c))


def _loss(e: torch.Tensor) -> float:
    size = e.abs()
    return torch.where(size < 0.2, size**2, 0.4 * size - 0.04).mean().item()


def fit(rows: Sequence[measured.Row], start: AnyConstants) -> AnyConstants:
    """The constants with the least loss, by damped Gauss-Newton steps inside their bounds."""
    kind = type(start)
    scale = torch.tensor(HIGHEST[kind], dtype=torch.float64)

    def at(x: torch.Tensor) -> AnyConstants:
        return kind(*(x * scale).tolist())

    x = torch.tensor(start, dtype=torch.float64) / scale
    e = errors(rows, at(x))
    damping, nudge = 1e-2, 1e-4
    for _ in range(ROUNDS):
        jacobian = torch.stack(
            [(errors(rows, at(x + nudge * unit)) - e) / nudge for unit in torch.eye(len(x)).double()], 1
        )
        weight = torch.where(e.abs() < 0.2, 1.0, 0.2 / e.abs().clamp(min=1e-9))
        normal = jacobian.T @ (weight[:, None] * jacobian)
        gradient = jacobian.T @ (weight * e)
        for _ in range(12):
            step = torch.linalg.solve(normal + damping * torch.eye(len(x)).double(), gradient)
            trial = (x - step).clamp(0.0, 1.0)
            trial[0] = trial[0].clamp(min=LOWEST)
            now = errors(rows, at(trial))
            if _loss(now) < _loss(e):
                x, e, damping = trial, now, damping / 3
                break
            damping *= 4
        else:
            break
    return at(x)


def calibration_half(rows: Sequence[measured.Row]) -> list[measured.Row]:
    """The rows of every second shape: both halves have all measurements of their shapes."""
    labels = sorted({row.label for row in rows if not row.held_out})[::2]
    return [row for row in rows if not row.held_out and row.label in labels]


def validation_half(rows: Sequence[measured.Row]) -> list[measured.Row]:
    """The rows of the other shapes and those that are held out."""
    labels = {row.label for row in calibration_half(rows)}
    return [row for row in rows if row.label not in labels]


def roles(rows: Sequence[measured.Row]) -> list[str]:
    """What each row is for: "calibrates", "validates", or "drawn" (held out, of a random shape)."""
    calibrating = {row.label for of_family in families(rows).values() for row in calibration_half(of_family)}
    return [
        "drawn" if row.held_out else "calibrates" if row.label in calibrating else "validates" for row in rows
    ]


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
