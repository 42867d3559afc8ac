"""The page of a run: one HTML file that needs neither network nor script.

It must not know of HTTP or threads, nor how anything is drawn: it is given the pictures.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from client.answers import ModeRun, Stream
from client.checks import doubts, label
from client.metrics import APART, beside_the_server, summary
from client.shared.figures import REPEATS_SAID
from client.shared.tables import show
from client.tables import (
    LEGEND,
    MARKED,
    SIMULATED_LEGEND,
    SIMULATED_STREAMED,
    STREAMED,
    Grid,
    lag_lines,
    limits_said,
    overview,
    repeats,
    simulated,
    times,
    warnings,
)

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #16191d; --soft: #4a5158; --grid: #cfd5da; --warn: #fdf1e7;
        --apart: #a63c00 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111417; --ink: #eef1f4; --soft: #b3bcc4; --grid: #3a434b; --warn: #33220f; --apart: #ff9c6b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem }
h2 { margin: 3rem 0 0.2rem; border-top: 3px solid var(--ink); padding-top: 0.6rem }
h3 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem }
.scroll { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; white-space: nowrap }
td, th { padding: 0.15rem 0.55rem; text-align: right; border-bottom: 1px solid var(--grid) }
td:first-child, th:first-child { text-align: left; white-space: pre }
th { border-bottom: none; font-weight: 600 }
tr.head:last-of-type th { border-bottom: 2px solid var(--ink) }
.warning { border-left: 4px solid #d55e00; background: var(--warn); padding: 0.5rem 0.8rem }
.apart { font-weight: 700; color: var(--apart) } .quiet { color: var(--soft); font-size: 0.9rem } pre { white-space: pre-wrap }
"""


def page(streams: Sequence[Stream], about: str, told: Sequence[str], sections: Sequence[str]) -> str:
    names = ", ".join(stream.name for stream in streams)
    modes = ", ".join(dict.fromkeys(run.mode for stream in streams for run in stream.runs))
    several = len(streams) > 1
    runs = [run for stream in streams for run in stream.runs]
    headline = (_wrong(runs) or f"Arrivals {names}, in the modes {modes}") if several else _headline(runs)
    parts = [
        f"<h1>{escape(headline)}</h1>",
        f"<p class=quiet>{escape(about)}</p>",
        *(f"<p class=warning>{escape(line)}</p>" for line in told),
        *([_html(_across(streams), 2, bold=True)] if several else []),
        *sections,
    ]
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>BatchLab: {escape(modes)}</title>\n' + (
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def section(stream: Stream, limits: Mapping[str, float], shown: Sequence[tuple[str, bytes, bytes]]) -> str:
    """All of one plan."""
    runs, plan = stream.runs, stream.plan
    modes = ", ".join(run.mode for run in runs)
    images = [
        f"<h3>{escape(title)}</h3>\n"
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_png(dark)}">'
        f'<img alt="{escape(title)}, for the modes {escape(modes)}; the figures are in the tables" '
        f'src="{_png(light)}"></picture>'
        for title, light, dark in shown
    ]
    parts = [
        f"<h2>{escape(stream.name)}: {escape(_headline(runs))}</h2>" if stream.name else "",
        f"<p class=quiet>{escape(plan.made)}; the same requests in every mode</p>",
        *(f"<p class=warning>{escape(line)}</p>" for line in (*warnings(runs), *plan.notes)),
        _html(overview(runs), 2, bold=True),
        *([f"<p class=quiet>{escape(MARKED)}</p>"] if any(doubts(run) for run in runs) else []),
        f"<p class=quiet>{escape(SIMULATED_LEGEND if simulated(runs) else LEGEND)}</p>",
        *(f"<p class=quiet>{escape(line)}</p>" for line in _unrecorded(runs)),
        *([_html(repeats(runs), 2), f"<p class=quiet>{escape(REPEATS_SAID)}</p>"] if any(run.repeats for run in runs) else []),
        *images,
        "<h3>All times, in seconds</h3>",
        _html(times(runs, limits), 2, bold=True),
        f"<p class=quiet>Goodput: requests a second with {escape(limits_said(limits))}.</p>" if limits else "",
        f"<p class=quiet>{escape(SIMULATED_STREAMED if simulated(runs) else STREAMED)}</p>",
        *([] if simulated(runs) else _beside_parts(runs)),
        "<p class=quiet>Raw: results.csv (every request), results.json (everything)"
        + (", plan.json (the plan, for --plan)" if all(request.prompt for request in plan.requests) else "")
        + (f", in the folder {escape(stream.folder)}.</p>" if stream.name else ".</p>"),
    ]
    return "\n".join(part for part in parts if part)


