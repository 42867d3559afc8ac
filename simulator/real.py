"""The real engine in this process, for `calibrate` and `validate`: a plan served on the model, as the batching thread would,
but without HTTP. The only file of the simulator that knows the model, and that waits.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from batching.driver import Driver
from batching.policy import Limits, Policy
from batching.request import Request
from batching.scheduler import Scheduler
from batching.step import Executor, Step, StepResult
from batching.step_time import Probe
from model.engine import load_model, make_executor
from model.probe import probe
from simulator.plans import ClosedLoop, Plan


class RunClock:
    """Seconds since the start of a run."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._begun = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._begun


@dataclass
class RealRun:
    """The input log of a run, and the plans that were made."""

    log: list[dict[str, Any]] = field(default_factory=list)
    plans: list[tuple] = field(default_factory=list)


class Noting:
    """An executor that notes the plans on their way to another one."""

    def __init__(self, executor: Executor, plans: list[tuple]) -> None:
        self.depth = executor.depth
        self._executor = executor
        self._plans = plans

    def submit(self, step: Step) -> None:
        self._plans.append(step.values())
        self._executor.submit(step)

    def collect(self) -> StepResult:
        return self._executor.collect()


class RealEngine:
    """A model with its limits, loaded once for several runs. Raises what `load_model` and `make_executor` do."""

    def __init__(self, name: str, weights: str, dtype: str, limits: Limits, tbt_slo_ms: float | None = None) -> None:
        """Of `limits` what a server's settings say: slots, token budget, queue and prefix caching; and no more KV blocks than
        they have. Without `tbt_slo_ms` it is measured. The others an engine finds out by itself."""
        loaded = load_model(name, weights, dtype, "auto", fall_back=False)
        self._clock = RunClock()
        slots, budget, queue = limits.max_batch_size, limits.token_budget, limits.max_queue
        self._executor, found = make_executor(loaded, self._clock, slots, budget, queue, None)
        num_blocks = min(found.num_blocks, limits.num_blocks)
        found, self._probes = probe(self._executor, replace(found, num_blocks=num_blocks, prefix_caching=limits.prefix_caching))
        self.limits = found if tbt_slo_ms is None else replace(found, tbt_slo_ms=tbt_slo_ms)
        self.about = f"{loaded.name}, {loaded.weights} weights, {loaded.dtype} on {loaded.device}"
        self.encode: Callable[[str], list[int]] = loaded.tokenizer.encode
        self.vocabulary = loaded.tokenizer.vocab_size

    @property
    def probes(self) -> list[Probe]:
        """Steps measured while loading."""
        return self._probes

    def serve(self, policy: Policy, plan: Plan, on_answer: Callable[[Request], None] = lambda req: None) -> RealRun:
        """Serve the plan in real time, to its last request."""
        run = RealRun()
        coming = plan.arrivals()

        def answered(req: Request) -> None:
            on_answer(req)
            if isinstance(coming, ClosedLoop):
                coming.answered(req)

        gc.collect()
        gc.freeze()  # as in app.py
        self._clock.start()
        driver = Driver(Scheduler(policy, self.limits), self._clock, answered, run.log.append)
        for measured in self._probes:
            driver.learn(measured)
        executor = Noting(self._executor, run.plans)
        self._clock.start()
        while True:
            while (arrival := coming.due) is not None and arrival <= self._clock():
                driver.submit(self._known(coming.take()))
            due = driver.iterate(executor)
            if due is None and coming.due is None:
                return run
            wake_at = min(inf if time is None else time for time in (due, coming.due))
            if (wait := wake_at - self._clock()) > 0:
                time.sleep(wait)

    def _known(self, req: Request) -> Request:
        """With tokens that the vocabulary has."""
        req.tokens = [token % self.vocabulary for token in req.tokens]
        return req
