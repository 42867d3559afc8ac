"""The picture of a simulated run. matplotlib takes a second to import, so that this file is imported only when one is drawn;
how the figures come about is `results.py`'s.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simulator.results import LATENCIES, Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
POINTS = 1000  # of a curve


def draw(path: Path, runs: Sequence[Run], about: str) -> None:
    """Throughput by mode, and what share of the requests (for ITL: of the gaps) took no longer than so much. Raises OSError."""
    figure = Figure(figsize=(13, 7.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).ravel()
    rates = (("output_token_throughput", "output tokens a second"), ("request_throughput", "requests a second"))
    found = [run.summary() for run in runs]
    for panel, (name, title) in zip(panels, rates, strict=False):
        sizes = [one[name] or 0.0 for one in found]
        bars = panel.barh([run.mode for run in runs], sizes, color=[_colour(i) for i in range(len(runs))])
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
                style = "-" if i < len(COLOURS) else "--"
                panel.plot(np.percentile(values, shares), shares / 100, style, color=_colour(i), label=run.mode, linewidth=2)
        panel.set(
            title=f"{title}: further left is faster", xlabel="milliseconds", ylabel="share that took no longer", ylim=(0, 1.02)
        )
        panel.locator_params(axis="x", nbins=6)
        if highest > 30 * lowest > 0:
            panel.set(xscale="log", xlim=(lowest * 0.7, highest * 1.3))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(alpha=0.25)
    panels[2].legend(loc="lower right")
    figure.suptitle(f"In virtual time: {about}", fontsize=12)
    figure.savefig(path, dpi=110)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
