"""The chart of a simulated run; how the figures come about is `results.py`'s. matplotlib takes a second to import, so that this
file is imported only when one is drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter

from client.shared import style
from client.shared.figures import LATENCIES
from simulator.results import Run

POINTS = 1000  # of a curve
CAPTION = """In virtual time, {}. Bars: longer is better. Curves: what share of the requests (for ITL: of the gaps between
tokens) took no longer than so much; further left is faster, and where a curve ends is what the unluckiest waited."""


@style.in_both_themes
def draw(path: Path, runs: Sequence[Run], about: str) -> None:
    """Throughput by mode, and what share of the requests (for ITL: of the gaps) took no longer than so much. Raises OSError."""
    figure = style.figure(13, 7.4, "Simulated: " + ", ".join(dict.fromkeys(run.mode for run in runs)), CAPTION.format(about))
    panels = figure.subplots(2, 3).ravel()
    rates = (("output_token_throughput", "output tokens a second"), ("request_throughput", "requests a second"))
    found = [run.summary() for run in runs]
    for panel, (name, title) in zip(panels, rates, strict=False):
        sizes = [one[name] or 0.0 for one in found]
        bars = panel.barh([run.mode for run in runs], sizes, color=[style.colour(run.mode) for run in runs])
        panel.bar_label(bars, fmt="%.4g", padding=4)
        panel.set(title=title, xlim=(0, max(sizes) * 1.2 or 1.0))
        panel.invert_yaxis()
    for panel, (name, title) in zip(panels[2:], LATENCIES.items(), strict=True):
        lowest, highest = np.inf, 0.0
        for i, run in enumerate(runs):
            values = 1e3 * run.columns.values(name)
            if len(values):
                lowest, highest = min(lowest, np.percentile(values, 2)), max(highest, values.max())
                shares = np.linspace(0, 100, POINTS)
                curve = np.percentile(values, shares)
                panel.plot(
                    curve, shares / 100, color=style.colour(run.mode), label=run.mode, linewidth=style.width(i, len(runs))
                )
        panel.set(title=title, xlabel="milliseconds", ylabel="share that took no longer", ylim=(0, 1.02))
        panel.locator_params(axis="x", nbins=6)
        if highest > 30 * lowest > 0:
            panel.set(xscale="log", xlim=(lowest * 0.7, highest * 1.3))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(True)
    panels[2].legend(loc="best", frameon=True)
    style.save(figure, path)
