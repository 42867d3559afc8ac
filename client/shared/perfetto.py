"""Runs as a trace in Chrome's Trace Event Format, for ui.perfetto.dev: a process per run, and in it a track for the steps, one
for each sequence slot, counters, and the requests from arrival to answer.

Format: "Trace Event Format" (Chromium), the JSON object form. Times are microseconds from the start of the run. It must not
know where step records come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS_TID = 1  # and a track more for each lane whose steps overlap those of the first
SLOTS_TID = 1000  # of slot 0
ROUNDED_S = 3e-6  # records are: a step may seem to begin so long before the one before it ends
KINDS = {"d": "decode", "p": "prefill", "r": "computed again", "x": "wasted"}  # "w" holds its slot and gets nothing: no slice
HOLDS = "request in its slot"  # the category of the slice around those of its steps
LEFT = {"p": "preempted", "e": "ended with an error"}
PRIORITIES = {"i": "immediate", "d": "deferred", "m": "deferred, promoted"}

Event = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A request with its times in seconds from the start of the run; ``first_token_s`` is None where it is not known."""

    index: int
    priority: str
    arrival_s: float
    answered_s: float
    first_token_s: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)  # to be read beside it


@dataclass(frozen=True)
class Traced:
    """A run. ``steps``: step records with their ``end_s``, on the clock of the run."""

    name: str
    steps: Sequence[Mapping[str, Any]]
    requests: Iterable[Served]


def write_trace(path: Path, runs: Sequence[Traced], about: str) -> None:
    """Raises OSError."""
    events = [event for pid, run in enumerate(runs, 1) for event in _run(pid, run)]
    events.sort(key=_order)
    trace = {"displayTimeUnit": "ms", "otherData": {"about": about}, "traceEvents": events}
    path.write_text(json.dumps(trace), encoding="utf-8")


def _order(event: Event) -> tuple[bool, float, float, bool]:
    """Names first, then by time; what lies inside a slice that begins at the same moment comes after it."""
    return event["ph"] != "M", event.get("ts", 0.0), -event.get("dur", 0.0), event.get("cat") != HOLDS


def _run(pid: int, run: Traced) -> Iterator[Event]:
    yield _name("process_name", pid, 0, run.name)
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    yield from _steps(pid, run.steps)
    yield from _slots(pid, run)
    for request in run.requests:
        yield from _request(pid, request)


# ---- steps and counters


