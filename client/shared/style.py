"""The one style of all charts: a colour stands for a mode everywhere (on the dashboard too, whose style.css has the same),
every chart has a title and a caption that says what to see, and is drawn for light and for dark pages.

matplotlib takes a second to import, so that this file is imported only where something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure

DPI = 120
TITLE, LINE = 0.4, 0.18  # inches: the title, a line of the caption
CHARACTERS_AN_INCH = 13.5  # of a caption

# By mode: on a light ground and on a dark one. Neighbours in a comparison differ in lightness as well as in hue.
MODES = {
    "nobatch": ("#6B7280", "#A7B0BD"),
    "static": ("#D55E00", "#FF8A3D"),
    "orca": ("#8A4FBF", "#C79BEA"),
    "dynamic": ("#0072B2", "#5AB0F0"),
    "mixed": ("#009E73", "#2FD0A0"),
    "sarathi": ("#C2408A", "#F58AC4"),
    "splitfuse": ("#7A7300", "#DAD24A"),
    "fastserve": ("#1295B5", "#7CDDF2"),
    "sequence": ("#A87000", "#F2BE4A"),
    "flover": ("#3E7D1F", "#8FDB6B"),
    "batchllm": ("#6B4226", "#C99A78"),
    "deadline": ("#3D3D9E", "#9C9CF5"),
}
OWN = (("#2F6F6B", "#86CFC9"), ("#9C5A6B", "#E0A5B4"), ("#4F7CAC", "#A9C7E8"))  # policies of one's own


@dataclass(frozen=True)
class Theme:
    """``ink`` is text and what is marked, ``soft`` what is said beside it, ``waste`` what was computed for nothing."""

    name: str
    place: int  # in the pairs above
    ground: str
    ink: str
    soft: str
    grid: str
    waste: str

    def file(self, path: Path) -> Path:
        """Where the chart that is asked for as ``path`` goes."""
        return path if self.place == 0 else path.with_name(f"{path.stem}-{self.name}{path.suffix}")


LIGHT = Theme("light", 0, "#FFFFFF", "#16191D", "#4A5158", "#CFD5DA", "#B3122A")
DARK = Theme("dark", 1, "#111417", "#EEF1F4", "#B3BCC4", "#3A434B", "#DB2450")
_now = LIGHT


def theme() -> Theme:
    """The one that is drawn for."""
    return _now


def colour(mode: str) -> str:
    """A mode's. Those of one's own have one each, always the same as far as there are enough."""
    pair = MODES.get(mode) or OWN[sum(map(ord, mode)) % len(OWN)]
    return pair[_now.place]


def tint(hue: str, share: float) -> str:
    """Mixed into the ground: 1 is the colour itself, 0 the ground."""
    red, green, blue = (share * c + (1 - share) * g for c, g in zip(to_rgb(hue), to_rgb(_now.ground), strict=True))
    return to_hex((red, green, blue))


def shades(count: int) -> list[str]:
    """For what is no mode: from the ink to near the ground."""
    return [tint(_now.ink, 0.9 - 0.7 * i / max(1, count - 1)) for i in range(count)]


def width(place: int, count: int) -> float:
    """Of the line of one of several runs: those drawn first are wider, so that one that is hidden behind others still shows."""
    return 1.6 + 0.6 * (count - 1 - place)


def in_both_themes(draw: Callable[..., None]) -> Callable[..., None]:
    """For a function whose first argument is the path of a chart: it is called once for each theme."""

    @wraps(draw)
    def drawn(path: Path, *args: Any, **more: Any) -> None:
        for one in (LIGHT, DARK):
            with _drawing(one):
                draw(one.file(path), *args, **more)

    return drawn


@contextmanager
def _drawing(one: Theme) -> Iterator[None]:
    global _now
    before, _now = _now, one
    lines = ("axes.edgecolor", "xtick.color", "ytick.color")
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor", "hatch.color")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = {"grid.color": one.grid, "axes.axisbelow": True, "legend.frameon": False}
    settings |= {"legend.facecolor": one.ground, "legend.edgecolor": one.grid, "legend.labelcolor": one.ink}
    settings |= dict.fromkeys(lines, one.soft) | dict.fromkeys(inks, one.ink) | dict.fromkeys(grounds, one.ground)
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    try:
        with matplotlib.rc_context(settings):
            yield
    finally:
        _now = before


def figure(width: float, height: float, title: str, caption: str) -> SubFigure:
    """The part to draw in, in inches, with the title above and the caption below it: what to see, in a sentence or two."""
    lines = fill(" ".join(caption.split()), int(width * CHARACTERS_AN_INCH))
    heights = (TITLE, height, 0.2 + LINE * (1 + lines.count("\n")))
    whole = Figure(figsize=(width, sum(heights)), layout="constrained")
    FigureCanvasAgg(whole)
    parts: Any = whole.subfigures(3, 1, height_ratios=heights)
    head, body, foot = parts
    head.text(0.5, 0.4, title, fontsize=13, fontweight="bold", ha="center", va="center")
    foot.text(0.01, 0.9, lines, fontsize=9.5, color=_now.soft, va="top")
    made: SubFigure = body
    return made


def save(made: SubFigure, path: Path) -> None:
    """The whole of which ``made`` is a part. Raises OSError."""
    made.figure.savefig(path, dpi=DPI)
