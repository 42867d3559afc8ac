"""Request-level batching with deadlines and model variants: the problem of CENG523 (docs/ceng523.md).

Batches are `static`'s rectangles; when one starts, how large it is and which variant of the model runs it are chosen online,
earliest deadline first. Of the variants whose capacity covers the arrival rate, the most accurate one runs the largest batch
that its first request's slack allows (SlackFit, of SuperServe: Khare et al., NSDI'25) and that leaves time for those behind.
Where there is none, the first request is rejected. A batch that falls behind the arrivals waits for one more, if one is to be
expected, while the slack allows it (the adaptive batching of Proteus: Ahmad et al., ASPLOS'24). Service times come from the
engine's step-time models. Left out: several devices, Proteus' linear program that places variants, SuperServe's subnetworks.
"""

from dataclasses import dataclass
from math import inf

from batching.params import Params, number
from batching.policies.static import Static, rectangle
from batching.policies.support.capacity import ArrivalRate, Shape, capacity, covering, service_times, slack_fit
from batching.policy import Plan, RequestView, View

LONG_GAP = 3.0  # in mean gaps between arrivals: with Poisson arrivals one in twenty is longer


@dataclass(frozen=True)
class DeadlineParams(Params):
    deadline_ms: float = number(10_000, 1, 3.6e6)  # default deadline from arrival, for immediate requests without one
    window_s: float = number(5, 0.01, 3600)  # over which the arrival rate is estimated
    hysteresis: float = number(0.1, 0, 0.9)  # share of its capacity to spare before a more accurate variant comes back


class Deadline(Static):
    """Preempts: nobody; a request that would be late is rejected.
    Reserves: KV for the whole rectangle, when the batch begins.
    Prefix cache: not used: prompts run whole.
    """

    Params = DeadlineParams
    variant = 0  # of the batch that runs
    level = 0  # the most accurate variant whose capacity covered the arrivals, last time

    def __init__(self, params: DeadlineParams | None = None) -> None:
        super().__init__(params)
        self.rate = ArrivalRate(self.params.window_s)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.variant = self.variant
        self.rate.see(view.waiting)
        if view.resident:
            self.go_on(plan, view)
        if view.resident or any(req.in_flight for req in view.done):  # times count from when the device is free
            return plan

        plan.release(*view.done)
        queue, rate = sorted(view.waiting, key=self._deadline), self.rate.per_second(now)
        kept = self._covering(view, queue[0], rate) if queue else []
        while batch := rectangle(queue, view.limits, plan.free_blocks):
            due_s, following = [self._deadline(req) - now for req in queue], queue[1 : len(batch) + 1]
            if min(service_times(step_time, batch[:1])[1] for step_time in view.step_times) <= due_s[0]:
                times = [service_times(step_time, batch) for step_time in view.step_times]  # [variant][rows]
                behind = [service_times(step_time, following) for step_time in view.step_times]
                if choice := slack_fit(times, behind, due_s, self.params.deadline_ms / 1e3, kept):
                    break
            plan.reject(queue.pop(0), "rejected: no batch could meet its deadline and leave time for those behind it")
        else:
            return plan
        variant, size = choice
        if size == len(queue) < view.limits.max_batch_size and size < rate * times[variant][size]:  # it falls behind
            expected = max(req.arrival for req in queue) + LONG_GAP / rate
            if now < (latest := min(expected, now + due_s[0] - times[variant][size + 1])):
                plan.wait_until(latest)
                return plan
        self.variant = plan.variant = variant
        self.start(plan, batch[:size])
        left = f"{rate:.3g} requests/s, {1e3 * due_s[0]:.0f} ms to the deadline"
        plan.because(batch[0], f"batch of {size} on {view.limits.variants[variant]}: {left}")
        return plan

    def _covering(self, view: View, head: RequestView, rate: float) -> list[int]:
        shape, most, limit_s = Shape().around(head), view.limits.max_batch_size, self.params.deadline_ms / 1e3
        capacities = [capacity(step_time, most, shape, limit_s) for step_time in view.step_times]
        kept = covering(capacities, rate, self.level, self.params.hysteresis)
        self.level = kept[0]
        return kept

    def _deadline(self, req: RequestView) -> float:
        """Its own; else the usual one for immediate requests, and none for deferred ones, which so come last."""
        if req.deadline is not None:
            return req.deadline
        return req.arrival + self.params.deadline_ms / 1e3 if req.urgent else inf
