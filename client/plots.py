"""The pictures of a plan and of a run, each a PNG that says what it shows without a caption.

Colours are Okabe and Ito's, told apart by every kind of colour vision; shapes, line styles and labels say it once more. It
must not know of HTTP or HTML. matplotlib takes a second to import, so that this file is imported only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from answers import Answer, ModeRun
from checks import label
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from metrics import summary
from timeline import CODES, NO_RECORD, Timeline
from workload import PRIORITIES, Plan, PlannedRequest

DPI = 120
STYLES = {"immediate": ("#0072B2", "o"), "deferred": ("#56B4E9", "^")}
LINES = ("-", "--", ":")
MODE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WAITING, RUNNING = "#D55E00", "#0072B2"
BARS = 60  # of an arrival plan


def draw_plan(path: Path, plan: Plan) -> None:
    """When requests leave, and how long they are."""
    figure = _figure(9.0, 6.4)
    panels = figure.subplots(2, 1, sharex=not plan.users, squeeze=False).ravel()
    if plan.users:
        panels[0].axis("off")
        told = f"closed loop: {plan.users} users, each sends its next request when the one before is answered"
        panels[0].text(0.5, 0.5, told, ha="center", va="center", fontsize=12)
    else:
        _draw_arrivals(panels[0], plan, max(plan.duration_s, 1e-3))
        panels[0].set_title(f"Arrival plan: {len(plan.requests)} requests in {plan.duration_s:.1f} s", fontsize=13)
    for priority, (colour, marker) in STYLES.items():
        chosen = [request for request in plan.requests if request.priority == priority]
        if chosen:
            x = [request.index if plan.users else request.at_s for request in chosen]
            y = [request.num_tokens for request in chosen]
            label = f"output of an {priority} request" if priority[0] in "aeiou" else f"output of a {priority} request"
            panels[1].scatter(x, y, s=22, c=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
    prompts = [request for request in plan.requests if request.prompt_tokens is not None]
    if prompts:
        x = [request.index if plan.users else request.at_s for request in prompts]
        lengths = [request.prompt_tokens for request in prompts]
        panels[1].scatter(x, lengths, s=18, c="#009E73", marker="x", alpha=0.6, linewidths=1.0, label="prompt")
    panels[1].set(xlabel="request" if plan.users else "planned send, seconds", ylabel="tokens", ylim=(0, None))
    panels[1].grid(alpha=0.25)
    panels[1].legend(loc="upper left", bbox_to_anchor=(0, 1.17), ncols=3, frameon=False)
    _save(figure, path)


def draw_throughput(path: Path, runs: Sequence[ModeRun], limits: dict[str, float]) -> None:
    """Output tokens and requests a second, and what of the latter kept the limits."""
    figure = _figure(10.0, 1.3 + 0.55 * len(runs))
    panels = figure.subplots(1, 2, sharey=True, squeeze=False).ravel()
    found = [summary(run, "all", limits) for run in runs]
    places = range(len(runs))
    figures = (("output_token_throughput", "output tokens a second", 0), ("request_throughput", "requests a second", 2))
    for panel, (name, title, digits) in zip(panels, figures, strict=True):
        sizes = [one[name] or 0.0 for one in found]
        colours = [_colour(i) for i in places]
        panel.barh(places, sizes, color=colours, height=0.66, alpha=0.45 if limits and name.startswith("request") else 1.0)
        for i, size in enumerate(sizes):
            panel.annotate(f"{size:.{digits}f}", (size, i), xytext=(5, 0), textcoords="offset points", va="center")
        panel.set_title(title, fontsize=12)
        panel.set_xlim(0, max(sizes, default=0) * 1.16 or 1.0)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
        if limits and name.startswith("request"):
            kept = [one["goodput"] or 0.0 for one in found]
            panel.barh(places, kept, color=colours, height=0.66)
            for i, rate in enumerate(kept):
                panel.annotate(f"goodput {rate:.2f}", (0, i), xytext=(5, 0), textcoords="offset points", va="center")
            said = ", ".join(f"{key.upper()} ≤ {value:g} s" for key, value in limits.items())
            panel.set_title(f"requests a second\n(full colour: goodput, {said})", fontsize=11)
    panels[0].set_yticks(list(places), [label(run) for run in runs], fontsize=12)
    panels[0].invert_yaxis()
    _save(figure, path)


def draw_cdfs(path: Path, runs: Sequence[ModeRun]) -> None:
    """What share of the requests (for ITL: of the gaps) took no longer than so much."""
    streamed = any(answer.piece_times for run in runs for answer in run.answers)
    kinds: list[tuple[str, Any]] = [("whole answer (E2EL)", lambda a: [a.latency_s])]
    if streamed:
        kinds[:0] = [("first token (TTFT)", lambda a: [a.ttft_s] if a.ttft_s is not None else [])]
        kinds.append(("between tokens (ITL)", lambda a: a.gaps_s))
    else:
        known = lambda a: [a.server_ttft_s] if a.server_ttft_s is not None else []  # noqa: E731
        kinds[:0] = [("first token computed (server TTFT)", known)]
    figure = _figure(4.3 * len(kinds), 4.4)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False).ravel()
    split = any(answer.request.priority == "deferred" for run in runs for answer in run.answers)
    handles: dict[str, Any] = {}
    for panel, (title, times) in zip(panels, kinds, strict=True):
        lowest, highest = math.inf, 0.0
        for i, run in enumerate(runs):
            for style, priority in zip(LINES, PRIORITIES if split else ("all",), strict=False):
                values = np.sort([t for answer in run.of(priority) if not answer.error for t in times(answer)])
                if not len(values):
                    continue
                lowest, highest = min(lowest, max(np.percentile(values, 2), 1e-4)), max(highest, values[-1])
                shares = np.arange(1, len(values) + 1) / len(values)
                name = f"{label(run)}, {priority}" if split else label(run)
                (handles[name],) = panel.plot(values, shares, style, color=_colour(i), linewidth=2, drawstyle="steps-post")
        panel.set(title=title, xlabel="seconds", ylim=(0, 1.02))
        if highest > 30 * lowest:
            panel.set_xscale("log")
            panel.set_xlim(lowest * 0.7, highest * 1.3)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("share that took no longer")
    panels[0].set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1.0], ["0", "25 %", "50 %", "75 %", "90 %", "100 %"])
    figure.suptitle("How long did they wait? Further left is faster", fontsize=13)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(runs)), frameon=False)
    _save(figure, path)


def draw_queue(path: Path, runs: Sequence[ModeRun], plan: Plan) -> None:
    """Who waits and who runs over time, mode by mode, and the arrivals that made it so."""
    last_s = max([run.last_s for run in runs] + [plan.duration_s, 1e-3])
    rows = len(runs) + (not plan.users)
    heights = [1.0] * len(runs) + [0.8] * (not plan.users)
    figure = _figure(10.0, 1.0 + 1.5 * rows)
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    top = 1.0
    for panel, run in zip(panels, runs, strict=False):
        if run.steps:
            times = np.array([record["end_s"] for record in run.steps])
            waiting = np.array([record["queue"] for record in run.steps], dtype=float)
            running = np.array([record["running"] for record in run.steps], dtype=float)
            names = ("waiting in the queue", "running in the batch")
            if run.recorded_from_s:
                nothing = CODES[NO_RECORD]
                panel.axvspan(0, run.recorded_from_s, color=nothing.colour, linewidth=0, label=nothing.label)
        else:  # as seen from here
            times, running = _in_flight(run.answers)
            waiting = np.zeros(0)
            names = ("", "arrived and not answered" if run.simulated else "sent and not answered")
        panel.fill_between(times, running, step="post", color=RUNNING, alpha=0.85, linewidth=0, label=names[1])
        if len(waiting):
            panel.fill_between(
                times, running, running + waiting, step="post", color=WAITING, linewidth=0, alpha=0.9, label=names[0]
            )
            top = max(top, float((running + waiting).max()))
        top = max(top, float(running.max(initial=0)))
        panel.set_title(label(run), loc="left", fontsize=12, fontweight="bold", pad=3)
        panel.set_title(f"all answered after {run.last_s:.1f} s", loc="right", fontsize=10, pad=3)
        panel.axvline(run.last_s, color="black", linewidth=1.2)
        panel.set_ylabel("requests")
    for panel in panels[: len(runs)]:
        panel.set_ylim(0, top * 1.05)
        panel.grid(alpha=0.25)
    if not plan.users:
        _draw_arrivals(panels[-1], plan, last_s)
        panels[-1].set_title("the same arrivals in every mode", loc="left", fontsize=12, fontweight="bold", pad=3)
    panels[-1].set(xlabel="seconds", xlim=(0, last_s * 1.01))
    handles: dict[str, Any] = {}
    for panel in panels[: len(runs)]:
        drawn, labels = panel.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False)
    _save(figure, path)


def draw_slots(path: Path, runs: Sequence[ModeRun]) -> None:
    """What is in each sequence slot over time, mode by mode, on the same time axis."""
    drawn = [(run, Timeline(run.steps or [], run.slots, run.recorded_from_s)) for run in runs]
    last_s = max(run.last_s for run in runs) * 1.01
    slots = max([timeline.used for _, timeline in drawn] + [1])
    figure = _figure(12.0, 1.2 + len(runs) * (1.15 + min(1.0, slots / 48)))
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False).ravel()
    colours = ListedColormap([code.colour for code in CODES])
    for panel, (run, timeline) in zip(panels, drawn, strict=True):
        picture = timeline.picture(last_s, slots)
        after = np.linspace(0, last_s, picture.shape[1]) > run.last_s
        picture = np.ma.masked_array(picture, np.broadcast_to(after, picture.shape))  # white: there is nothing left to do
        panel.imshow(
            picture, cmap=colours, vmin=-0.5, vmax=len(CODES) - 0.5, aspect="auto", interpolation="nearest",
            extent=(0, last_s, slots + 0.5, 0.5),
        )  # fmt: skip
        panel.set_title(label(run), loc="left", fontsize=12, fontweight="bold", pad=3)
        panel.set_title(f"{timeline.story()}; done after {run.last_s:.1f} s", loc="right", fontsize=10.5, pad=3)
        panel.set_ylabel("slot")
        panel.axvline(run.last_s, color="black", linewidth=1.2)
        panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    panels[-1].set_xlabel("seconds")
    there = set().union(*(timeline.codes for _, timeline in drawn))
    patches = [
        Patch(facecolor=code.colour, edgecolor="#888888", label=code.label) for i, code in enumerate(CODES) if i in there
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(3, len(patches)), frameon=False, fontsize=10.5)
    _save(figure, path)


def draw_latency(path: Path, runs: Sequence[ModeRun]) -> None:
    """Latency against requested tokens, one panel per mode, all on the same axes."""
    columns = len(runs) if len(runs) <= 3 else math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    figure = _figure(max(6.4, 4.2 * columns), 4.0 * rows + 1.0)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    answers = [answer for run in runs for answer in run.answers]
    lengths = sorted({answer.request.num_tokens for answer in answers})
    spread = max(lengths[-1] - lengths[0], 1)
    handles: dict[str, Any] = {}
    for panel, run in zip(panels, runs, strict=False):
        _draw_latency(panel, run, spread, len(lengths) <= 8, handles)
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
    since = "arrival" if all(run.simulated for run in runs) else "planned send"
    figure.suptitle(f"Latency, from {since} to answer: lower is better", fontsize=13)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, path)


def _draw_latency(panel: Any, run: ModeRun, spread: int, medians: bool, handles: dict[str, Any]) -> None:
    good = [answer for answer in run.answers if not answer.error]
    for priority, (colour, marker) in STYLES.items():
        chosen = [answer for answer in good if answer.request.priority == priority]
        if chosen:
            # Requests of one length share an x: a small fixed shift by index keeps them apart, the same in every mode.
            x = [a.request.num_tokens + spread * 0.016 * ((a.request.index * 7) % 9 / 4 - 1) for a in chosen]
            y = [answer.latency_s for answer in chosen]
            handles[f"one {priority} request"] = panel.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.55, linewidths=0)
    for length in {answer.request.num_tokens for answer in good} if medians else ():
        same = [answer.latency_s for answer in good if answer.request.num_tokens == length]
        half = spread * 0.035
        line = panel.hlines(median(same), length - half, length + half, colors="black", linewidth=2)
        handles["median at that length"] = line
    title = label(run)
    if good:
        rate = sum(answer.tokens for answer in good) / run.wall_s
        title += f"\nmean {fmean(a.latency_s for a in good):.2f} s, {rate:.1f} output tokens/s"
    failed = len(run.answers) - len(good)
    if failed:
        title += f"\n{failed} of {len(run.answers)} requests failed (not drawn)"
    panel.set_title(title, fontsize=11)
    panel.grid(alpha=0.25)


def _draw_arrivals(panel: Any, plan: Plan, last_s: float) -> None:
    """Bars of how many leave when, stacked by priority."""
    split = {priority: [r.at_s for r in _of(plan.requests, priority)] for priority in PRIORITIES}
    there = [priority for priority, times in split.items() if times]
    colours = [STYLES[priority][0] for priority in there] if len(there) > 1 else ["#555555"]
    labels = there if len(there) > 1 else ["planned sends"]
    panel.hist([split[p] for p in there], bins=BARS, range=(0, last_s), stacked=True, color=colours, label=labels)
    panel.set(ylabel=f"sends in {1e3 * last_s / BARS:.0f} ms", xlim=(0, last_s))
    panel.grid(alpha=0.25)
    if len(there) > 1:
        panel.legend(loc="upper right", frameon=False)


def _of(requests: Iterable[PlannedRequest], priority: str) -> list[PlannedRequest]:
    return [request for request in requests if request.priority == priority]


def _in_flight(answers: Sequence[Answer]) -> tuple[Any, Any]:
    """How many requests were under way after each moment at which that changed."""
    changes = sorted([(answer.sent_s, 1) for answer in answers] + [(answer.done_s, -1) for answer in answers])
    return np.array([time for time, _ in changes]), np.cumsum([change for _, change in changes]).astype(float)


def _colour(index: int) -> str:
    return MODE_COLOURS[index % len(MODE_COLOURS)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
