"""Tables of results: a list of dicts that knows CSV, JSON and, when installed, pandas."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from flash_attn.errors import ArgumentValueError


class Table(list):
    """Rows with the same keys, in order; `table[i]` is a dict."""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self for key in row))

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise ArgumentValueError(f"column must be one of {', '.join(self.columns)}, got {name!r}")
        return [row.get(name) for row in self]

    def to_csv(self, path: str | Path | None = None) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self)
        return _write(path, text.getvalue())

    def to_json(self, path: str | Path | None = None) -> str:
        return _write(path, json.dumps(list(self), indent=1) + "\n")

    def to_pandas(self):
        """The same as a pandas.DataFrame; ImportError without pandas."""
        import pandas

        return pandas.DataFrame(list(self), columns=self.columns)


def _write(path: str | Path | None, text: str) -> str:
    if path is not None:
        Path(path).write_text(text)
    return text


def human(value: float, unit: str = "", base: int = 1000) -> str:
    """`value` with three digits and a prefix: 1.23 TFLOP, 512 MiB, 21.4 us."""
    if value == 0:
        return f"0 {unit}".strip()
    small, large = ("m", "u", "n", "p"), ("k", "M", "G", "T", "P", "E", "Z")
    size, prefix = abs(value), ""
    if size >= base:
        for prefix in large:  # noqa: B007
            size /= base
            if size < base:
                break
    elif size < 1:
        for prefix in small:  # noqa: B007
            size *= 1000
            if size >= 1:
                break
    prefix = prefix.upper() + "i" if base == 1024 and prefix else prefix
    return f"{'-' if value < 0 else ''}{size:.3g} {prefix}{unit}".strip()
