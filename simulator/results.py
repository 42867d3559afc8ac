"""What became of the requests of a run, a figure a column, and the field's figures of it: TTFT, TPOT, ITL, E2EL, throughput, as
the client's report has them. Takes answered requests one by one and lets them go. Must not know of policies, models or files.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batching.driver import Driver
from batching.request import Priority, Request
from batching.totals import Counts
from client.shared import figures
from client.shared.figures import LATENCIES, STATISTICS, Distribution, distribution
from client.shared.perfetto import Served, Traced
from client.shared.schema import RESULTS
from client.shared.tables import show, text

# What each measure means stands in docs/glossary.md. Nothing lies between client and engine here: TTFT is the server TTFT.
GROUPS = ("all", *(priority.value for priority in Priority))


class Results:
    """The requests of one run in the order of their answers: some fifty bytes a request and eight a token."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()  # requests that were not served, by code
        self._index = array("l")
        self._deferred = array("b")
        self._arrival, self._answered = array("d"), array("d")
        self._prompt, self._output = array("l"), array("l")
        self._times = array("d")  # of all tokens, request after request

    def add(self, req: Request) -> None:
        """An answered request, whose id is its number in the plan, or one that was refused or failed."""
        if req.error is not None:
            self.errors[req.error.code] += 1
            return
        assert req.answered_at is not None
        self._index.append(int(req.id))
        self._deferred.append(req.priority is Priority.DEFERRED)
        self._arrival.append(req.arrival)
        self._answered.append(req.answered_at)
        self._prompt.append(req.prompt_len)
        self._output.append(len(req.token_times))
        self._times.extend(req.token_times)

    def columns(self, origin: float = 0.0) -> "Columns":
        """As numpy has them, times counted from `origin`."""
        output = np.array(self._output)
        times, ends = np.array(self._times) - origin, np.cumsum(output)
        deferred = np.array(self._deferred, dtype=bool)
        arrival, answered = np.array(self._arrival) - origin, np.array(self._answered) - origin
        return Columns(
            np.array(self._index), deferred, arrival, answered, np.array(self._prompt), output, times, ends - output, ends
        )


@dataclass(frozen=True)
class Columns:
    """Requests' figures; tokens `starts[i]` to `ends[i]` of `times` are those of request i."""

    index: Any
    deferred: Any
    arrival: Any
    answered: Any
    prompt: Any
    output: Any
    times: Any
    starts: Any
    ends: Any

    @property
    def wall_s(self) -> float:
        """From the first arrival to the last answer."""
        return float(self.answered.max() - self.arrival.min()) if len(self.answered) else 0.0

    def chosen(self, group: str) -> Any:
        """Which requests belong to one of GROUPS."""
        return np.ones(len(self.output), dtype=bool) if group == "all" else self.deferred == (group == "deferred")

    def values(self, name: str, group: str = "all") -> Any:
        """All times of one of LATENCIES, in seconds: a value a request, for ITL one for each token after the first. TPOT has
        those of more than one token."""
        chosen = self.chosen(group)
        if name == "itl":
            if not len(self.times):
                return self.times
            gaps, within = np.diff(self.times), np.repeat(chosen, self.output)[1:]
            within[self.starts[1:] - 1] = False  # from one request's last token to the next one's first
            return gaps[within]
        if name == "e2el":
            return (self.answered - self.arrival)[chosen]
        if name == "ttft":
            return (self.times[self.starts] - self.arrival)[chosen]
        several = chosen & (self.output > 1)
        decode = self.times[self.ends - 1] - self.times[self.starts] if len(self.times) else self.times
        return decode[several] / (self.output[several] - 1)


