"""What each step did, slot by slot, for whoever watches: the dashboard, the client's report, a recording.

A record is made once, as JSON text, in the batching thread, and shared by all readers. Slots are numbers that are given out
here, the lowest free one first; the engine itself knows only how many there are. Times come with the results: this file reads
no clock.
"""

import json
import threading
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any, NamedTuple

from batching.plan import Plan
from batching.request import Priority, Request
from batching.step import Row, Step, StepResult

SCHEMA = 1  # of a record; raised when a field changes its meaning or goes, not when one joins
KEPT = 10_000  # records; the newest
MAX_REASONS = 20  # in a record, of a policy that gives one for each request that waits
SHOWN_ID = 64  # characters


class Seat(NamedTuple):
    slot: int
    preemptions: int  # of its request when it sat down: more of them later mean that it has lost this seat


class StepLog:
    """Written by the batching thread, read by HTTP threads."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots))  # a heap
        self._seats: dict[Request, Seat] = {}
        self._serials: dict[Request, int] = {}  # of requests that have sat and are not yet answered
        self._last_serial = 0
        self._planned: dict[int, dict[str, Any]] = {}  # records that are not published, by step id
        self._complete: dict[str, Any] | None = None  # of the last result; goes out when its answers are known
        self._done: list[list[Any]] = []
        self._promoted: set[str] = set()  # by the plans since the last step
        self._why: dict[str, str] = {}  # of the same plans, by request id
        self._condition = threading.Condition()
        self._ring = [""] * KEPT  # a record's place is its id modulo KEPT
        self._last = 0

    # What the driver reports.

    def on_plan(self, plan: Plan) -> None:
        """A plan was committed. The record of the next step, its own if it has one, tells of it."""
        self._promoted.update(req.id for req in plan.promoted)
        for request, why in plan.reasons.items():
            if len(self._why) < MAX_REASONS or request in self._why:
                self._why[request] = why

    def on_step(
        self, step: Step, residents: Iterable[Request], mode: str, queue: int, kv: float, since_reset: dict[str, Any]
    ) -> None:
        """A step was planned. `residents` hold a seat now, in the order in which they got it. `since_reset`: as /stats has it
        with this step."""
        seats, residents = self._seats, dict.fromkeys(residents)
        gone = self._leave(residents)
        new = [self._shown(req) for req in seats if req.id in self._promoted] if self._promoted else []
        for req in [req for req in residents if req not in seats]:
            self._sit(req)
            new.append(self._shown(req))
        cells = ["."] * self.slots
        if len(step.rows) < len(seats):
            for slot, _ in seats.values():
                cells[slot] = "w"
        for row in step.rows:
            cells[seats[row.req][0]] = _cell(row)
        reasons = [[id[:SHOWN_ID], why] for id, why in self._why.items()]
        self._promoted.clear()
        self._why.clear()
        self._planned[step.id] = {
            "id": step.id,
            "end": 0.0,
            "ms": 0.0,
            "mode": mode,
            "cells": "".join(cells).rstrip("."),
            "new": new,
            "gone": gone,
            "queue": queue,
            "running": len(self._seats),
            "kv": round(kv, 4),
            "computed": step.num_tokens,
            "cached": step.num_cached,
            "tokens": 0,
            "padding": step.num_padding,
            **since_reset,
            "load": step.load,
            "why": reasons,
        }

    def on_result(self, result: StepResult, tokens: int) -> None:
        """A step is over; `tokens` of its result counted."""
        self.publish()
        self._complete = self._planned[result.step_id]
        times = {"end": round(result.ended, 6), "ms": round(1e3 * (result.ended - result.started), 3)}
        self._complete.update(times, tokens=tokens)

    def on_answer(self, req: Request) -> None:
        """Answered requests go into the record of the last step that is complete: class, server TTFT, TPOT, E2EL in
        milliseconds, tokens."""
        self._serials.pop(req, None)
        if req.error is not None or req.answered_at is None or not req.token_times:
            return
        tpot = None if req.tpot is None else _ms(req.tpot)
        self._done.append([_class(req), _ms(req.server_ttft), tpot, _ms(req.e2el), len(req.token_times)])

    def publish(self) -> None:
        """Let readers have the last complete step's record, once it is known who was answered after it, and the other lane's
        steps before it are complete."""
        if self._complete is None:
            return
        self._complete["done"], self._done, self._complete = self._done, [], None
        while (record := next(iter(self._planned.values()), None)) and "done" in record:
            self._show(self._planned.pop(record["id"]))

    def _show(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":"))
        with self._condition:
            self._last = record["id"]
            self._ring[self._last % KEPT] = text
            self._condition.notify_all()

    # What readers see.

    @property
    def last(self) -> int:
        """The newest record's id; 0 before there is one."""
        return self._last

    def read(self, after: int, limit: int) -> tuple[int, list[str]]:
        """Up to `limit` records beyond the id `after`, oldest first, and the id of the last of them (else `after`). An `after`
        that was never given out is from before a restart: everything is new then."""
        with self._condition:
            first = self._first(after)
            stop = min(self._last + 1, first + limit)
            return max(stop - 1, first - 1), [self._ring[id % KEPT] for id in range(first, stop)]

    def wait(self, after: int, limit: int, timeout: float) -> tuple[int, list[str]]:
        """As `read`, but waits up to `timeout` seconds until there is something."""
        with self._condition:
            self._condition.wait_for(lambda: self._first(after) <= self._last, timeout)
        return self.read(after, limit)

    def _first(self, after: int) -> int:
        return max(1 if after > self._last else after + 1, self._last - KEPT + 1)

    # Seats.

    def _leave(self, residents: dict[Request, None]) -> list[list[Any]]:
        """Who has left since the last step: preempted, ended with an error, or finished."""
        left = [req for req, (_, times) in self._seats.items() if req not in residents or req.preemptions > times]
        gone = []
        for req in left:
            slot, times = self._seats.pop(req)
            how = "p" if req.preemptions > times else "f" if req.error is None else "e"
            gone.append([slot, how])
            heappush(self._free, slot)
        return sorted(gone)

    def _sit(self, req: Request) -> None:
        self._seats[req] = Seat(heappop(self._free), req.preemptions)
        if req not in self._serials:
            self._last_serial += 1
            self._serials[req] = self._last_serial

    def _shown(self, req: Request) -> list[Any]:
        return [self._seats[req].slot, self._serials[req], _class(req), req.id[:SHOWN_ID]]


def _cell(row: Row) -> str:
    """What the slot got in this step, as one character."""
    if row.count == 0:
        return "x"
    if row.start < row.req.lost:
        return "r"
    return "d" if row.start >= row.req.prompt_len else "p"


def _class(req: Request) -> str:
    return "m" if req.promoted else "i" if req.priority is Priority.IMMEDIATE else "d"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
