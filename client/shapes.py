"""A picture of every shape of arrivals, for the README: each outer distribution over a uniform inner one, each inner one in
bins of the same size, and the three named bursts.

    python -m client.shapes docs/images/bursts.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from client.arrivals import BURSTS, INNER, OUTER, draw_arrivals, read_arrivals

COUNT, DURATION_S, BINS, BARS = 2000, 20.0, 20, 200
EVEN = "uniform:low=0.999,high=1.001"  # bins of the same size, to see what is inside


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m client.shapes FILE.png")
    rows = [
        [("outer " + name, f"{name}/uniform") for name in OUTER],
        [("inner " + name, f"{EVEN}/{name}") for name in INNER],
        [(f"{name}: {outer} over {inner}", name) for name, (outer, inner) in BURSTS.items()],
    ]
    figure = Figure(figsize=(14, 7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(len(rows), 1)
    for part, shapes in zip(parts, rows, strict=True):
        panels = part.subplots(1, len(shapes), sharey=True, squeeze=False).ravel()
        for panel, (title, text) in zip(panels, shapes, strict=True):
            times = draw_arrivals(read_arrivals(text), COUNT, DURATION_S, BINS, np.random.default_rng(1))
            # Inner shapes are seen in three of the bins.
            last_s = 3 * DURATION_S / BINS if title.startswith("inner") else DURATION_S
            panel.hist(times, bins=BARS // 2, range=(0, last_s), color="#0072B2")
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("seconds", fontsize=9)
        panels[0].set_ylabel(f"sends of {COUNT}", fontsize=9)
    figure.savefig(Path(sys.argv[1]), dpi=90)


if __name__ == "__main__":
    main()