@dataclass(frozen=True)
class Run:
    """One policy's run: what came of the requests, what the engines did, and the records of its steps where they were kept.
    `variants`: of the model, by name."""

    mode: str
    columns: Columns
    errors: Mapping[str, int]
    engine: dict[str, Any]
    slots: int = 0
    steps: Sequence[dict[str, Any]] | None = None
    variants: Sequence[str] = ("default",)
    repeat: int = 1

    @property
    def groups(self) -> Sequence[str]:
        """`all`, and the priorities where there are both."""
        return GROUPS if self.columns.deferred.any() else GROUPS[:1]

    def summary(self, group: str = "all") -> dict[str, Any]:
        """All figures of one of GROUPS, JSON-ready, in the client's terms. A priority's rates are shares of the whole time."""
        columns, wall_s = self.columns, self.columns.wall_s
        chosen = columns.chosen(group)
        ok, output, prompt = int(chosen.sum()), int(columns.output[chosen].sum()), int(columns.prompt[chosen].sum())
        return figures.summary(
            ok=ok,
            errors=self.errors if group == "all" else {},
            wall_s=wall_s,
            output_tokens=output,
            prompt_tokens=prompt,
            kept_limits=None,
            latencies={name: columns.values(name, group) for name in LATENCIES},
        )


def engine_figures(drivers: Sequence[Driver], wall_s: float) -> dict[str, Any]:
    """What the engines did, under the names of the server's /stats."""
    counts = sum((driver.stats.totals().counts for driver in drivers), Counts())
    return {
        "steps": counts.steps,
        "mean_batch_size": counts.mean_batch_size,
        "padding_share": counts.padding_share,
        "preemptions": counts.preemptions,
        "recomputed_tokens": counts.recomputed_tokens,
        "busy_share": counts.busy_s / (wall_s * len(drivers)) if wall_s else 0.0,
        "requests_by_variant": {str(variant): counts.variants[variant] for variant in sorted(counts.variants)},
    }


# ---- as text

HEADS = (
    ("", "mode"),
    ("requests", "ok"),
    ("", "errors"),
    ("wall", "s"),
    ("output", "tokens/s"),
    ("", "requests/s"),
    ("batch", "mean size"),
    ("busy", "share"),
    ("padding", "share"),
    ("", "preemptions"),
    ("", "by variant"),
    ("", "errors by kind"),
)


def table(runs: Sequence[Run]) -> str:
    """Throughput and what the engines did, a row a mode; then the times, a row more for each priority where there are both."""
    summaries = {(run.mode, group): run.summary(group) for run in runs for group in run.groups}
    overview = [[head[line] for head in HEADS] for line in (0, 1)]
    for run in runs:
        found, engine = summaries[run.mode, "all"], run.engine
        overview.append([
            run.mode,
            str(found["ok"]),
            str(found["requests"] - found["ok"]),
            show(found["wall_s"], 2),
            show(found["output_token_throughput"], 1),
            show(found["request_throughput"], 2),
            show(engine["mean_batch_size"], 2),
            f"{100 * engine['busy_share']:.1f} %",
            f"{100 * engine['padding_share']:.1f} %",
            str(engine["preemptions"]),
            _by_variant(run) if len(run.variants) > 1 else "",
            ", ".join(f"{count} x {kind}" for kind, count in found["errors"].items()),
        ])  # fmt: skip
    told = [any(row[column] for row in overview[2:]) for column in range(len(HEADS))]
    overview = [[cell for cell, shown in zip(row, told, strict=True) if shown] for row in overview]
    names = [(LATENCIES[name] + " s" if s == "mean" else "", s) for name in LATENCIES for s in STATISTICS]
    times = [["", *(name[0] for name in names)], ["mode", *(name[1] for name in names)]]
    for (mode, group), found in summaries.items():
        row = [mode if group == "all" else f"  {group}"]
        times.append(row + [show(found[name][s], 4) for name in LATENCIES for s in STATISTICS])
    return f"{text(overview, 2)}\n\n{text(times, 2)}"


def repeats(runs: Sequence[Run]) -> str:
    """A row a mode: the medians of its repeats, and how far these are apart."""
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_mode.setdefault(run.mode, []).append(run.summary())
    return f"{text(figures.repeats(by_mode), 2)}\n{figures.REPEATS_SAID}"


