"""Request-level batching with deadlines and model variants: the problem of CENG523 (docs/ceng523.md).

Batches are `static`'s rectangles; when one starts, how large it is and which variant of the model runs it are chosen online,
earliest deadline first. Of the variants whose capacity covers the arrival rate, the most accurate one runs the largest batch
that its first request's slack allows (SlackFit, of SuperServe: Khare et al., NSDI'25) and that leaves time for those behind.
Where there is none, the first request is rejected. A batch that falls behind the arrivals waits for one more, if one is to be
expected, while the slack allows it (the adaptive batching of Proteus: Ahmad et al., ASPLOS'24). Service times come from the
engine's step-time models. Left out: several devices, Proteus' linear program that places variants, SuperServe's subnetworks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from batching.capacity import ArrivalRate, Shape, capacity, covering, service_times
from batching.policies.static import Static, rectangle
from batching.policy import Planner, View
from batching.request import Request

LONG_GAP = 3.0  # in mean gaps between arrivals: with Poisson arrivals one in twenty is longer


@dataclass(frozen=True)
class DeadlineParams:
    deadline_ms: float = 10_000.0  # from arrival, for requests that bring none
    window_s: float = 5.0  # over which the arrival rate is estimated
    hysteresis: float = 0.1  # share of its capacity that a more accurate variant must have to spare before it comes back

    def __post_init__(self) -> None:
        for name, low, high in (("deadline_ms", 1, 3.6e6), ("window_s", 0.01, 3600), ("hysteresis", 0, 0.9)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must lie between {low} and {high:g}, not {getattr(self, name):g}")


class Deadline(Static):
    Params = DeadlineParams
    variant = 0  # of the batch that runs
    level = 0  # the most accurate variant whose capacity covered the arrivals, last time

    def __init__(self, params: DeadlineParams | None = None) -> None:
        super().__init__(params)
        self.rate = ArrivalRate(self.params.window_s)

    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view, budget=view.limits.max_prefill_tokens)
        plan.variant = self.variant
        self.rate.see(view.waiting)
        if view.resident:
            self.go_on(plan, view)
            return plan

        plan.release(*view.done)
        queue, rate = sorted(view.waiting, key=self._deadline), self.rate.per_second(now)
        while batch := rectangle(queue, view.limits, plan.free_blocks):
            times = [service_times(step_time, batch) for step_time in view.step_times]  # [variant][rows]
            if choice := self._choose(queue, times, self._covering(view, batch[0], rate), now):
                break
            plan.reject(queue.pop(0), "rejected: no batch could meet its deadline and leave time for those behind it")
        else:
            return plan
        (variant, size), deadline = choice, self._deadline(batch[0])
        if size == len(queue) < view.limits.max_batch_size and size < rate * times[variant][size]:  # it falls behind
            expected = max(req.arrival for req in queue) + LONG_GAP / rate
            if now < (latest := min(expected, deadline - times[variant][size + 1])):
                plan.wait_until(latest)
                return plan
        self.variant = plan.variant = variant
        self.start(plan, batch[:size])
        left = f"{rate:.3g} requests/s, {1e3 * (deadline - now):.0f} ms to the deadline"
        plan.because(batch[0], f"batch of {size} on {view.limits.variants[variant]}: {left}")
        return plan

    def _choose(
        self, queue: Sequence[Request], times: list[list[float]], kept: list[int], now: float
    ) -> tuple[int, int] | None:
        """Variant and size of a batch that ends in time for its first request, and for the next batch to be in time: that of up
        to the largest size that takes half of the limit."""
        head, soonest = queue[0], [min(column) for column in zip(*times, strict=True)]  # soonest: by rows
        half = (self._deadline(head) - head.arrival) / 2
        most = len(soonest) - 2
        usual = max((rows for rows in range(1, most + 1) if soonest[rows] <= half), default=1)
        for variant, size in ((v, b) for v in (*kept, *range(len(times))) for b in range(most, 0, -1)):
            ends, rest = now + times[variant][size], min(len(queue) - size, usual)
            if ends <= self._deadline(head) and (not rest or ends + soonest[rest] <= self._deadline(queue[size])):
                return variant, size
        return None

    def _covering(self, view: View, head: Request, rate: float) -> list[int]:
        limit_s, most = self._deadline(head) - head.arrival, view.limits.max_batch_size
        capacities = [capacity(step_time, most, Shape().around(head), limit_s) for step_time in view.step_times]
        kept = covering(capacities, rate, self.level, self.params.hysteresis)
        self.level = kept[0]
        return kept

    def _deadline(self, req: Request) -> float:
        return req.arrival + self.params.deadline_ms / 1e3 if req.deadline is None else req.deadline
