"""Tables for the terminal and as CSV. It must not know what the numbers are of."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Grid = Sequence[Sequence[str]]


def show(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; a dash where there is none."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "-"


def text(rows: Grid, heads: int = 1, left: Collection[int] = (0,)) -> str:
    """Rows of cells with a line under the first ``heads`` of them; the columns of ``left`` are left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    lines.insert(heads, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line for each row under the names of the first one's values; None is left empty. Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


# ---- repeats


def middle(values: Sequence[float]) -> float:
    """The median."""
    return float(np.median(values))


def spread(values: Sequence[float]) -> float:
    """How far repeats are apart: the largest minus the smallest, as a share of their mean; 0 of a single one."""
    mean = sum(values) / len(values)
    return (max(values) - min(values)) / mean if mean else 0.0


def with_spread(values: Sequence[float], digits: int) -> str:
    """The median of repeats and how far they are apart, as in ``476.0 (3%)``; of one the number alone."""
    found = show(middle(values), digits) if values else "-"
    return f"{found} ({spread(values):.0%})" if len(values) > 1 else found