def shown(runs: Sequence[Run]) -> list[Run]:
    """Those of the repeat that stands for all of them."""
    number = figures.middle_one([run for run in runs if run.mode == runs[0].mode], _throughput).repeat
    return [run for run in runs if run.repeat == number]


def _throughput(run: Run) -> float:
    return float(run.columns.output.sum()) / (run.columns.wall_s or 1.0)


def _by_variant(run: Run) -> str:
    served = run.engine["requests_by_variant"]
    return ", ".join(f"{served.get(str(place), 0)} x {name}" for place, name in enumerate(run.variants))


# ---- in the client's format


def everything(runs: Sequence[Run], about: str, made: str) -> dict[str, Any]:
    """What the client writes to results.json, so that what reads that reads this: every request, and the records of the steps.
    Nothing is sent here, so that nothing is late, and there is no text."""
    return {
        "schema": RESULTS,
        "about": about,
        "plan": made,
        "goodput_limits_s": {},
        "modes": [
            {
                "mode": run.mode,
                "repeat": run.repeat,
                "groups": {group: run.summary(group) for group in run.groups},
                "lag_s": dict.fromkeys((*STATISTICS, "max"), 0.0),
                "beside_the_server": [],
                "server_stats": run.engine | {"latency": {group: _server_ttft(run, group) for group in run.groups}},
                "answers": _answers(run),
                "slots": run.slots,
                "steps": run.steps,
            }
            for run in runs
        ],
    }


def traced(run: Run) -> Traced:
    """The run as a trace has it."""
    columns = run.columns
    return Traced(
        run.mode + (f", repeat {run.repeat}" if run.repeat > 1 else ""),
        run.steps or [],
        [_served(columns, i) for i in np.argsort(columns.index)],
    )


def _served(columns: Columns, i: int) -> Served:
    first_s = float(columns.times[columns.starts[i]])
    more = {"prompt_tokens": int(columns.prompt[i]), "output_tokens": int(columns.output[i])}
    priority = "deferred" if columns.deferred[i] else "immediate"
    return Served(int(columns.index[i]), priority, float(columns.arrival[i]), float(columns.answered[i]), first_s, more)


def _server_ttft(run: Run, group: str) -> dict[str, Distribution]:
    return {"server_ttft": distribution(run.columns.values("ttft", group))}


def _answers(run: Run) -> list[dict[str, Any]]:
    columns = run.columns
    ttft, e2el = columns.values("ttft"), columns.values("e2el")
    answers = []
    for i in np.argsort(columns.index):
        tokens, arrival = int(columns.output[i]), round(float(columns.arrival[i]), 6)
        times = columns.times[columns.starts[i] : columns.ends[i]]
        tpot = round(float(times[-1] - times[0]) / (tokens - 1), 6) if tokens > 1 else None
        answers.append({
            "mode": run.mode,
            "repeat": run.repeat,
            "request": int(columns.index[i]),
            "priority": "deferred" if columns.deferred[i] else "immediate",
            "requested_tokens": tokens,
            "seed": 0,
            "planned_s": arrival,
            "sent_s": arrival,
            "answered_s": round(float(columns.answered[i]), 6),
            "answered_mode": run.mode,
            "status": "ok",
            "message": "",
            "latency_s": round(float(e2el[i]), 6),
            "ttft_s": round(float(ttft[i]), 6),
            "tpot_s": tpot,
            "server_ttft_s": round(float(ttft[i]), 6),
            "server_latency_s": round(float(e2el[i]), 6),
            "prompt_tokens": int(columns.prompt[i]),
            "output_tokens": tokens,
            "finish_reason": "length",
            "prompt": "",
            "completion": "",
            "piece_times_s": [round(float(t), 6) for t in times],
        })  # fmt: skip
    return answers