def _beside_parts(runs: Sequence[ModeRun]) -> list[str]:
    like_with_like = (
        "Like with like: TTFT and E2EL since the actual send, beside the server's since the arrival (server TTFT). Bold: "
        f"more than {APART:.0%} apart. The client's times have HTTP and the network in them; the server's TTFT ends when the "
        "first token is computed."
    )
    return [
        "<h3>Beside the server's own figures</h3>",
        f"<p class=quiet>{escape(like_with_like)}</p>",
        _html(_beside(runs), 2, bold=True),
        *(f"<p class=quiet>{escape(line)}</p>" for line in lag_lines(runs)),
    ]


def _unrecorded(runs: Sequence[ModeRun]) -> list[str]:
    """From when on the steps of each mode are known, in a line; nothing where all are."""
    since = [f"{run.mode} {run.recorded_from_s:.1f} s" for run in runs if run.recorded_from_s]
    kept = max((len(run.steps or ()) for run in runs if run.recorded_from_s), default=0)
    if not since:
        return []
    return [
        f"The pictures of slots and queue have the newest {kept:,} steps of a mode; those before them are not recorded. "
        f"They begin at: {', '.join(since)}."
    ]


def _across(streams: Sequence[Stream]) -> Grid:
    """Every plan by every mode: throughput, and how long the unluckiest waited."""
    modes = list(dict.fromkeys(run.mode for stream in streams for run in stream.runs))
    head = ["output tokens/s", "E2EL p99, s"]
    grid = [["", *(cell for mode in modes for cell in (mode, ""))], ["arrivals", *head * len(modes)]]
    for stream in streams:
        found = {run.mode: summary(run, "all", {}) for run in stream.runs}
        marks = {run.mode: label(run).removeprefix(run.mode) for run in stream.runs}
        row = [stream.name]
        for mode in modes:
            one = found.get(mode)
            figures = [show(one["output_token_throughput"], 0), show(one["e2el"]["p99"], 2)] if one else ["-", "-"]
            row += [figure + marks.get(mode, "") for figure in figures]
        grid.append(row)
    return grid


def _wrong(runs: Sequence[ModeRun]) -> str:
    """That some modes' figures are not their own, in a sentence; nothing where all are."""
    modes = dict.fromkeys(run.mode for run in runs if doubts(run))
    return f"Do not compare: the figures of {', '.join(modes)} are not what the name says" if modes else ""


def _headline(runs: Sequence[ModeRun]) -> str:
    """The difference between the first and the best of the modes, in a sentence."""
    if wrong := _wrong(runs):
        return wrong
    rates = {run.mode: summary(run, "all", {})["output_token_throughput"] or 0.0 for run in runs}
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    if len(rates) < 2 or not rates[worst]:
        return f"{runs[0].mode}: {rates[runs[0].mode]:.0f} output tokens a second"
    ratio = rates[best] / rates[worst]
    if ratio < 1.1:
        return f"About the same throughput in {', '.join(rates)}: look at who waits"
    return f"{best} gives {ratio:.1f} times the output tokens per second of {worst}"


def _beside(runs: Sequence[ModeRun]) -> Grid:
    """A row a figure, three columns a mode; what disagrees ends with a mark."""
    by_mode = [{figure.name: figure for figure in beside_the_server(run)} for run in runs]
    names = list(dict.fromkeys(name for figures in by_mode for name in figures))
    grid = [
        ["", *(cell for run in runs for cell in (label(run), "", ""))],
        ["figure", *("client", "server", "apart") * len(runs)],
    ]
    for name in names:
        row = [name]
        for figures in by_mode:
            figure = figures.get(name)
            if figure is None:
                row += ["-"] * 3
            else:
                row += [
                    f"{figure.client:.4g}",
                    f"{figure.server:.4g}",
                    f"{figure.apart:+.1%}" + ("" if figure.agrees else " !"),
                ]
        grid.append(row)
    return grid


def _html(grid: Grid, heads: int, bold: bool = False) -> str:
    def cell(text: str) -> str:
        return f"<td class=apart>{escape(text)}</td>" if bold and text.endswith("!") else f"<td>{escape(text)}</td>"

    lines = ["<tr class=head>" + "".join(f"<th>{escape(text)}</th>" for text in row) + "</tr>" for row in grid[:heads]]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in grid[heads:]]
    return "<div class=scroll><table>\n" + "\n".join(lines) + "\n</table></div>"