def _steps(pid: int, steps: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    free_at: list[float] = []  # when the last step of each of the steps' tracks is over
    for step in sorted(steps, key=_start_s):
        start_s, end_s = _start_s(step), float(step["end_s"])
        lane = next((lane for lane, at in enumerate(free_at) if at <= start_s + ROUNDED_S), len(free_at))
        if lane == len(free_at):
            yield _name("thread_name", pid, STEPS_TID + lane, "steps" if lane == 0 else f"steps, lane {lane + 1}")
            yield _sorted_at(pid, STEPS_TID + lane)
            free_at.append(0.0)
        start_s = max(start_s, free_at[lane])
        free_at[lane] = max(start_s, end_s)
        told = {key: step[key] for key in ("id", "computed", "tokens", "padding", "cached") if key in step}
        told |= {"why": "; ".join(f"{request}: {why}" for request, why in step.get("why", ()))} if step.get("why") else {}
        yield _slice(pid, STEPS_TID + lane, _step_name(step["cells"]), "step", start_s, end_s, told)
        batch = sum(cell not in ".w" for cell in step["cells"])
        yield _counter(pid, "batch size", "rows", start_s, batch)
        yield _counter(pid, "waiting requests", "requests", start_s, step["queue"])
        yield _counter(pid, "KV blocks in use, %", "%", start_s, round(100 * step["kv"], 2))
    if free_at:  # nothing runs any more
        yield _counter(pid, "batch size", "rows", max(free_at), 0)


def _step_name(cells: str) -> str:
    prefill, decode = bool(set(cells) & set("pr")), bool(set(cells) & set("dx"))
    return "prefill and decode" if prefill and decode else "prefill" if prefill else "decode"


def _start_s(step: Mapping[str, Any]) -> float:
    return float(step["end_s"] - step["ms"] / 1e3)


# ---- sequence slots


class _Slot:
    """Who holds a slot, and what it got so far."""

    def __init__(self, pid: int, slot: int) -> None:
        self._pid, self._tid = pid, SLOTS_TID + slot
        self.owner: tuple[int | None, str, str] = (None, "?", "from before the first record")  # serial, class, id
        self._begun_s: float | None = None
        self._ended_s = 0.0
        self._open: list[Any] | None = None  # kind, start, end, steps of the slice that may go on

    def takes(self, serial: int, cls: str, request_id: str) -> None:
        self.owner = (serial, cls, request_id)

    def gets(self, cell: str, start_s: float, end_s: float) -> Iterator[Event]:
        """What a step gave it. Steps of one kind that follow each other become one slice."""
        start_s = max(start_s, self._ended_s)  # slices of a track may not overlap
        end_s = max(start_s, end_s)
        if self._begun_s is None:
            self._begun_s = start_s
        if cell in KINDS:
            if self._open and self._open[0] == cell:
                self._open[2:] = [end_s, self._open[3] + 1]
            else:
                yield from self._close()
                self._open = [cell, start_s, end_s, 1]
        else:
            yield from self._close()
        self._ended_s = end_s

    def _close(self) -> Iterator[Event]:
        if self._open:
            cell, start_s, end_s, steps = self._open
            yield _slice(self._pid, self._tid, KINDS[cell], "slot", start_s, end_s, {"steps": steps})
        self._open = None

    def leaves(self, how: str = "") -> Iterator[Event]:
        """The slice of the request that was there, around those of its steps."""
        yield from self._close()
        if self._begun_s is not None:
            serial, cls, request_id = self.owner
            told = {"id": request_id, "class": PRIORITIES.get(cls, "unknown")}
            name = "request ?" if serial is None else f"request {serial}"
            yield _slice(self._pid, self._tid, name, HOLDS, self._begun_s, self._ended_s, told)
            if how in LEFT:
                yield {"ph": "i", "s": "t", "name": LEFT[how], "cat": "slot", "pid": self._pid, "tid": self._tid,
                       "ts": _us(self._ended_s)}  # fmt: skip
        self._begun_s = None


def _slots(pid: int, run: Traced) -> Iterator[Event]:
    used = max((len(step["cells"]) for step in run.steps), default=0)
    slots = [_Slot(pid, slot) for slot in range(used)]
    for slot in range(used):
        yield _name("thread_name", pid, SLOTS_TID + slot, f"slot {slot}")
        yield _sorted_at(pid, SLOTS_TID + slot)
    for step in run.steps:
        for slot, how in step["gone"]:
            if slot < used:
                yield from slots[slot].leaves(how)
        for slot, serial, cls, request_id in step["new"]:
            slots[slot].takes(serial, cls, request_id)
        for slot, cell in enumerate(step["cells"]):
            if cell != ".":
                yield from slots[slot].gets(cell, _start_s(step), float(step["end_s"]))
    for one in slots:
        yield from one.leaves()


# ---- requests


def _request(pid: int, request: Served) -> Iterator[Event]:
    """Nested asynchronous slices: the whole, and in it the time to the first token, where that is known."""
    common = {"cat": "request", "id": f"{pid}-{request.index}", "pid": pid, "tid": 0}
    named = common | {"name": f"{request.priority} request"}
    end_s = max(request.arrival_s, request.answered_s)
    yield named | {"ph": "b", "ts": _us(request.arrival_s), "args": {"request": request.index, **request.more}}
    if request.first_token_s is not None:
        first_s = min(max(request.arrival_s, request.first_token_s), end_s)
        for name, start_s, stop_s in (("to the first token", request.arrival_s, first_s), ("further tokens", first_s, end_s)):
            yield common | {"name": name, "ph": "b", "ts": _us(start_s)}
            yield common | {"name": name, "ph": "e", "ts": _us(stop_s)}
    yield named | {"ph": "e", "ts": _us(end_s)}


# ---- single events


def _slice(pid: int, tid: int, name: str, category: str, start_s: float, end_s: float, told: Mapping[str, Any]) -> Event:
    start, end = _us(start_s), _us(end_s)
    dur = round(max(0.0, end - start), 3)
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": start, "dur": dur, "args": dict(told)}


def _counter(pid: int, name: str, unit: str, at_s: float, value: float) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": _us(at_s), "args": {unit: value}}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted_at(pid: int, tid: int) -> Event:
    return {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
