"""What a run gave, in files: CSV, JSON, pictures and the page.

It must not know of HTTP or threads: it reads finished answers and the server's /stats object. What the figures mean is
metrics.py's; how they are drawn, plots.py's; how they are told, tables.py's and page.py's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.answers import Answer, ModeRun, Stream, each_of
from client.checks import answered_modes, doubts
from client.metrics import beside_the_server, lag, summary
from client.page import page, section
from client.shared import schema
from client.shared.tables import write_csv
from client.tables import simulated


def write_results(folder: Path, runs: Sequence[ModeRun]) -> str:
    """results.csv and latency.png; a line that says so. Raises OSError."""
    from client.plots import draw_latency  # matplotlib takes a second, which --help and a refused argument should not

    write_csv(folder / "results.csv", (_csv_row(run, answer) for run in each_of(runs) for answer in _in_order(run)))
    draw_latency(folder / "latency.png", runs)
    return f"every request: {folder / 'results.csv'}\nplot: {folder / 'latency.png'}"


def _in_order(run: ModeRun) -> list[Answer]:
    """Its answers in the order of the plan."""
    return sorted(run.answers, key=lambda answer: answer.request.index)


def _csv_row(run: ModeRun, answer: Answer) -> dict[str, object]:
    """Times in seconds, an unknown one left empty."""
    request = answer.request
    good = not answer.error
    return {
        "mode": run.mode,
        "repeat": run.repeat,
        "request": request.index,
        "priority": request.priority,
        "requested_tokens": request.num_tokens,
        "seed": request.seed,
        "planned_s": round(request.at_s, 6),
        "sent_s": round(answer.sent_s, 6),
        "answered_s": round(answer.done_s, 6),
        "answered_mode": answer.mode,
        "answered_by": answer.instance,
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


WITHOUT_STEPS = "there are no step records (GET /steps) of a single server, so that there is no timeline of its slots"
SIMULATED_WITHOUT_STEPS = (
    "These are several engines in virtual time, whose steps are not recorded: there is no timeline of their slots. The figures "
    "are of all of them together."
)


def write_report(folder: Path, streams: Sequence[Stream], limits: dict[str, float], about: str, stopped: str = "") -> str:
    """report.html, and for each stream its pictures and all figures in results.json; a line that says so. Raises OSError."""
    told = [stopped] if stopped else []
    runs = [run for stream in streams for run in stream.runs]
    if not any(run.steps for run in runs):
        told.append(SIMULATED_WITHOUT_STEPS if simulated(runs) else WITHOUT_STEPS)
    sections = []
    for stream in streams:
        own = folder / stream.folder
        shown = _draw(own, stream, limits)
        (own / "results.json").write_text(json.dumps(_everything(stream, limits, about)), encoding="utf-8")
        sections.append(section(stream, limits, shown))
    (folder / "report.html").write_text(page(streams, about, told, sections), encoding="utf-8")
    return f"report: {folder / 'report.html'}"


def _draw(folder: Path, stream: Stream, limits: dict[str, float]) -> list[tuple[str, bytes, bytes]]:
    """Each chart's title and bytes, for light and for dark pages."""
    from client.plots import draw_cdfs, draw_plan, draw_queue, draw_slots, draw_throughput
    from client.shared.style import DARK

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
    files = {name: folder / f"{name}.png" for name in titles}
    return [(titles[name], file.read_bytes(), DARK.file(file).read_bytes()) for name, file in files.items()]


def _everything(stream: Stream, limits: dict[str, float], about: str) -> dict[str, Any]:
    return {
        "schema": schema.RESULTS,
        "about": about,
        "plan": stream.plan.made,
        "goodput_limits_s": limits,
        "modes": [
            {
                "mode": run.mode,
                "repeat": run.repeat,
                "params": run.params,
                "doubts": doubts(run),
                "answered_modes": answered_modes(run),
                "instances": run.instances,
                "groups": {group: summary(run, group, limits) for group in run.groups},
                "lag_s": lag(run),
                "beside_the_server": [
                    vars(f) | {"agrees": f.agrees} for f in ([] if run.simulated else beside_the_server(run))
                ],
                "server_stats_before": run.before,
                "server_stats": run.stats,
                "answers": [
                    _csv_row(run, answer) | {"piece_times_s": [round(t, 6) for t in answer.piece_times]}
                    for answer in _in_order(run)
                ],
                "slots": run.slots,
                "steps": run.steps,
            }
            for run in each_of(stream.runs)
        ],
    }
