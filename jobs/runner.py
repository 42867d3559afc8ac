"""Runs the lines of batches as deferred requests of the engine, in a thread of its own, and ends each batch when its time has
come.

What it knows of a batch stands in the store; what it holds in memory (which lines are under way) can be lost at any moment: a
line without a result is run again. Must not know HTTP: how a line is read and answered it is told when it is made.
"""

import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil
from typing import Any, Protocol

from batching.loop import BatchingLoop, Engine, Ticket, Unavailable
from batching.request import Priority, Refused, Request, RequestError, State
from jobs.check import check
from jobs.errors import Conflict, DamagedLine, JobError, NotFound, StoreError
from jobs.records import Batch, Line, Result, Status
from jobs.store import Store

LINES_A_READ = 256  # from the store
LOOK_S = 1.0  # between looks at the clock and the store while batches are there
RETRY_S = 0.05  # before a line is offered again that found the queue full
ATTEMPTS = 3  # of a line whose step or policy failed, not the line itself
AT_ONCE = 64  # lines that will not do, before what came back is looked at again
PATIENCE_S = 10.0  # with a disk that fails a batch: it is taken up again for so long
STAGES = 20  # a batch's lines are due in so many groups,
FIRST, LAST = 0.25, 0.95  # from when so much of the window has passed until then
LEFT = {
    Status.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Status.CANCELLED: ("batch_cancelled", "This request was not executed: the batch was cancelled."),
}
PASSING = ("queue_full", "cancelled", "deadline_exceeded", "draining", "failed", "engine_failed")  # says nothing of the line
FAILURES = ("step_failed", "policy_failed")

log = logging.getLogger("batchlab")


class Call(Protocol):
    """A line's body, read."""

    @property
    def requests(self) -> Sequence[Request]: ...

    def answer(self) -> dict[str, Any]: ...


@dataclass(eq=False)
class LineUnderWay:
    line: Line
    job: "Job"
    call: Call
    signal: Callable[["LineUnderWay"], None]
    left: int  # requests not yet answered
    tickets: list[Ticket] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self) -> None:
        """One of its requests is answered."""
        with self.lock:
            self.left -= 1
            last = self.left == 0
        if last:
            self.signal(self)


@dataclass(eq=False)
class Job:
    """A batch in progress. Its lines are due in stages that are spread over what is left of its window."""

    batch: Batch
    begun: float  # on the engine's clock
    expires: float
    remaining: int  # lines without a result when it was begun
    lines: list[Line] = field(default_factory=list)  # read from the store, and not yet run; the next one last
    under_way: set[LineUnderWay] = field(default_factory=set)
    attempts: dict[int, int] = field(default_factory=dict)
    fed: int = 0
    read_up_to: int = 0
    ending: Status | None = None

    def due(self) -> float:
        """When the next line should be finished."""
        return self.begun + due_share((self.fed + 1) / max(1, self.remaining)) * (self.expires - self.begun)


def due_share(place: float) -> float:
    """How much of a batch's window has passed when the line at `place` (0 to 1, the last) is due."""
    return FIRST + (LAST - FIRST) * ceil(STAGES * min(1.0, place)) / STAGES


