"""What a run gave, as text for the terminal, CSV, JSON and one HTML page that needs neither network nor script.

It must not know of HTTP or threads: it reads finished answers and the server's /stats object, in which any key may be missing
or null. What the figures mean is metrics.py's; how they are drawn, plots.py's.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from client.answers import Answer, ModeRun, Stream
from client.metrics import APART, LATE_S, LATENCIES, STATISTICS, Figure, beside_the_server, lag, number, summary
from client.shared import schema

Grid = list[list[str]]

# ---- tables

HEADERS = (
    ("", "mode"),
    ("requests", "ok"),
    ("", "errors"),
    ("wall", "s"),
    ("output", "tokens/s"),
    ("", "requests/s"),
    ("latency s", "mean"),
    ("", "p50"),
    ("", "p99"),
    ("TTFT s", "p50"),
    ("", "p99"),
    ("batch", "mean size"),
    ("padding", "share"),
    ("", "preemptions"),
    ("", "errors by kind"),
)

LEGEND = (
    "latency: planned send to answer, seen from here. TTFT (time to first token): the server's own, from arrival.\n"
    "Per second means per wall-clock second, from the first planned send to the last answer."
)
STREAMED = (
    "Seen from here, in seconds: TTFT, first piece of text after the planned send; TPOT, per output token after the first;\n"
    "ITL, between pieces of text, all of them; E2EL, the whole answer after the planned send."
)
SIMULATED_LEGEND = (
    "latency: arrival to answer. TTFT (time to first token): from arrival.\n"
    "All seconds are virtual: rates are per virtual second, from time 0 to the last answer."
)
SIMULATED_STREAMED = (
    "From the arrival, in virtual seconds: TTFT, first token; TPOT, per output token after the first; ITL, between tokens,\n"
    "all of them; E2EL, the whole answer."
)


def table(runs: Sequence[ModeRun], limits: Mapping[str, float]) -> str:
    """One row per mode and, where deferred requests were sent, one more per priority; then the times of streamed answers and
    goodput where there are any; then how it all compares with the server's own figures."""
    simulated = _simulated(runs)
    legend, streamed = (SIMULATED_LEGEND, SIMULATED_STREAMED) if simulated else (LEGEND, STREAMED)
    parts = [_text(_overview(runs), 2, left={0, len(HEADERS) - 1}), legend, *_error_notes(runs)]
    if limits or any(answer.piece_times for run in runs for answer in run.answers):
        parts += ["", _text(_times(runs, limits), 2, left={0}), streamed]
        if limits:
            since = "arrival" if simulated else "planned send"
            parts.append(f"Goodput: requests a second with {_limits_said(limits)}, all of it from the {since}.")
    if not simulated:
        parts += ["", *_lag_lines(runs), *_agreement(runs)]
    return "\n".join(parts)


def warnings(runs: Sequence[ModeRun]) -> list[str]:
    """What makes a run's figures doubtful."""
    late = {run.mode: p99 for run in runs if (p99 := lag(run)["p99"] or 0.0) > LATE_S}
    if not late:
        return []
    worst = max(late, key=late.__getitem__)
    more = f"p99 {1e3 * late[worst]:.1f} ms after the plan{_worst(worst, late)}; more than {1e3 * LATE_S:.0f} is late"
    slow = "this machine or the way to the server was too slow for it"
    return [f"{_modes_said(late, runs)}: requests were sent late ({more}): {slow}"]


def _simulated(runs: Sequence[ModeRun]) -> bool:
    return all(run.simulated for run in runs)


def _modes_said(modes: Collection[str], runs: Sequence[ModeRun]) -> str:
    """Some of the runs' modes, by name; all of many, by their number."""
    return f"all {len(runs)} modes" if len(modes) == len(runs) > 3 else ", ".join(modes)


def _worst(mode: str, modes: Collection[str]) -> str:
    """Which of several modes a figure is of."""
    return f" in the worst of them, {mode}" if len(modes) > 1 else ""


def _overview(runs: Sequence[ModeRun]) -> Grid:
    rows = [_overview_row(run, group) for run in runs for group in run.groups]
    columns = len(HEADERS) if any(row[-1] for row in rows) else len(HEADERS) - 1
    head = [[header[line] for header in HEADERS] for line in (0, 1)]
    return [row[:columns] for row in head + rows]


