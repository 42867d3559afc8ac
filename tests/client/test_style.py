"""The one style of charts: its colours, and that every chart comes for light and for dark pages."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from batching.policies import POLICIES
from client.shared import style

CSS = Path(__file__).parents[2] / "api" / "dashboard" / "static" / "style.css"


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_mode_has_a_colour_of_its_own() -> None:
    assert set(style.MODES) == set(POLICIES)
    for place in (0, 1):
        colours = [pair[place] for pair in (*style.MODES.values(), *style.OWN)]
        assert all(
            max(abs(a - b) for a, b in zip(to_rgb(x), to_rgb(y), strict=True)) > 0.09 for x, y in combinations(colours, 2)
        )


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=lambda theme: theme.name)
def test_each_colour_stands_out_from_its_ground(theme: style.Theme) -> None:
    for pair in (*style.MODES.values(), *style.OWN):
        assert contrast(pair[theme.place], theme.ground) >= 3, pair
    assert contrast(theme.ink, theme.ground) >= 7
    assert contrast(theme.soft, theme.ground) >= 4.5
    assert contrast(theme.waste, theme.ground) >= 3


def test_the_dashboard_has_the_same_colours() -> None:
    light, dark = CSS.read_text(encoding="utf-8").split(':root[data-theme="dark"]')
    for place, part in enumerate((light, dark)):
        found = dict(re.findall(r"--(mode-[a-z]+|own-\d): (#[0-9a-f]{6});", part))
        wanted = {f"mode-{mode}": pair[place].lower() for mode, pair in style.MODES.items()}
        assert found == wanted | {f"own-{i}": pair[place].lower() for i, pair in enumerate(style.OWN)}


def test_a_policy_of_ones_own_always_has_the_same_colour() -> None:
    assert style.colour("shortest") == style.colour("shortest") in [pair[0] for pair in style.OWN]


def test_a_chart_is_drawn_for_light_and_for_dark(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    @style.in_both_themes
    def draw(path: Path) -> None:
        seen.append((path.name, style.colour("static")))
        style.save(style.figure(3, 2, "A title", "What to see."), path)

    draw(tmp_path / "chart.png")
    assert seen == [("chart.png", "#D55E00"), ("chart-dark.png", "#FF8A3D")]
    assert style.theme() is style.LIGHT, "as it was before"
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name, _ in seen)
