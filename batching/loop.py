"""The one background thread: it loads the model, then turns the driver's crank. HTTP threads put requests into its inbox and
wait on their own `threading.Event`; the thread sleeps on a condition, never in a polling loop.

Beside `watchdog.py` the only module of this room that starts threads and reads the clock.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol

from batching.driver import Driver, Log, describe_policy
from batching.policy import Limits, Policy
from batching.request import Refused, Request, RequestError
from batching.scheduler import Scheduler
from batching.step import Executor
from batching.step_log import StepLog
from batching.step_time import Probe
from batching.totals import Totals
from batching.view import Overdue
from batching.watchdog import Abandoned, Watchdog

log = logging.getLogger("batchlab")


class Health(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Unavailable(RequestError):
    """The server cannot take requests now: it is loading, draining, or has failed."""


class Signal(Protocol):
    """What is told that something has happened: a `threading.Event`, or anything else that is quickly done with `set`."""

    def set(self) -> None: ...


class Ticket(NamedTuple):
    """A request on its way. It is final once `event` is set; `token`, where there is one, is set at each of its tokens."""

    request: Request
    event: Signal
    token: Signal | None


class Engine(NamedTuple):
    """What loading gives: who computes, what fits, and what /stats says about both."""

    executor: Executor
    limits: Limits
    tokenizer: Any  # for the HTTP threads; this room never looks at it
    about: dict[str, Any]
    probes: Sequence[Probe] = ()  # steps measured while loading

    @property
    def served_names(self) -> Sequence[str]:
        """The names under which clients ask for the model; the first is in answers."""
        return self.about.get("served_model_names") or (self.about["model"],)


class BatchingLoop:
    def __init__(
        self,
        policy: Policy,
        load: Callable[[], Engine],
        *,
        clock: Callable[[], float] = time.monotonic,
        on_ready: Callable[[Engine], None] = lambda engine: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
        input_log: Log | None = None,
        policy_limit_s: float = 5.0,
    ) -> None:
        """`policy_limit_s`: a policy that takes longer for a plan is deposed."""
        self.clock = clock
        self.health = Health.LOADING
        self.reason = "the model is loading"
        self.engine: Engine | None = None
        self._policy = policy
        self._load = load
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._input_log = input_log
        self._driver: Driver | None = None
        self._condition = threading.Condition()
        self._inbox: list[Callable[[Driver], None]] = []
        self._taken: deque[Callable[[Driver], None]] = deque()  # out of it; the batching thread's own
        self._submitted = 0  # requests among the inbox's entries
        self._tickets: dict[str, Ticket] = {}
        self._switches: list[tuple[Policy, threading.Event]] = []  # the batching thread's own
        self._stopping = False
        self._policy_limit_s = policy_limit_s
        self._ended = threading.Event()  # nobody turns the crank any more

    def start(self) -> None:
        threading.Thread(target=self._run, name="batching", daemon=True).start()

    # Called from HTTP threads, and from the one that runs batches.

    def submit(self, request: Request, event: Signal | None = None, token: Signal | None = None) -> Ticket:
        """Hand a request over, to wait for on an Event of its own, or on what is given. Raises Unavailable, or Refused if the
        queue is full; whatever else is wrong with it comes as the request's error. Set in the batching thread."""
        ticket = Ticket(request, event or threading.Event(), token)
        with self._condition:
            driver = self._available()
            try:
                driver.scheduler.check_queue(ahead=self._submitted)
            except Refused as refused:
                driver.stats.on_error(refused.code)
                raise
            self._tickets[request.id] = ticket
            self._submitted += 1
            self._post(lambda driver: driver.submit(request))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its seat and blocks are freed at the next iteration."""
        error = RequestError("cancelled", "the client closed the connection, or gave the request up")
        with self._condition:
            self._post(lambda driver: driver.cancel(ticket.request.id, error))

    def switch(self, policy: Policy) -> threading.Event:
        """Let `policy` take over when nothing is resident; the event is set then (not if the thread ends before: `join`).
        Raises Unavailable."""
        done = threading.Event()

        def apply(driver: Driver) -> None:
            driver.switch(policy)
            self._switches.append((policy, done))

        with self._condition:
            self._available()
            self._post(apply)
        return done

    def in_time(self, make: Callable[[], Policy]) -> Policy:
        """What `make` gives, in the thread that calls; its code is the policy's. Raises Overdue."""
        watchdog = Watchdog(self._policy_limit_s)
        try:
            return watchdog(make)
        except Abandoned:
            raise Overdue("a policy is made in time", f"it took longer than {self._policy_limit_s:g} s") from None
        finally:
            watchdog.stop()

    def reset_stats(self) -> None:
        with self._condition:
            driver = self._available()
        driver.stats.reset(self.clock(), live=driver.scheduler.num_live > 0)

    def drain(self, reason: str) -> None:
        """Take nothing new, answer what is queued with 503, let what runs finish, then end the thread."""
        with self._condition:
            if self._stopping:
                return
            self._stopping = True
            self.health, self.reason = Health.DRAINING, reason
            self._post(lambda driver: driver.drain(Unavailable("draining", reason)))

    def abort(self, reason: str) -> None:
        """End whatever is still live, with 503: the time to drain is over."""
        with self._condition:
            for ticket in self._tickets.values():
                self._post(partial(Driver.cancel, request_id=ticket.request.id, error=Unavailable("draining", reason)))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; whether it has."""
        return self._ended.wait(timeout)

    def ready_engine(self) -> Engine:
        """Raises Unavailable while it loads, drains or has failed."""
        if self.engine is None or self.health is not Health.READY:
            raise Unavailable(self.health.value, self.reason)
        return self.engine

    @property
    def mode(self) -> dict[str, Any]:
        """The mode in force and its parameters."""
        return describe_policy(self._driver.scheduler.policy if self._driver else self._policy)

    @property
    def steps(self) -> StepLog:
        """The records of the steps. Raises Unavailable."""
        return self._available(draining=True).steps

    def stats(self) -> dict[str, Any]:
        """The driver's summary, and the queue as it stands. Raises Unavailable."""
        with self._condition:
            driver = self._available(draining=True)
        scheduler, model = driver.scheduler, driver.scheduler.step_times[0]
        return (
            driver.stats.summary(self.clock(), live=scheduler.num_live > 0)
            | self.state()
            | {
                "step_time": {"coefficients": model.coefficients, "margin": model.margin, "recent_s": model.recent_s},
                "last_policy_failure": driver.last_failure,
                "policy_changes": scheduler.policy_changes,
            }
        )

    def state(self) -> dict[str, Any]:
        """How it stands now: the part of `stats` that takes no time to know. Raises Unavailable."""
        with self._condition:
            driver = self._available(draining=True)
        scheduler = driver.scheduler
        return driver.stats.since_reset() | {
            "queue_depth": scheduler.num_waiting + self._submitted,
            "running": scheduler.num_resident,
            "kv_use": 1 - scheduler.blocks.num_free / scheduler.blocks.num_blocks,
            "kv_blocks": scheduler.blocks.num_blocks,
            "tbt_slo_ms": scheduler.limits.tbt_slo_ms,
        }

    def totals(self) -> Totals:
        """What was counted since the start, whatever was reset. Raises Unavailable."""
        with self._condition:
            driver = self._available(draining=True)
        return driver.stats.totals()

    def _available(self, draining: bool = False) -> Driver:
        if self._driver is None or not (self.health is Health.READY or (draining and self.health is Health.DRAINING)):
            raise Unavailable(self.health.value, self.reason)
        return self._driver

    def _post(self, entry: Callable[[Driver], None]) -> None:
        self._inbox.append(entry)
        self._condition.notify()

    # The batching thread.

    def _run(self) -> None:
        try:
            self.engine = self._load()
            scheduler = Scheduler(self._policy, self.engine.limits)
            driver = Driver(scheduler, self.clock, self._answer, self._input_log, self._token)
            for probe in self.engine.probes:
                driver.learn(probe)
            self._driver = driver
        except BaseException as error:
            self._fail(f"the model could not be loaded: {error}")
            self._ended.set()
            self._on_failed(error)
            return
        with self._condition:
            stopped_before = self._stopping
            if not stopped_before:
                self.health, self.reason = Health.READY, "ready"
        begin = () if stopped_before else (partial(self._on_ready, self.engine),)
        self._crank(self._driver, self.engine.executor, None, *begin)

    def _crank(self, driver: Driver, executor: Executor, due: float | None, *begin: Callable[[], None]) -> None:
        """To the end, or until another thread has taken this one's place."""
        watchdog = Watchdog(self._policy_limit_s, partial(self._replace, driver, executor))
        driver.scheduler.guard = watchdog
        try:
            for do in begin:
                do()
            self._turn(driver, executor, due)
        except Abandoned:
            return
        except BaseException as error:
            traceback.print_exc()
            self._fail(f"the batching thread ended: {type(error).__name__}: {error}")
            self._ended.set()
            self._on_failed(error)
        watchdog.stop()
        self._ended.set()

    def _replace(self, driver: Driver, executor: Executor, error: Overdue) -> None:
        """The batching thread is stuck in a policy, and has left all else as it was: a new one goes on without that policy."""
        crank = partial(self._crank, driver, executor, self.clock(), partial(driver.give_up, error))
        threading.Thread(target=crank, name="batching", daemon=True).start()

    def _turn(self, driver: Driver, executor: Executor, due: float | None) -> None:
        while not (self._stopping and not self._inbox and not self._taken and not self._tickets):
            with self._condition:
                if not self._inbox and not self._taken:
                    wait = None if due is None else due - self.clock()
                    if wait is None or wait > 0:
                        self._condition.wait(wait)
                self._taken.extend(self._inbox)
                self._inbox, self._submitted = [], 0
            while self._taken:
                self._taken.popleft()(driver)
            due = driver.iterate(executor)
            if error := driver.failure:
                goes_on = describe_policy(driver.scheduler.policy)["mode"]
                log.error("%s; going on with %s\n%s", driver.last_failure, goes_on, error.trace)
                driver.failure = None
            self._announce(driver)

        for _, event in self._switches:  # nobody takes over any more; who waits sees it by the server's health
            event.set()

    def _announce(self, driver: Driver) -> None:
        """Set the events of the switches that have taken place."""
        pending = {id(policy) for policy in driver.scheduler.switching}
        for policy, event in self._switches:
            if id(policy) not in pending:
                event.set()
        self._switches = [(policy, event) for policy, event in self._switches if id(policy) in pending]

    def _answer(self, request: Request) -> None:
        with self._condition:
            ticket = self._tickets.pop(request.id)
        ticket.event.set()

    def _token(self, request: Request) -> None:
        if (ticket := self._tickets.get(request.id)) and ticket.token:
            ticket.token.set()

    def _fail(self, reason: str) -> None:
        """Nobody computes any more: say so, and answer everyone."""
        with self._condition:
            self.health, self.reason = Health.FAILED, reason
            tickets, self._tickets = list(self._tickets.values()), {}
        for ticket in tickets:
            ticket.request.error = RequestError("engine_failed", reason)
            ticket.event.set()