def _overview_row(run: ModeRun, group: str) -> list[str]:
    found = summary(run, group, {})
    whole = group == "all"
    padding = number(run.stats, "padding_share")
    return [
        run.mode if whole else f"  {group}",
        str(found["ok"]),
        str(found["requests"] - found["ok"]),
        _show(run.wall_s, 2) if whole else "",
        _show(found["output_token_throughput"], 1),
        _show(found["request_throughput"], 2),
        _show(found["e2el"]["mean"], 2),
        _show(found["e2el"]["p50"], 2),
        _show(found["e2el"]["p99"], 2),
        _show(number(run.stats, "latency", group, "server_ttft", "p50"), 3),
        _show(number(run.stats, "latency", group, "server_ttft", "p99"), 3),
        _show(number(run.stats, "mean_batch_size"), 2) if whole else "",
        (f"{100 * padding:.1f} %" if padding is not None else "-") if whole else "",
        _show(number(run.stats, "preemptions"), 0) if whole else "",
        ", ".join(f"{count} x {kind}" for kind, count in found["errors"].items()),
    ]


def _times(runs: Sequence[ModeRun], limits: Mapping[str, float]) -> Grid:
    names = [("total", "tokens/s"), *([("", "goodput/s")] if limits else [])]
    names += [(LATENCIES[name] if s == "mean" else "", s) for name in LATENCIES for s in STATISTICS]
    grid = [["", *(name[0] for name in names)], ["mode", *(name[1] for name in names)]]
    for run in runs:
        for group in run.groups:
            found = summary(run, group, limits)
            row = [run.mode if group == "all" else f"  {group}", _show(found["total_token_throughput"], 1)]
            row += [_show(found["goodput"], 2)] if limits else []
            grid.append(row + [_show(found[name][s], 3) for name in LATENCIES for s in STATISTICS])
    return grid


