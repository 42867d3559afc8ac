"""The real driver, scheduler and policies in virtual time: a clock that only moves when told, an executor that only answers how
long a step takes, and engines ("replicas") that are woken in the order of their events. Knows no threads, no model and no HTTP,
and neither where requests come from nor what is made of their answers.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from typing import Any, Protocol

from batching.driver import Driver, Log
from batching.plan import Plan
from batching.policy import Limits, Policy
from batching.request import Lane, Request
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from batching.step_log import StepLog
from batching.step_time import StepTime

StepTimeOf = Callable[[Step], float]  # seconds that a step takes


class PolicyFailed(Exception):
    """The policy raised or broke a rule; the message names both."""


class VirtualClock:
    """Seconds since the start of the run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class VirtualExecutor:
    """Takes `step_time(step)` seconds a step, one after another in each lane; lanes do not slow each other down. The token
    drawn at column n is n, so that an output shows whether each of its tokens was computed from the right place. Steps with
    an id in `failing` fail."""

    def __init__(
        self,
        clock: VirtualClock,
        step_time: StepTimeOf = lambda step: 1.0,
        depth: int = 1,
        failing: Collection[int] = (),
    ) -> None:
        self.depth = depth
        self._clock = clock
        self._step_time = step_time
        self._failing = failing
        self._under_way: list[tuple[Step, float, float]] = []
        self._free_at = dict.fromkeys(Lane, 0.0)  # a step starts when its lane's step before has ended

    def submit(self, step: Step) -> None:
        started = max(self._clock.now, self._free_at[step.lane])
        self._free_at[step.lane] = ended = started + self._step_time(step)
        self._under_way.append((step, started, ended))

    def collect(self) -> StepResult:
        first = min(self._under_way, key=lambda entry: entry[2])  # to end; the oldest of several
        self._under_way.remove(first)
        step, started, ended = first
        self._clock.now = max(self._clock.now, ended)
        error = RuntimeError(f"step {step.id} was told to fail") if step.id in self._failing else None
        tokens = {row.req.id: row.start + row.count for row in step.rows if row.samples and error is None}
        return StepResult(step.id, started, ended, tokens, error)


class Unwatched(StepLog):
    """Keeps no record of the steps: where nobody looks at them, making them would be a sixth of the work."""

    def __init__(self) -> None:
        super().__init__(0)

    def on_step(
        self, step: Step, residents: Iterable[Request], mode: str, queue: int, kv: float, since_reset: dict[str, Any]
    ) -> None:
        pass

    def on_plan(self, plan: Plan) -> None:
        pass

    def on_result(self, result: StepResult, tokens: int) -> None:
        pass

    def on_answer(self, req: Request) -> None:
        pass


class Replica:
    """One engine. `due`: when its next iteration is, None while it waits for somebody to come."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        step_time: StepTimeOf,
        on_answer: Callable[[Request], None],
        *,
        depth: int = 1,
        log: Log | None = None,
        steps: StepLog | None = None,
        known: Sequence[StepTime] = (),
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        """`known`: the step times of the model's variants, where the policy need not learn them."""
        self.clock = VirtualClock()
        scheduler = Scheduler(policy, limits, known)
        self.driver = Driver(scheduler, self.clock, on_answer, log, steps=steps or Unwatched(), on_plan=on_plan)
        self.due: float | None = None
        self._executor = VirtualExecutor(self.clock, step_time, max(depth, limits.lanes))

    def submit(self, req: Request) -> None:
        """Take in a request at its arrival, or at the end of the step that is under way then. Raises PolicyFailed."""
        self.clock.now = max(self.clock.now, req.arrival)
        self.driver.submit(req)
        self._check()
        self.due = self.clock.now

    def iterate(self) -> None:
        """The iteration that is due. Raises PolicyFailed."""
        assert self.due is not None
        self.clock.now = max(self.clock.now, self.due)
        self.due = self.driver.iterate(self._executor)
        self._check()

    def _check(self) -> None:
        if error := self.driver.failure:  # a server would go on with the last good policy: here that would hide what is tried
            cause = error.__cause__
            if isinstance(cause, KeyboardInterrupt):  # it came while the policy was asked, and is not its fault
                raise cause
            raise PolicyFailed(f"{self.driver.last_failure}\n{error.trace}") from cause


class Arrivals(Protocol):
    """Requests in the order of their arrivals."""

    @property
    def due(self) -> float | None:
        """When the next one comes; None if, as far as is known now, none does."""
        ...

    def take(self) -> Request:
        """The one that is due."""
        ...


class OpenLoop:
    """Requests that come when they come, whatever became of those before. They have to be in order."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self._advance()

    def take(self) -> Request:
        req = self._next
        assert req is not None
        self._advance()
        return req

    def _advance(self) -> None:
        self._next = next(self._requests, None)
        self.due = self._next.arrival if self._next else None


def serve(replicas: Sequence[Replica], coming: Arrivals, route: Callable[[Request], Replica] | None = None) -> None:
    """Serve to the last what comes; `route` says which replica gets a request (the first, where there is one). Events happen in
    the order of their times, arrivals before iterations. Raises PolicyFailed."""
    first, several = replicas[0], len(replicas) > 1
    while True:
        replica = min(replicas, key=_due) if several else first
        arrival, due = coming.due, replica.due
        if arrival is not None and (due is None or arrival <= due):
            req = coming.take()
            (route(req) if route else first).submit(req)
        elif due is not None:
            replica.iterate()
        else:
            return


def _due(replica: Replica) -> float:
    return inf if replica.due is None else replica.due


def simulate(
    policy: Policy,
    limits: Limits,
    requests: Iterable[Request],
    step_time: StepTimeOf = lambda step: 1.0,
    *,
    depth: int = 1,
    on_step: Callable[[Step], None] = lambda step: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    log: Log | None = None,
    known: Sequence[StepTime] = (),
) -> list[Request]:
    """Serve `requests`, each at its arrival, to the last. Returns them in the order of their answers. `known`: the step times
    of the model's variants, where the policy need not learn them. Raises PolicyFailed."""
    answered: list[Request] = []

    def timed(step: Step) -> float:
        on_step(step)
        return step_time(step)

    replica = Replica(policy, limits, timed, answered.append, depth=depth, log=log, known=known, on_plan=on_plan)
    serve([replica], OpenLoop(sorted(requests, key=lambda req: req.arrival)))
    return answered
