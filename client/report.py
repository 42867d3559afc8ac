"""What a run gave, as a table, a CSV file and a plot.

It must not know of HTTP or threads: it reads finished answers and the server's /stats object, in which any key may
be missing or null. Latency counts from the planned send time; throughput is per wall-clock second.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from workload import PlannedRequest

PRIORITIES = ("immediate", "deferred")

# Two of Okabe and Ito's colours, told apart by every kind of colour vision; the marker shapes say it once more.
STYLES = {"immediate": ("#0072B2", "o"), "deferred": ("#D55E00", "^")}


@dataclass(frozen=True)
class Answer:
    """What became of one request; times in seconds, ``sent_s`` and ``done_s`` from the start of the run."""

    request: PlannedRequest
    sent_s: float
    done_s: float
    error: str = ""  # its kind, "" where the request succeeded
    message: str = ""
    tokens: int = 0
    completion: str = ""
    finish_reason: str = ""
    server_ttft_s: float | None = None
    server_latency_s: float | None = None
    mode: str = ""  # as the server named it: another one where somebody switched during the run

    @property
    def latency_s(self) -> float:
        return self.done_s - self.request.at_s


@dataclass
class ModeRun:
    """The answers of one mode, in the order they came, and the server's /stats after the last."""

    mode: str
    answers: list[Answer] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def wall_s(self) -> float:
        """From the first planned send, which is 0, to the last answer."""
        return max((answer.done_s for answer in self.answers), default=0.0)


# ---- table

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


def table(runs: Sequence[ModeRun]) -> str:
    """One row per mode and, where deferred requests were sent, one more per priority."""
    rows: list[list[str]] = []
    for run in runs:
        rows.append(_row(run, run.mode, run.answers, "all"))
        if any(answer.request.priority == "deferred" for answer in run.answers):
            for priority in PRIORITIES:
                answers = [answer for answer in run.answers if answer.request.priority == priority]
                rows.append(_row(run, f"  {priority}", answers, priority))
    columns = len(HEADERS) if any(row[-1] for row in rows) else len(HEADERS) - 1
    grid = [[header[line] for header in HEADERS] for line in (0, 1)] + rows
    widths = [max(len(cells[column]) for cells in grid) for column in range(columns)]
    lines = [_line(cells, widths) for cells in grid]
    lines.insert(2, "-" * (sum(widths) + 2 * (columns - 1)))
    return "\n".join([*lines, LEGEND, *_error_notes(runs)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=False)):
        left = column in (0, len(HEADERS) - 1)
        words.append(cell.ljust(width) if left else cell.rjust(width))
    return "  ".join(words).rstrip()


def _row(run: ModeRun, label: str, answers: Sequence[Answer], group: str) -> list[str]:
    good = [answer for answer in answers if not answer.error]
    latencies = [answer.latency_s for answer in good]
    kinds = Counter(answer.error for answer in answers if answer.error)
    # A priority's rates are shares of the whole run's time, so that its rows add up to the mode's.
    wall_s = run.wall_s or math.nan
    whole = group == "all"
    padding = _number(run.stats, "padding_share")
    return [
        label,
        str(len(good)),
        str(len(answers) - len(good)),
        _show(run.wall_s, 2) if whole else "",
        _show(sum(answer.tokens for answer in good) / wall_s, 1),
        _show(len(good) / wall_s, 2),
        _show(fmean(latencies) if latencies else None, 2),
        _show(percentile(latencies, 50), 2),
        _show(percentile(latencies, 99), 2),
        _show(_number(run.stats, "latency", group, "server_ttft", "p50"), 3),
        _show(_number(run.stats, "latency", group, "server_ttft", "p99"), 3),
        _show(_number(run.stats, "mean_batch_size"), 2) if whole else "",
        (f"{100 * padding:.1f} %" if padding is not None else "-") if whole else "",
        _show(_number(run.stats, "preemptions"), 0) if whole else "",
        ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()),
    ]


def _error_notes(runs: Sequence[ModeRun]) -> list[str]:
    first: dict[str, str] = {}
    for run in runs:
        for answer in run.answers:
            if answer.error and answer.message:
                first.setdefault(answer.error, answer.message)
    return [f"{kind}: {message}" for kind, message in first.items()]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the two nearest ranks, linearly; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _number(stats: Any, *keys: str) -> float | None:
    for key in keys:
        if not isinstance(stats, dict):
            return None
        stats = stats.get(key)
    number = isinstance(stats, int | float) and not isinstance(stats, bool) and math.isfinite(stats)
    return float(stats) if number else None


def _show(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "-"


# ---- CSV


def write_csv(path: Path, runs: Sequence[ModeRun]) -> None:
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
        "server_ttft_s": answer.server_ttft_s,
        "server_latency_s": answer.server_latency_s,
        "output_tokens": answer.tokens if good else None,
        "finish_reason": answer.finish_reason,
        "prompt": request.prompt,
        "completion": answer.completion,
    }


# ---- plot


def write_plot(path: Path, runs: Sequence[ModeRun]) -> None:
    """Latency against requested tokens, one panel per mode, all on the same axes."""
    # Imported here because it takes a second, which --help and a refused argument should not.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(runs) if len(runs) <= 3 else math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 4.0 * rows + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    answers = [answer for run in runs for answer in run.answers]
    lengths = sorted({answer.request.num_tokens for answer in answers})
    spread = max(lengths[-1] - lengths[0], 1)
    handles: dict[str, Any] = {}
    for panel, run in zip(panels, runs, strict=False):
        _draw(panel, run, spread, handles)
        # In a grid that is not full the lowest panel of a column may have none below it to carry the numbers.
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.set(xlabel="tokens requested", ylabel="latency in seconds")
        if len(lengths) <= 8:
            panel.set_xticks(lengths)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    margin = spread * (0.1 if len(lengths) > 1 else 0.5)
    longest_s = max((answer.latency_s for answer in answers if not answer.error), default=1.0)
    panels[0].set(xlim=(lengths[0] - margin, lengths[-1] + margin), ylim=(0, longest_s * 1.06))
    figure.suptitle("Latency, from planned send to answer: lower is better", fontsize=13)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def _draw(panel: Any, run: ModeRun, spread: int, handles: dict[str, Any]) -> None:
    good = [answer for answer in run.answers if not answer.error]
    for priority, (colour, marker) in STYLES.items():
        chosen = [answer for answer in good if answer.request.priority == priority]
        if chosen:
            # Requests of one length share an x: a small fixed shift by index keeps them apart, the same in every mode.
            x = [a.request.num_tokens + spread * 0.016 * ((a.request.index * 7) % 9 / 4 - 1) for a in chosen]
            y = [answer.latency_s for answer in chosen]
            handles[f"one {priority} request"] = panel.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.55, linewidths=0)
    for length in {answer.request.num_tokens for answer in good}:
        same = [answer.latency_s for answer in good if answer.request.num_tokens == length]
        half = spread * 0.035
        line = panel.hlines(median(same), length - half, length + half, colors="black", linewidth=2)
        handles["median at that length"] = line
    title = run.mode
    if good:
        rate = sum(answer.tokens for answer in good) / run.wall_s
        title += f"\nmean {fmean(a.latency_s for a in good):.2f} s, {rate:.1f} output tokens/s"
    failed = len(run.answers) - len(good)
    if failed:
        title += f"\n{failed} of {len(run.answers)} requests failed (not drawn)"
    panel.set_title(title, fontsize=11)
    panel.grid(alpha=0.25)
