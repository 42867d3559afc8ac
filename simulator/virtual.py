"""A clock that only moves when told, an executor that only answers how long a step takes, and the loop that joins them to the
real driver. Knows no threads, no model and no HTTP.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from batching.driver import Driver, Log
from batching.policy import Limits, Policy
from batching.request import Lane, Request
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from batching.step_time import StepTime


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
        step_time: Callable[[Step], float] = lambda step: 1.0,
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


def simulate(
    policy: Policy,
    limits: Limits,
    requests: Iterable[Request],
    step_time: Callable[[Step], float] = lambda step: 1.0,
    *,
    depth: int = 1,
    on_step: Callable[[Step], None] = lambda step: None,
    log: Log | None = None,
    known: Sequence[StepTime] = (),
) -> list[Request]:
    """Serve `requests`, each at its arrival, to the last. Returns them in the order of their answers. `known`: the step times
    of the model's variants, where the policy need not learn them.

    Raises PolicyFailed where the server would go on with the last good policy: here that would hide what is being tried.
    """
    clock = VirtualClock()
    answered: list[Request] = []

    def timed(step: Step) -> float:
        on_step(step)
        return step_time(step)

    driver = Driver(Scheduler(policy, limits, known), clock, answered.append, log)
    executor = VirtualExecutor(clock, timed, max(depth, limits.lanes))
    coming = deque(sorted(requests, key=lambda req: req.arrival))
    while True:
        while coming and coming[0].arrival <= clock.now:
            driver.submit(coming.popleft())
        due = driver.iterate(executor)
        if driver.last_failure:
            raise PolicyFailed(driver.last_failure)
        if due is None or due > clock.now:
            times = [time for time in (due, coming[0].arrival if coming else None) if time is not None]
            if not times:
                return answered
            clock.now = min(times)