def _text(grid: Grid, heads: int, left: set[int]) -> str:
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    lines = []
    for row in grid:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    lines.insert(heads, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def _error_notes(runs: Sequence[ModeRun]) -> list[str]:
    first: dict[str, str] = {}
    for run in runs:
        for answer in run.answers:
            if answer.error and answer.message:
                first.setdefault(answer.error, answer.message)
    return [f"{kind}: {message}" for kind, message in first.items()]


def _lag_lines(runs: Sequence[ModeRun]) -> list[str]:
    """How late the requests were sent, in a line: of the mode in which they were latest."""
    late = {run.mode: found for run in runs if (found := lag(run))["p99"] is not None}
    if not late:
        return []
    worst = max(late, key=lambda mode: late[mode]["p99"] or 0.0)
    p50, p99, most = (1e3 * (late[worst][name] or 0.0) for name in ("p50", "p99", "max"))
    times = f"sent {p50:.1f} ms (p50), {p99:.1f} ms (p99), at most {most:.1f} ms after plan{_worst(worst, late)}"
    return [f"{_modes_said(late, runs)}: {times}"]


def _agreement(runs: Sequence[ModeRun]) -> list[str]:
    """What the server measured otherwise: a line for the modes in which all agrees, and one for the others."""
    found = {run.mode: figures for run in runs if (figures := beside_the_server(run))}
    agree = {mode: figures for mode, figures in found.items() if all(figure.agrees for figure in figures)}
    differ = {mode: figures for mode, figures in found.items() if mode not in agree}
    lines = [f"{_modes_said(agree, runs)}: {_within(agree)}"] if agree else []
    if not differ:
        return lines
    furthest: dict[str, tuple[Figure, str]] = {}
    for mode, figures in differ.items():
        for figure in figures:
            before = furthest.get(figure.name)
            if not figure.agrees and (before is None or abs(figure.apart) > abs(before[0].apart)):
                furthest[figure.name] = figure, mode
    apart = [
        f"{f.name} {f.client:.4g}, the server's {f.server:.4g} ({f.apart:+.0%}{f', {mode}' if len(differ) > 1 else ''})"
        for f, mode in furthest.values()
    ]
    return [
        *lines,
        f"{_modes_said(differ, runs)}: {_within(differ)}; apart{', at worst' * (len(differ) > 1)}: {'; '.join(apart)}",
    ]


def _within(found: Mapping[str, Sequence[Figure]]) -> str:
    """How many of the figures agree, in the mode in which the fewest do."""
    agree, of = min((sum(figure.agrees for figure in figures), len(figures)) for figures in found.values())
    least = "at least " if len({sum(figure.agrees for figure in figures) for figures in found.values()}) > 1 else ""
    return f"{least}{agree} of {of} figures are within {APART:.0%} of the server's own"


def _limits_said(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{LATENCIES[name]} at most {value:g} s" for name, value in limits.items())


def _show(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "-"


# ---- files


def write_results(folder: Path, runs: Sequence[ModeRun]) -> str:
    """results.csv and latency.png; a line that says so. Raises OSError."""
    from client.plots import draw_latency  # matplotlib takes a second, which --help and a refused argument should not

    _write_csv(folder / "results.csv", runs)
    draw_latency(folder / "latency.png", runs)
    return f"every request: {folder / 'results.csv'}\nplot: {folder / 'latency.png'}"


def _write_csv(path: Path, runs: Sequence[ModeRun]) -> None:
    """One row per request and mode, in the order of the plan; times in seconds, an unknown one left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for run in runs:
            for answer in sorted(run.answers, key=lambda answer: answer.request.index):
                row = _csv_row(run.mode, answer)
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)


def _csv_row(mode: str, answer: Answer) -> dict[str, object]:
    request = answer.request
    good = not answer.error
    return {
        "mode": mode,
        "request": request.index,
        "priority": request.priority,
        "requested_tokens": request.num_tokens,
        "seed": request.seed,
        "planned_s": round(request.at_s, 6),
        "sent_s": round(answer.sent_s, 6),
        "answered_s": round(answer.done_s, 6),
        "answered_mode": answer.mode,
        "status": answer.error or "ok",
        "message": answer.message,
        "latency_s": round(answer.latency_s, 6) if good else None,
        "ttft_s": _rounded(answer.ttft_s) if good else None,
        "tpot_s": _rounded(answer.tpot_s) if good else None,
        "server_ttft_s": answer.server_ttft_s,
        "server_latency_s": answer.server_latency_s,
        "prompt_tokens": answer.prompt_tokens or request.prompt_tokens,
        "output_tokens": answer.tokens if good else None,
        "finish_reason": answer.finish_reason,
        "prompt": request.prompt,
        "completion": answer.completion,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


WITHOUT_STEPS = "the server has no step records (GET /steps), so that there is no timeline of its slots"
SIMULATED_WITHOUT_STEPS = (
    "These are several engines in virtual time, whose steps are not recorded: there is no timeline of their slots. The figures "
    "are of all of them together."
)


def write_report(folder: Path, streams: Sequence[Stream], limits: dict[str, float], about: str, stopped: str = "") -> str:
    """report.html, and for each stream its pictures and all figures in results.json; a line that says so. Raises OSError."""
    told = [stopped] if stopped else []
    runs = [run for stream in streams for run in stream.runs]
    if not any(run.steps for run in runs):
        told.append(SIMULATED_WITHOUT_STEPS if _simulated(runs) else WITHOUT_STEPS)
    sections = []
    for stream in streams:
        own = folder / stream.folder
        shown = _draw(own, stream, limits)
        (own / "results.json").write_text(json.dumps(_everything(stream, limits, about)), encoding="utf-8")
        sections.append(_section(stream, limits, shown))
    (folder / "report.html").write_text(_page(streams, about, told, sections), encoding="utf-8")
    return f"report: {folder / 'report.html'}"


def _draw(folder: Path, stream: Stream, limits: dict[str, float]) -> list[tuple[str, bytes]]:
    """Each picture's title and bytes."""
    from client.plots import draw_cdfs, draw_plan, draw_queue, draw_slots, draw_throughput

    runs, plan = stream.runs, stream.plan
    draw_throughput(folder / "throughput.png", runs, limits)
    draw_queue(folder / "queue.png", runs, plan)
    draw_cdfs(folder / "cdf.png", runs)
    draw_plan(folder / "plan.png", plan)
    titles = {
        "throughput": "Throughput: longer is better",
        "slots": "What each sequence slot did",
        "queue": "Who waits: queue and batch over time",
        "cdf": "How long requests took",
        "latency": "Latency against requested tokens",
        "plan": "The arrival plan",
    }
    if any(run.steps for run in runs):
        draw_slots(folder / "slots.png", runs)
    else:
        del titles["slots"]
    return [(title, (folder / f"{name}.png").read_bytes()) for name, title in titles.items()]


def _everything(stream: Stream, limits: dict[str, float], about: str) -> dict[str, Any]:
    return {
        "schema": schema.RESULTS,
        "about": about,
        "plan": stream.plan.made,
        "goodput_limits_s": limits,
        "modes": [
            {
                "mode": run.mode,
                "groups": {group: summary(run, group, limits) for group in run.groups},
                "lag_s": lag(run),
                "beside_the_server": [
                    vars(f) | {"agrees": f.agrees} for f in ([] if run.simulated else beside_the_server(run))
                ],
                "server_stats": run.stats,
                "answers": [
                    _csv_row(run.mode, answer) | {"piece_times_s": [round(t, 6) for t in answer.piece_times]}
                    for answer in sorted(run.answers, key=lambda answer: answer.request.index)
                ],
                "slots": run.slots,
                "steps": run.steps,
            }
            for run in stream.runs
        ],
    }


# ---- the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem } h2 { margin: 3rem 0 0.2rem; border-top: 3px solid #333; padding-top: 0.6rem }
h3 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem }
.scroll { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; white-space: nowrap }
td, th { padding: 0.15rem 0.55rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left; white-space: pre }
th { border-bottom: none; font-weight: 600 }
tr.head:last-of-type th { border-bottom: 2px solid #333 }
.warning { border-left: 4px solid #d55e00; background: #fdf1e7; padding: 0.5rem 0.8rem }
.apart { font-weight: 700; color: #a63c00 } .quiet { color: #555; font-size: 0.9rem } pre { white-space: pre-wrap }
"""


def _page(streams: Sequence[Stream], about: str, told: Sequence[str], sections: Sequence[str]) -> str:
    names = ", ".join(stream.name for stream in streams)
    modes = ", ".join(dict.fromkeys(run.mode for stream in streams for run in stream.runs))
    several = len(streams) > 1
    headline = f"Arrivals {names}, in the modes {modes}" if several else _headline(streams[0].runs)
    parts = [
        f"<h1>{escape(headline)}</h1>",
        f"<p class=quiet>{escape(about)}</p>",
        *(f"<p class=warning>{escape(line)}</p>" for line in told),
        *([_html(_across(streams), 2)] if several else []),
        *sections,
    ]
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>BatchLab: {escape(modes)}</title>\n' + (
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _section(stream: Stream, limits: Mapping[str, float], shown: Sequence[tuple[str, bytes]]) -> str:
    """All of one plan."""
    runs, plan = stream.runs, stream.plan
    modes = ", ".join(run.mode for run in runs)
    images = [
        f'<h3>{escape(title)}</h3>\n<img alt="{escape(title)}, for the modes {escape(modes)}; the figures are in the tables" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for title, data in shown
    ]
    parts = [
        f"<h2>{escape(stream.name)}: {escape(_headline(runs))}</h2>" if stream.name else "",
        f"<p class=quiet>{escape(plan.made)}; the same requests in every mode</p>",
        *(f"<p class=warning>{escape(line)}</p>" for line in (*warnings(runs), *plan.notes)),
        _html(_overview(runs), 2),
        *(f"<p class=quiet>{escape(line)}</p>" for line in _unrecorded(runs)),
        *images,
        "<h3>All times, in seconds</h3>",
        _html(_times(runs, limits), 2),
        f"<p class=quiet>Goodput: requests a second with {escape(_limits_said(limits))}.</p>" if limits else "",
        f"<p class=quiet>{escape(SIMULATED_STREAMED if _simulated(runs) else STREAMED)}</p>",
        *([] if _simulated(runs) else _beside_parts(runs)),
        "<p class=quiet>Raw: results.csv (every request), results.json (everything)"
        + (", plan.json (the plan, for --plan)" if all(request.prompt for request in plan.requests) else "")
        + (f", in the folder {escape(stream.folder)}.</p>" if stream.name else ".</p>"),
    ]
    return "\n".join(part for part in parts if part)


def _beside_parts(runs: Sequence[ModeRun]) -> list[str]:
    like_with_like = (
        "Like with like: times from the actual send (the server counts from the arrival), TPOT up to the last piece. Bold: "
        f"more than {APART:.0%} apart. The client's times have the network and HTTP in them."
    )
    return [
        "<h3>Beside the server's own figures</h3>",
        f"<p class=quiet>{escape(like_with_like)}</p>",
        _html(_beside(runs), 2, bold=True),
        *(f"<p class=quiet>{escape(line)}</p>" for line in _lag_lines(runs)),
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
        row = [stream.name]
        for mode in modes:
            one = found.get(mode)
            row += [_show(one["output_token_throughput"], 0), _show(one["e2el"]["p99"], 2)] if one else ["-", "-"]
        grid.append(row)
    return grid


def _headline(runs: Sequence[ModeRun]) -> str:
    """The difference between the first and the best of the modes, in a sentence."""
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
        ["", *(cell for run in runs for cell in (run.mode, "", ""))],
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
