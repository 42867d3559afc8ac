"""The charts of a plan and of a run, in the one style (`shared/style.py`): each for light and for dark, with a title and a
caption that says what to see.

It must not know of HTTP or HTML. matplotlib takes a second to import, so that this file is imported only when something is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from client.answers import Answer, ModeRun
from client.checks import label
from client.metrics import summary
from client.shared import style
from client.shared.plan import PRIORITIES, Plan, PlannedRequest
from client.timeline import CODES, NO_RECORD, Timeline

MARKERS = {"immediate": "o", "deferred": "^"}
LINES = ("-", "--", ":")
BARS = 60  # of an arrival plan


@style.in_both_themes
def draw_plan(path: Path, plan: Plan) -> None:
    """When requests leave, and how long they are."""
    caption = (
        "Above: how many requests are sent in each moment. Below: how many tokens each asks for, and how long its prompt is."
    )
    figure = style.figure(9.0, 6.4, "The arrival plan", caption)
    panels = figure.subplots(2, 1, sharex=not plan.users, squeeze=False).ravel()
    if plan.users:
        panels[0].axis("off")
        told = f"closed loop: {plan.users} users, each sends its next request when the one before is answered"
        panels[0].text(0.5, 0.5, told, ha="center", va="center", fontsize=12)
    else:
        _draw_arrivals(panels[0], plan, max(plan.duration_s, 1e-3))
        panels[0].set_title(f"{len(plan.requests)} requests in {plan.duration_s:.1f} s", fontsize=13)
    for (priority, marker), tone in zip(MARKERS.items(), style.shades(3), strict=False):
        chosen = [request for request in plan.requests if request.priority == priority]
        if chosen:
            x = [request.index if plan.users else request.at_s for request in chosen]
            y = [request.num_tokens for request in chosen]
            label = f"output of an {priority} request" if priority[0] in "aeiou" else f"output of a {priority} request"
            panels[1].scatter(x, y, s=22, c=tone, marker=marker, alpha=0.6, linewidths=0, label=label)
    prompts = [request for request in plan.requests if request.prompt_tokens is not None]
    if prompts:
        x = [request.index if plan.users else request.at_s for request in prompts]
        lengths = [request.prompt_tokens for request in prompts]
        panels[1].scatter(x, lengths, s=18, c=style.theme().soft, marker="x", alpha=0.6, linewidths=1.0, label="prompt")
    panels[1].set(xlabel="request" if plan.users else "planned send, seconds", ylabel="tokens", ylim=(0, None))
    panels[1].grid(True)
    panels[1].legend(loc="upper left", bbox_to_anchor=(0, 1.17), ncols=3, frameon=False)
    style.save(figure, path)


@style.in_both_themes
def draw_throughput(path: Path, runs: Sequence[ModeRun], limits: dict[str, float]) -> None:
    """Output tokens and requests a second, and what of the latter kept the limits."""
    caption = "Longer is better. What batching is for: the same requests, more tokens a second." + (
        " Lines: how far repeats are apart." if any(run.repeats for run in runs) else ""
    )
    figure = style.figure(10.0, 1.3 + 0.55 * len(runs), "Throughput", caption)
    panels = figure.subplots(1, 2, sharey=True, squeeze=False).ravel()
    found = [summary(run, "all", limits) for run in runs]
    places = range(len(runs))
    figures = (("output_token_throughput", "output tokens a second", 0), ("request_throughput", "requests a second", 2))
    for panel, (name, title, digits) in zip(panels, figures, strict=True):
        sizes = [one[name] or 0.0 for one in found]
        colours = [style.colour(run.mode) for run in runs]
        panel.barh(places, sizes, color=colours, height=0.66, alpha=0.45 if limits and name.startswith("request") else 1.0)
        for i, run in enumerate(runs):
            if run.repeats:
                rates = [summary(one, "all", limits)[name] or 0.0 for one in run.repeats]
                panel.plot([min(rates), max(rates)], [i, i], "|-", color=style.theme().ink, linewidth=1.2, markersize=9)
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
    style.save(figure, path)


@style.in_both_themes
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
    caption = (
        "How long did they wait? The share of requests (for ITL: of gaps) that took no longer than so many seconds. "
        "Further left is faster; where a curve reaches the top is what the unluckiest waited."
    )
    figure = style.figure(4.3 * len(kinds), 4.6, "Latencies", caption)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False).ravel()
    split = any(answer.request.priority == "deferred" for run in runs for answer in run.answers)
    handles: dict[str, Any] = {}
    for panel, (title, times) in zip(panels, kinds, strict=True):
        lowest, highest = math.inf, 0.0
        for i, run in enumerate(runs):
            for line, priority in zip(LINES, PRIORITIES if split else ("all",), strict=False):
                values = np.sort([t for answer in run.of(priority) if not answer.error for t in times(answer)])
                if not len(values):
                    continue
                lowest, highest = min(lowest, max(np.percentile(values, 2), 1e-4)), max(highest, values[-1])
                shares = np.arange(1, len(values) + 1) / len(values)
                name = f"{label(run)}, {priority}" if split else label(run)
                (handles[name],) = panel.plot(
                    values,
                    shares,
                    line,
                    color=style.colour(run.mode),
                    linewidth=style.width(i, len(runs)),
                    drawstyle="steps-post",
                )
        panel.set(title=title, xlabel="seconds", ylim=(0, 1.02))
        panel.locator_params(axis="x", nbins=4)
        if highest > 30 * lowest:
            panel.set_xscale("log")
            panel.set_xlim(lowest * 0.7, highest * 1.3)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(True)
    panels[0].set_ylabel("share that took no longer")
    panels[0].set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1.0], ["0", "25 %", "50 %", "75 %", "90 %", "100 %"])
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(runs)), frameon=False)
    style.save(figure, path)


@style.in_both_themes
def draw_queue(path: Path, runs: Sequence[ModeRun], plan: Plan) -> None:
    """Who waits and who runs over time, mode by mode, and the arrivals that made it so."""
    last_s = max([run.last_s for run in runs] + [plan.duration_s, 1e-3])
    rows = len(runs) + (not plan.users)
    heights = [1.0] * len(runs) + [0.8] * (not plan.users)
    caption = (
        "Full colour: running in a sequence slot. Light: waiting in the queue. A line marks the last answer. The less "
        "there is of the light part, the sooner a request is begun."
    )
    figure = style.figure(10.0, 1.0 + 1.5 * rows, "Who waits", caption)
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    top = 1.0
    for panel, run in zip(panels, runs, strict=False):
        if run.steps:
            times = np.array([record["end_s"] for record in run.steps])
            waiting = np.array([record["queue"] for record in run.steps], dtype=float)
            running = np.array([record["running"] for record in run.steps], dtype=float)
            names = ("waiting in the queue", "running in the batch")
            if run.recorded_from_s:
                panel.axvspan(
                    0, run.recorded_from_s, color=_cell_colours(run.mode)[NO_RECORD], linewidth=0, label=CODES[NO_RECORD]
                )
        else:  # as seen from here
            times, running = _in_flight(run.answers)
            waiting = np.zeros(0)
            names = ("", "arrived and not answered" if run.simulated else "sent and not answered")
        panel.fill_between(times, running, step="post", color=style.colour(run.mode), linewidth=0, label=names[1])
        if len(waiting):
            panel.fill_between(
                times,
                running,
                running + waiting,
                step="post",
                color=style.tint(style.colour(run.mode), 0.35),
                linewidth=0,
                label=names[0],
            )
            top = max(top, float((running + waiting).max()))
        top = max(top, float(running.max(initial=0)))
        panel.set_title(label(run), loc="left", fontsize=12, fontweight="bold", pad=3)
        panel.set_title(f"all answered after {run.last_s:.1f} s", loc="right", fontsize=10, pad=3)
        panel.axvline(run.last_s, color=style.theme().ink, linewidth=1.2)
        panel.set_ylabel("requests")
    for panel in panels[: len(runs)]:
        panel.set_ylim(0, top * 1.05)
        panel.grid(True)
    if not plan.users:
        _draw_arrivals(panels[-1], plan, last_s)
        panels[-1].set_title("the same arrivals in every mode", loc="left", fontsize=12, fontweight="bold", pad=3)
    panels[-1].set(xlabel="seconds", xlim=(0, last_s * 1.01))
    handles: dict[str, Any] = {}
    for panel in panels[: len(runs)]:
        drawn, labels = panel.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False)
    style.save(figure, path)


@style.in_both_themes
def draw_slots(path: Path, runs: Sequence[ModeRun]) -> None:
    """What is in each sequence slot over time, mode by mode, on the same time axis."""
    drawn = [(run, Timeline(run.steps or [], run.slots, run.recorded_from_s)) for run in runs]
    last_s = max(run.last_s for run in runs) * 1.01
    slots = max([timeline.used for _, timeline in drawn] + [1])
    caption = (
        "A row per sequence slot, time to the right. Decoding has the mode's colour, lighter for deferred requests; a thin "
        "line is a prompt; red is waste: a finished request that keeps its slot. A line marks the last answer."
    )
    figure = style.figure(12.0, 1.2 + len(runs) * (1.15 + min(1.0, slots / 48)), "What each sequence slot did", caption)
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False).ravel()
    for panel, (run, timeline) in zip(panels, drawn, strict=True):
        picture = timeline.picture(last_s, slots)
        after = np.linspace(0, last_s, picture.shape[1]) > run.last_s
        picture = np.ma.masked_array(picture, np.broadcast_to(after, picture.shape))
        panel.imshow(
            picture, cmap=ListedColormap(_cell_colours(run.mode)), vmin=-0.5, vmax=len(CODES) - 0.5,
            aspect="auto", interpolation="nearest", extent=(0, last_s, slots + 0.5, 0.5),
        )  # fmt: skip
        panel.set_title(label(run), loc="left", fontsize=12, fontweight="bold", pad=3)
        panel.set_title(f"{timeline.story()}; done after {run.last_s:.1f} s", loc="right", fontsize=10.5, pad=3)
        panel.set_ylabel("slot")
        panel.axvline(run.last_s, color=style.theme().ink, linewidth=1.2)
        panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    panels[-1].set_xlabel("seconds")
    there = set().union(*(timeline.codes for _, timeline in drawn))
    patches = [
        Patch(facecolor=colour, edgecolor=style.theme().soft, label=code)
        for i, (code, colour) in enumerate(zip(CODES, _cell_colours(None), strict=True))
        if i in there
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(3, len(patches)), frameon=False, fontsize=10.5)
    style.save(figure, path)


@style.in_both_themes
def draw_latency(path: Path, runs: Sequence[ModeRun]) -> None:
    """Latency against requested tokens, one panel per mode, all on the same axes."""
    columns = len(runs) if len(runs) <= 3 else math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    since = "arrival" if all(run.simulated for run in runs) else "planned send"
    caption = (
        f"A mark is a request: from its {since} to its answer, by the tokens that it asked for. Lower is better. Where a "
        "mode answers short requests as late as long ones, they wait for their batch."
    )
    figure = style.figure(max(6.4, 4.2 * columns), 4.0 * rows + 1.0, "Latency against requested tokens", caption)
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
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    style.save(figure, path)


def _draw_latency(panel: Any, run: ModeRun, spread: int, medians: bool, handles: dict[str, Any]) -> None:
    good = [answer for answer in run.answers if not answer.error]
    for priority, marker in MARKERS.items():
        chosen = [answer for answer in good if answer.request.priority == priority]
        if chosen:
            # Requests of one length share an x: a small fixed shift by index keeps them apart, the same in every mode.
            x = [a.request.num_tokens + spread * 0.016 * ((a.request.index * 7) % 9 / 4 - 1) for a in chosen]
            y = [answer.latency_s for answer in chosen]
            handles[f"one {priority} request"] = panel.scatter(
                x, y, s=26, c=style.colour(run.mode), marker=marker, alpha=0.55, linewidths=0
            )
    for length in {answer.request.num_tokens for answer in good} if medians else ():
        same = [answer.latency_s for answer in good if answer.request.num_tokens == length]
        half = spread * 0.035
        line = panel.hlines(median(same), length - half, length + half, colors=style.theme().ink, linewidth=2)
        handles["median at that length"] = line
    title = label(run)
    if good:
        rate = sum(answer.tokens for answer in good) / run.wall_s
        title += f"\nmean {fmean(a.latency_s for a in good):.2f} s, {rate:.1f} output tokens/s"
    failed = len(run.answers) - len(good)
    if failed:
        title += f"\n{failed} of {len(run.answers)} requests failed (not drawn)"
    panel.set_title(title, fontsize=11)
    panel.grid(True)


def _draw_arrivals(panel: Any, plan: Plan, last_s: float) -> None:
    """Bars of how many leave when, stacked by priority."""
    split = {priority: [r.at_s for r in _of(plan.requests, priority)] for priority in PRIORITIES}
    there = [priority for priority, times in split.items() if times]
    colours = style.shades(3)[: len(there)] if len(there) > 1 else style.shades(3)[1:2]
    labels = there if len(there) > 1 else ["planned sends"]
    panel.hist([split[p] for p in there], bins=BARS, range=(0, last_s), stacked=True, color=colours, label=labels)
    panel.set(ylabel=f"sends in {1e3 * last_s / BARS:.0f} ms", xlim=(0, last_s))
    panel.grid(True)
    if len(there) > 1:
        panel.legend(loc="upper right", frameon=False)


def _of(requests: Iterable[PlannedRequest], priority: str) -> list[PlannedRequest]:
    return [request for request in requests if request.priority == priority]


def _in_flight(answers: Sequence[Answer]) -> tuple[Any, Any]:
    """How many requests were under way after each moment at which that changed."""
    changes = sorted([(answer.sent_s, 1) for answer in answers] + [(answer.done_s, -1) for answer in answers])
    return np.array([time for time, _ in changes]), np.cumsum([change for _, change in changes]).astype(float)


def _cell_colours(mode: str | None) -> list[str]:
    """Of CODES, in the mode's own colour where something is decoded; in a neutral one for a legend of several modes."""
    theme = style.theme()
    own = style.colour(mode) if mode else theme.soft
    waiting, unknown = style.tint(theme.ink, 0.28), style.tint(theme.ink, 0.14)
    again = style.tint(theme.ink, 0.6)
    return [style.tint(theme.ink, 0.05), own, style.tint(own, 0.5), theme.ink, again, theme.waste, waiting, unknown]