class Runner:
    def __init__(
        self,
        store: Store,
        loop: BatchingLoop,
        read: Callable[[dict[str, Any], Engine, float], Call],
        describe: Callable[[Exception], tuple[int, dict[str, Any]]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`read` makes a call of a line's body, or raises; `describe` gives the status and body of what was raised."""
        self._store = store
        self._loop = loop
        self._read = read
        self._describe = describe
        self._wall = wall
        self._signals: queue.SimpleQueue[LineUnderWay | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._rejected: list[Result] = []  # to be recorded
        self._failing: dict[str, float] = {}  # batches that the disk fails, and since when
        self._other_model: set[str] = set()  # batches that wait for their model
        self._retry_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def start(self) -> None:
        """Go on with whatever is unfinished, once the engine is ready."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Record what has come in, then end the thread."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout)

    def wake(self) -> None:
        """Something in the store has changed."""
        self._signals.put(None)

    # The thread.

    def _run(self) -> None:
        wait: float | None = 0.0
        while not self._stopping:
            finished = self._take_signals(wait)
            try:
                self._record(finished)
                if self._stopping:
                    break
                self._look()
                wait = self._feed()
            except Unavailable:  # the engine still loads, or drains: then lines go on after the next start
                wait = LOOK_S
            except Exception:
                log.exception("batches: going on in a second")
                wait = LOOK_S
        self._record(self._take_signals(0.0))

    def _take_signals(self, wait: float | None) -> list[LineUnderWay]:
        """The lines that were answered meanwhile; none if nothing happens for `wait` seconds, for ever if that is None."""
        taken: list[LineUnderWay | None] = []
        try:
            taken.append(self._signals.get(timeout=wait))
            while True:
                taken.append(self._signals.get_nowait())
        except queue.Empty:
            return [line for line in taken if line is not None]

    def _record(self, finished: list[LineUnderWay]) -> None:
        """Everything that has come in, in one transaction a batch: on the disk before it is counted."""
        results, self._rejected = self._rejected, []
        for line in finished:
            line.job.under_way.discard(line)
            if result := self._result(line):
                results.append(result)
        for batch_id, group in groupby(sorted(results, key=lambda result: result.batch_id), key=lambda result: result.batch_id):
            try:
                self._store.record(list(group))
                self._failing.pop(batch_id, None)
            except StoreError as error:
                self._give_up(batch_id, error)

    def _result(self, done: LineUnderWay) -> Result | None:
        """What came of a line; None if it has to run again."""
        error = next((req.error for req in done.call.requests if req.error is not None), None)
        job, line = done.job, done.line
        if error is None:
            try:
                return _result(job.batch, line, 200, done.call.answer())
            except Exception as inside:
                return _result(job.batch, line, *self._describe(inside))
        if error.code in FAILURES:
            job.attempts[line.number] = job.attempts.get(line.number, 0) + 1
        if error.code in PASSING or (error.code in FAILURES and job.attempts[line.number] < ATTEMPTS):
            job.lines.append(line)
            return None
        return _result(job.batch, line, *self._describe(error))

    def _look(self) -> None:
        """Bring the jobs up to what the store says, and end those whose time has come."""
        for batch in self._store.unfinished():
            try:
                self._advance(batch)
            except (Conflict, NotFound):  # cancelled or deleted while we looked
                self.wake()
            except StoreError as error:
                self._give_up(batch.id, error)

    def _advance(self, batch: Batch) -> None:
        job = self._jobs.get(batch.id)
        expired = self._wall() >= batch.expires_at
        if batch.status is Status.VALIDATING and not expired:
            batch = self._validate(batch)
        if batch.status is Status.FINALIZING:  # interrupted there; what it was to become stands in the store
            self._store.finish(batch.id, Status.COMPLETED)
        elif batch.status is Status.CANCELLING:
            self._end(batch, job, Status.CANCELLED)
        elif expired:
            self._end(batch, job, Status.EXPIRED)
        elif batch.status is Status.IN_PROGRESS and self._has_its_model(batch):
            if job is None:
                job = self._jobs[batch.id] = self._begin(batch)
            self._refill(job)
            if not job.lines and not job.under_way:
                job.read_up_to = 0  # so that no line is left out, whatever happened
                self._refill(job)
                if not job.lines:
                    self._end(batch, job, Status.COMPLETED)

    def _has_its_model(self, batch: Batch) -> bool:
        """Or was the server started with another one? Then it waits, until it expires, for the next start."""
        served = self._loop.ready_engine().served_names
        if batch.model not in served and batch.id not in self._other_model:
            log.warning("%s waits: it is for %s, this server has %s", batch.id, batch.model, ", ".join(served))
            self._other_model.add(batch.id)
        return batch.model in served

    def _validate(self, batch: Batch) -> Batch:
        models = self._loop.ready_engine().served_names
        with self._store.open_file(batch.input_file_id) as file:
            lines, errors = check(file, batch.endpoint, models)
        return self._store.reject(batch.id, errors) if errors else self._store.accept(batch.id, lines, models[0])

    def _begin(self, batch: Batch) -> Job:
        now = self._loop.clock()
        done = batch.counts.completed + batch.counts.failed
        return Job(batch, now, now + batch.expires_at - self._wall(), batch.counts.total - done)

    def _refill(self, job: Job) -> None:
        if not job.lines:
            lines = self._store.pending(job.batch.id, job.read_up_to, LINES_A_READ)
            busy = {line.line.number for line in job.under_way}
            job.read_up_to = lines[-1].number if lines else job.read_up_to
            job.lines = [line for line in reversed(lines) if line.number not in busy]

    def _end(self, batch: Batch, job: Job | None, status: Status) -> None:
        """Stop what still runs; once nothing does, write the files."""
        if job is not None and job.under_way:
            if job.ending is None:
                job.ending = status
                self._cancel(job)
            return
        self._store.finish(batch.id, status, LEFT.get(status))
        self._jobs.pop(batch.id, None)

    def _give_up(self, batch_id: str, error: JobError) -> None:
        """The disk or the store fails this batch; others go on. It comes up again with what it has recorded; if that lasts, it
        has failed. Where not even that can be written, it comes up again too."""
        log.error("%s: %s", batch_id, error.message)
        if job := self._jobs.pop(batch_id, None):
            self._cancel(job)
        now = self._loop.clock()
        if now - self._failing.setdefault(batch_id, now) < PATIENCE_S:
            return
        try:
            self._store.fail(batch_id, error.code, error.message)
        except Conflict:
            pass
        except JobError as again:
            log.error("%s: cannot be marked as failed: %s", batch_id, again.message)

    def _cancel(self, job: Job) -> None:
        for line in job.under_way:
            for ticket in line.tickets:
                self._loop.cancel(ticket)

    # Feeding the engine.

    @property
    def _most_waiting(self) -> int:
        """Requests in the engine's queue: those that the next batch can take, and half of the queue at most."""
        limits = self._loop.ready_engine().limits
        return max(1, min(limits.max_batch_size, limits.max_queue // 2))

    def _feed(self) -> float | None:
        """Hand lines over, those first that are due first, until enough of them wait. Returns in how many seconds to look
        again."""
        now = self._loop.clock()
        if now < self._retry_at:
            return self._retry_at - now
        busy = [line for job in self._jobs.values() for line in job.under_way]
        waiting = sum(req.state is State.WAITING for line in busy for req in line.call.requests)
        while waiting < self._most_waiting and len(self._rejected) < AT_ONCE:
            ready = [job for job in self._jobs.values() if job.lines and job.ending is None and now < job.expires]
            if not ready:
                break
            job = min(ready, key=Job.due)
            alone = job.attempts.get(job.lines[-1].number, 0) > 0  # it may have failed its neighbours: once more, without any
            if alone and busy:
                break
            try:
                waiting += self._start(job, job.lines.pop())
            except Refused:
                self._retry_at = now + RETRY_S
                return RETRY_S
            self._refill_quietly(job)
            if alone:
                break
        if self._rejected:
            return 0.0
        left = [job.batch.expires_at - self._wall() for job in self._jobs.values() if job.ending is None]
        if not self._jobs:
            return LOOK_S if self._store.unfinished() else None
        return min([LOOK_S, *(max(0.0, seconds) for seconds in left)])

    def _refill_quietly(self, job: Job) -> None:
        try:
            self._refill(job)
        except StoreError as error:
            self._give_up(job.batch.id, error)

    def _start(self, job: Job, line: Line) -> int:
        """Hand a line's requests to the engine; how many. One that will not do gets its result at once. Raises Refused while
        the queue is full; the line comes again then."""
        try:
            body = json.loads(self._store.read_line(job.batch, line))["body"]
            if body.get("stream"):
                raise RequestError("invalid_value", "stream: a batch has nobody to stream to", "stream")
            call = self._read(body, self._loop.ready_engine(), self._loop.clock())
        except Unavailable:
            job.lines.append(line)
            raise
        except StoreError as error:
            self._give_up(job.batch.id, error)
            return 0
        except DamagedLine as error:
            self._rejected.append(_result(job.batch, line, None, {"code": error.code, "message": error.message}))
            return 0
        except Exception as error:
            self._rejected.append(_result(job.batch, line, *self._describe(error)))
            return 0
        due = job.due()
        job.fed += 1
        under_way = LineUnderWay(line, job, call, self._signals.put, len(call.requests))
        for req in call.requests:
            req.priority, req.deadline, req.due = Priority.DEFERRED, job.expires, due
        job.under_way.add(under_way)
        for place, req in enumerate(call.requests):
            try:
                under_way.tickets.append(self._loop.submit(req, under_way))
            except RequestError as error:
                self._withdraw(under_way, place, error)
                raise
        return len(call.requests)

    def _withdraw(self, line: LineUnderWay, place: int, error: RequestError) -> None:
        """Its requests from `place` on were not taken; the line comes again once those before are cancelled."""
        for req in line.call.requests[place:]:
            req.error = error
        for ticket in line.tickets:
            self._loop.cancel(ticket)
        for _ in line.call.requests[place:]:
            line.set()


def _result(batch: Batch, line: Line, status: int | None, body: dict[str, Any]) -> Result:
    """A line of the output or error file. Without a status nobody has answered: `body` is the batch's own error then."""
    response = None if status is None else {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    entry = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": response,
        "error": body if status is None else None,
    }
    return Result(batch.id, line.number, status == 200, json.dumps(entry))
