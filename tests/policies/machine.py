"""A virtual machine whose step times follow a law, which the engine has learned before the first request, as on a server."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from batching.driver import Driver
from batching.policy import Limits, Policy
from batching.request import Request
from batching.scheduler import Scheduler
from batching.step import Step
from batching.step_time import Load, Probe
from simulator.virtual import VirtualClock, VirtualExecutor
from tests.told import Plans

Law = Callable[[Load], float]
LOADS = [
    Load.of([(1, start)] * decodes + [(chunk, context)] * (chunk > 0))
    for decodes in (0, 1, 4, 16)
    for start in (10, 300)
    for chunk, context in ((0, 0), (7, 0), (60, 0), (200, 0), (60, 400))
    if decodes or chunk
]


class Run(NamedTuple):
    driver: Driver
    steps: list[Step]
    plans: Plans
    answered: list[Request]

    def rows(self) -> list[dict[str, int]]:
        """Who got how many tokens, step by step."""
        return [{row.req.id: row.count for row in step.rows} for step in self.steps]


def a_gpt(load: Load) -> float:
    """Seconds: 5 ms a step, 0.3 ms a prompt token, 0.8 ms a decode, and what attention takes."""
    return 0.005 + 3e-4 * load.prefill + 8e-4 * load.decodes + 1e-6 * load.kv + 1e-7 * load.products


def a_millisecond_a_token(load: Load) -> float:
    return 1e-3 * (load.prefill + load.decodes)


def serve(policy: Policy, limits: Limits, requests: list[Request], law: Law = a_gpt) -> Run:
    """All of `requests`, each at its arrival, to the last answer."""
    clock = VirtualClock()
    plans = Plans()
    run = Run(Driver(Scheduler(policy, limits), clock, lambda req: run.answered.append(req), on_plan=plans), [], plans, [])
    for load in LOADS * 20:
        run.driver.learn(Probe(load, law(load)))

    def timed(step: Step) -> float:
        run.steps.append(step)
        return law(Load.of((row.count + row.pad, row.start) for row in step.rows))

    executor = VirtualExecutor(clock, timed)
    coming = deque(sorted(requests, key=lambda req: req.arrival))
    while True:
        while coming and coming[0].arrival <= clock.now:
            run.driver.submit(coming.popleft())
        due = run.driver.iterate(executor)
        assert run.driver.last_failure is None
        if due is None or due > clock.now:
            times = [time for time in (due, coming[0].arrival if coming else None) if time is not None]
            if not times:
                return run
            clock.now = min(times)
