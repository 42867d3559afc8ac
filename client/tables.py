"""The tables of a run as text for the terminal, and what is said below them.

It must not know of HTTP or HTML: it reads finished answers and the server's /stats object, in which any key may be missing or
null. What the figures mean is metrics.py's and docs/glossary.md's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from client.answers import ModeRun, each_of
from client.checks import MARK, doubts, label
from client.metrics import APART, LATE_S, Figure, beside_the_server, lag, number, summary
from client.shared import figures
from client.shared.figures import LATENCIES, REPEATS_SAID, STATISTICS
from client.shared.tables import show, text

Grid = list[list[str]]

HEADERS = (
    ("", "mode"),
    ("requests", "ok"),
    ("", "errors"),
    ("wall", "s"),
    ("output", "tokens/s"),
    ("", "requests/s"),
    ("E2EL s", "mean"),
    ("", "p50"),
    ("", "p99"),
    ("server s", "TTFT p50"),
    ("", "TTFT p99"),
    ("batch", "mean size"),
    ("padding", "share"),
    ("", "preemptions"),
    ("", "errors by kind"),
)

LEGEND = (
    "E2EL (end-to-end latency): planned send to answer, seen from here. Server TTFT (time to first token): from arrival there\n"
    "to the first token computed. Per second: per wall-clock second, from the first planned send to the last answer."
)
STREAMED = (
    "Seen from here, in seconds: TTFT, first piece of text after the planned send; TPOT, per output token after the first, up\n"
    "to the last piece; ITL, between pieces of text, all of them; E2EL, the whole answer after the planned send."
)
MARKED = f"{MARK.strip()} the figures of this mode are not what its name says: see the warnings."
SIMULATED_LEGEND = (
    "E2EL (end-to-end latency): arrival to answer. TTFT (time to first token): from arrival.\n"
    "All seconds are virtual: rates are per virtual second, from the first arrival to the last answer."
)
SIMULATED_STREAMED = (
    "From the arrival, in virtual seconds: TTFT, first token; TPOT, per output token after the first, up to the last; ITL,\n"
    "between tokens, all of them; E2EL, the whole answer."
)


def table(runs: Sequence[ModeRun], limits: Mapping[str, float]) -> str:
    """One row per mode and, where deferred requests were sent, one more per priority; then the times of streamed answers and
    goodput where there are any; then how it all compares with the server's own figures."""
    virtual = simulated(runs)
    legend, streamed = (SIMULATED_LEGEND, SIMULATED_STREAMED) if virtual else (LEGEND, STREAMED)
    marked = [MARKED] if any(doubts(run) for run in runs) else []
    parts = [text(overview(runs), 2, left={0, len(HEADERS) - 1}), *marked, legend, *_error_notes(runs)]
    if any(run.repeats for run in runs):
        parts += ["", text(repeats(runs), 2), REPEATS_SAID]
    if limits or any(answer.piece_times for run in runs for answer in run.answers):
        parts += ["", text(times(runs, limits), 2, left={0}), streamed]
        if limits:
            since = "arrival" if virtual else "planned send"
            parts.append(f"Goodput: requests a second with {limits_said(limits)}, all of it from the {since}.")
    if not virtual:
        parts += ["", *lag_lines(runs), *_agreement(runs)]
    return "\n".join(parts)


def warnings(runs: Sequence[ModeRun]) -> list[str]:
    """What makes the runs' figures doubtful: that they are not what the mode's name says, and requests sent late."""
    wrong = list(dict.fromkeys(f"{run.mode}: {doubt}" for run in each_of(runs) for doubt in doubts(run)))
    late = {run.mode: p99 for run in runs if (p99 := lag(run)["p99"] or 0.0) > LATE_S}
    if not late:
        return wrong
    worst = max(late, key=late.__getitem__)
    more = f"p99 {1e3 * late[worst]:.1f} ms after the plan{_worst(worst, late)}; more than {1e3 * LATE_S:.0f} is late"
    slow = "this machine or the way to the server was too slow for it"
    return [*wrong, f"{_modes_said(late, runs)}: requests were sent late ({more}): {slow}"]


def simulated(runs: Sequence[ModeRun]) -> bool:
    """Whether all of them are the simulator's."""
    return all(run.simulated for run in runs)


def _modes_said(modes: Collection[str], runs: Sequence[ModeRun]) -> str:
    """Some of the runs' modes, by name; all of many, by their number."""
    return f"all {len(runs)} modes" if len(modes) == len(runs) > 3 else ", ".join(modes)


def _worst(mode: str, modes: Collection[str]) -> str:
    """Which of several modes a figure is of."""
    return f" in the worst of them, {mode}" if len(modes) > 1 else ""


def overview(runs: Sequence[ModeRun]) -> Grid:
    """A row a mode, and one more for each of its priorities."""
    rows = [_overview_row(run, group) for run in runs for group in run.groups]
    columns = len(HEADERS) if any(row[-1] for row in rows) else len(HEADERS) - 1
    head = [[header[line] for header in HEADERS] for line in (0, 1)]
    return [row[:columns] for row in head + rows]


def _overview_row(run: ModeRun, group: str) -> list[str]:
    found = summary(run, group, {})
    whole = group == "all"
    padding = number(run.stats, "padding_share")
    return [
        label(run) if whole else f"  {group}",
        str(found["ok"]),
        str(found["requests"] - found["ok"]),
        show(run.wall_s, 2) if whole else "",
        show(found["output_token_throughput"], 1),
        show(found["request_throughput"], 2),
        show(found["e2el"]["mean"], 2),
        show(found["e2el"]["p50"], 2),
        show(found["e2el"]["p99"], 2),
        show(number(run.stats, "latency", group, "server_ttft", "p50"), 3),
        show(number(run.stats, "latency", group, "server_ttft", "p99"), 3),
        show(number(run.stats, "mean_batch_size"), 2) if whole else "",
        (f"{100 * padding:.1f} %" if padding is not None else "-") if whole else "",
        show(number(run.stats, "preemptions"), 0) if whole else "",
        ", ".join(f"{count} x {kind}" for kind, count in found["errors"].items()),
    ]


def repeats(runs: Sequence[ModeRun]) -> Grid:
    """A row a mode: the medians of its repeats, and how far these are apart."""
    return figures.repeats({label(run): [summary(one, "all", {}) for one in run.repeats or [run]] for run in runs})


def times(runs: Sequence[ModeRun], limits: Mapping[str, float]) -> Grid:
    """TTFT, TPOT, ITL and E2EL, and goodput where there are limits."""
    names = [("total", "tokens/s"), *([("", "goodput/s")] if limits else [])]
    names += [(LATENCIES[name] if s == "mean" else "", s) for name in LATENCIES for s in STATISTICS]
    grid = [["", *(name[0] for name in names)], ["mode", *(name[1] for name in names)]]
    for run in runs:
        for group in run.groups:
            found = summary(run, group, limits)
            row = [label(run) if group == "all" else f"  {group}", show(found["total_token_throughput"], 1)]
            row += [show(found["goodput"], 2)] if limits else []
            grid.append(row + [show(found[name][s], 3) for name in LATENCIES for s in STATISTICS])
    return grid


def _error_notes(runs: Sequence[ModeRun]) -> list[str]:
    first: dict[str, str] = {}
    for run in runs:
        for answer in run.answers:
            if answer.error and answer.message:
                first.setdefault(answer.error, answer.message)
    return [f"{kind}: {message}" for kind, message in first.items()]


def lag_lines(runs: Sequence[ModeRun]) -> list[str]:
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


def limits_said(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{LATENCIES[name]} at most {value:g} s" for name, value in limits.items())
