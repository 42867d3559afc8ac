"""A picture of every shape of arrivals, for the README: each outer distribution over a uniform inner one, each inner one in
bins of the same size, and the three named bursts.

    python -m client.shapes docs/images/bursts.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from client.arrivals import BURSTS, INNER, OUTER, draw_arrivals, read_arrivals
from client.shared import style

COUNT, DURATION_S, BINS, BARS = 2000, 20.0, 20, 200
EVEN = "uniform:low=0.999,high=1.001"  # bins of the same size, to see what is inside


CAPTION = """Sends per moment of 2,000 requests within 20 seconds. Above, outer distributions: how many requests each part of
the time gets. In the middle, inner ones, of which three parts are shown: where within its part each lies. Below, the named
bursts."""


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m client.shapes FILE.png")
    draw(Path(sys.argv[1]))


@style.in_both_themes
def draw(path: Path) -> None:
    """All of them, a panel each."""
    rows = [
        [("outer " + name, f"{name}/uniform") for name in OUTER],
        [("inner " + name, f"{EVEN}/{name}") for name in INNER],
        [(f"{name}: {outer} over {inner}", name) for name, (outer, inner) in BURSTS.items()],
    ]
    figure = style.figure(14, 7, "The shapes of arrivals", CAPTION)
    parts: Any = figure.subfigures(len(rows), 1)
    for part, shapes in zip(parts, rows, strict=True):
        panels = part.subplots(1, len(shapes), sharey=True, squeeze=False).ravel()
        for panel, (title, text) in zip(panels, shapes, strict=True):
            times = draw_arrivals(read_arrivals(text), COUNT, DURATION_S, BINS, np.random.default_rng(1))
            # Inner shapes are seen in three of the bins.
            last_s = 3 * DURATION_S / BINS if title.startswith("inner") else DURATION_S
            panel.hist(times, bins=BARS // 2, range=(0, last_s), color=style.shades(3)[1])
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("seconds", fontsize=9)
        panels[0].set_ylabel(f"sends of {COUNT}", fontsize=9)
    style.save(figure, path)


if __name__ == "__main__":
    main()
