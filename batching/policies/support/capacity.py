"""What a model can carry and what is asked of it: how long a batch takes, the largest arrival rate that batches keep up with,
and the rate at which requests come in. Plain arithmetic for policies that choose by load; it must not know of plans.
"""

from collections.abc import Iterable, Sequence
from math import exp, inf
from typing import NamedTuple, Protocol

from batching.step_time import Load
from batching.view import RequestView


class Bounds(Protocol):
    """How long a step may take: a variant's step times as a policy sees them, or a model of them."""

    def bound(self, load: Load) -> float: ...


class Shape(NamedTuple):
    """The rectangle that each row of a request-level batch fills: tokens of the longest prompt, and of the longest output."""

    prompt: int = 0
    output: int = 0

    def around(self, req: RequestView) -> "Shape":
        return Shape(max(self.prompt, req.remaining), max(self.output, req.to_generate))


def service_time(step_time: Bounds, rows: int, shape: Shape) -> float:
    """Seconds within which a batch should be served: a step for its prompts, then one for each further token."""
    prompt, output = shape
    seconds = step_time.bound(Load.of([(prompt, 0)]).times(rows))
    if output > 1:
        middle = (
            prompt + (output - 1) // 2
        )  # the cache that a decode reads grows by a column each step: on average it has so many
        seconds += (output - 1) * step_time.bound(Load.of([(1, middle)]).times(rows))
    return seconds


def service_times(step_time: Bounds, queue: Sequence[RequestView]) -> list[float]:
    """Of batches of the first 0, 1, 2, ... requests in `queue`, up to all of them and one more of the same kind."""
    shapes = [Shape()]
    for req in queue:
        shapes.append(shapes[-1].around(req))
    return [0.0] + [service_time(step_time, rows, shapes[min(rows, len(queue))]) for rows in range(1, len(queue) + 2)]


def capacity(step_time: Bounds, most_rows: int, shape: Shape, limit_s: float) -> float:
    """Requests a second that batches of the best size up to `most_rows` keep up with, if each is to be answered within
    `limit_s` though it came when the batch before had just begun: a batch may take half of it. 0 if none is so quick."""
    times = ((rows, service_time(step_time, rows, shape)) for rows in range(1, most_rows + 1))
    return max((rows / time if time else inf for rows, time in times if 2 * time <= limit_s), default=0.0)


def covering(capacities: Sequence[float], rate: float, level: int, hysteresis: float) -> list[int]:
    """The places of those that cover `rate`, else of the largest; of equal ones the last, which is the cheapest. To come back
    to one before `level` it must have a share of `hysteresis` to spare."""
    spare = [hysteresis if place < level else 0 for place in range(len(capacities))]
    kept = [place for place, carries in enumerate(capacities) if carries * (1 - spare[place]) >= rate]
    return kept or [max(range(len(capacities)), key=lambda place: (capacities[place], place))]


def slack_fit(
    times: list[list[float]], behind: list[list[float]], due_s: list[float], limit_s: float, kept: list[int]
) -> tuple[int, int] | None:
    """Variant and size of a batch of the first in line that ends in time for them, and for the next batch to be in time: that
    of up to the largest size that takes half of `limit_s`. The variants in `kept` are preferred, then the largest batch. None
    if there is none. `times`: seconds by variant and rows, `behind`: of those after the first in line; `due_s`: seconds left
    to each."""
    soonest = [min(column) for column in zip(*behind, strict=True)]  # by rows
    usual = max((rows for rows in range(1, len(soonest) - 1) if soonest[rows] <= limit_s / 2), default=1)
    for variant, size in ((v, b) for v in (*kept, *range(len(times))) for b in range(len(times[0]) - 2, 0, -1)):
        ends, rest = times[variant][size], min(len(due_s) - size, usual)
        if ends <= due_s[0] and (not rest or ends + soonest[rest] <= due_s[size]):
            return variant, size
    return None


class ArrivalRate:
    """Requests a second, of late: each arrival counts, and counts less and less with a time constant of `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._waiting: set[RequestView] = set()  # those that have been counted
        self._count = 0.0  # weighted by age, as of `_at`
        self._first = self._at = 0.0

    def see(self, waiting: Iterable[RequestView]) -> None:
        """Count those that were not there the last time."""
        waiting = set(waiting)
        for req in sorted(waiting - self._waiting, key=lambda req: req.arrival):
            if not self._count:
                self._first = self._at = req.arrival
            at = max(self._at, req.arrival)
            self._count = self._count * exp((self._at - at) / self._window_s) + 1
            self._at = at
        self._waiting = waiting

    def per_second(self, now: float) -> float:
        """The estimate at `now`, 0 before there was an arrival. What came before the first one is not known: the mean is over
        the time since, but over a tenth of the window at least."""
        if not self._count:
            return 0.0
        since = max(now - self._first, self._window_s / 10)
        weights = self._window_s * (1 - exp(-since / self._window_s))
        return self._count * exp((self._at - now) / self._window_s) / weights
