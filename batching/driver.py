"""One iteration after another, on any clock and any executor: the batching thread on the server, a plain loop in virtual time.

Everything that reaches the scheduler passes through here and can be logged: requests, cancels, switches, the times of
planning, results. Feeding that log back (`replay.py`) gives the same plans, since the scheduler depends on nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from batching.params import Params
from batching.plan import Plan
from batching.policies import mode_of
from batching.policy import PlanError, Policy
from batching.request import Refused, Request, RequestError
from batching.scheduler import Scheduler
from batching.stats import Stats
from batching.step import Executor, Step, StepResult
from batching.step_log import StepLog
from batching.step_time import Probe
from batching.view import Overdue

Log = Callable[[dict[str, Any]], None]  # takes one JSON-ready record
LOG_SCHEMA = 1  # in the first record; raised when a log of before cannot be replayed any more


class Driver:
    """Turns the crank of one scheduler, with an executor to compute. Not thread-safe: one thread drives."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        on_answer: Callable[[Request], None],
        log: Log | None = None,
        on_token: Callable[[Request], None] = lambda req: None,
        steps: StepLog | None = None,
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        """`steps`: who keeps the steps' records, if not a log of the driver's own. `on_plan`: is told of each plan that was
        committed, before its step is computed."""
        self.scheduler = scheduler
        self.stats = Stats(clock())
        self.steps = StepLog(scheduler.limits.max_batch_size) if steps is None else steps
        self._clock = clock
        self._on_answer = on_answer
        self._log = log
        self._on_token = on_token
        self._on_plan = on_plan
        self._under_way = 0
        self._submitting: tuple[Request, float] | None = None
        self.failure: PlanError | None = None  # of the policy that was deposed last, until somebody has told of it
        self.last_failure: str | None = None  # in a line
        self._write("start", schema=LOG_SCHEMA, **describe_policy(scheduler.policy), limits=asdict(scheduler.limits))

    def learn(self, probe: Probe) -> None:
        """A step that was measured before the first request came."""
        self._write("probe", load=list(probe.load), seconds=probe.seconds, variant=probe.variant)
        self.scheduler.step_times[probe.variant].observe(probe.load, probe.seconds)

    # What comes in, at the driver's own time.

    def submit(self, req: Request) -> None:
        """Queue `req`; one that is refused is answered with its `Refused`."""
        now = self._clock()
        if self._log:
            self._write("submit", now=now, **describe_request(req))
        self.stats.on_submit(now)
        self._submitting = req, now
        self._queue(req, now)

    def _queue(self, req: Request, now: float) -> None:
        while self._submitting:
            try:
                self.scheduler.submit(req, now)
            except PlanError as error:
                self._depose(error, now)  # and ask the next one; the last resort raises nothing
                continue
            except Refused as refused:
                req.error = refused
                self.stats.on_answer(req)
                self._on_answer(req)
            self._submitting = None

    def cancel(self, request_id: str, error: RequestError) -> None:
        now = self._clock()
        self._write("cancel", now=now, id=request_id, code=error.code)
        self.scheduler.cancel(request_id, now, error)
        self._hand_out()

    def switch(self, policy: Policy) -> None:
        self._write("switch", **describe_policy(policy))
        self.scheduler.switch(policy)

    def drain(self, error: RequestError) -> None:
        now = self._clock()
        self._write("drain", now=now, code=error.code)
        self.scheduler.drain(now, error)
        self._hand_out()

    # The crank.

    def iterate(self, executor: Executor) -> float | None:
        """One iteration. Returns when the next one is due: a time, now if at once, None if only when something comes in."""
        step = self.next_step()
        if step:
            executor.submit(step)
            self._under_way += 1
        if self._under_way and (step is None or self._under_way == executor.depth):
            self.complete(executor.collect())
            self._under_way -= 1
            return self._clock()
        return self._clock() if step else self.scheduler.wake_at

    def next_step(self) -> Step | None:
        """The next step; a policy that breaks a rule is deposed, and there is none."""
        now = self._clock()
        self._write("plan", now=now)
        try:
            step = self.scheduler.next_step(now)
        except PlanError as error:
            self._depose(error, now)
            step = None
        self._hand_out()
        self.steps.publish()
        if plan := self.scheduler.plan:
            self.stats.on_plan(plan, self.scheduler.last_step + (step is None), now)
            self.steps.on_plan(plan)
            self._on_plan(plan)
        if step:
            scheduler, blocks = self.scheduler, self.scheduler.blocks
            in_use = blocks.num_blocks - blocks.num_free
            self.stats.on_step(step, in_use)
            mode, kv = mode_of(scheduler.policy), in_use / blocks.num_blocks
            self.steps.on_step(step, scheduler.resident, mode, scheduler.num_waiting, kv, self.stats.since_reset())
        return step

    def complete(self, result: StepResult) -> None:
        continued = self.scheduler.complete(result)
        stopped = [req.id for req in continued if req.finish_reason == "stop"]
        error = None if result.error is None else str(result.error)
        times = {"started": result.started, "ended": result.ended}
        self._write("result", step=result.step_id, **times, tokens=dict(result.tokens), stopped=stopped, error=error)
        self.stats.on_result(result, continued)
        self.steps.on_result(result, len(continued))
        for req in continued:
            self._on_token(req)
        self._hand_out()

    def give_up(self, error: Overdue) -> None:
        """The policy has not come back, in another thread: depose it, and finish what was under way."""
        self._depose(error, self._clock())
        if self._submitting:
            self._queue(*self._submitting)
        self._hand_out()

    def _depose(self, error: PlanError, now: float) -> None:
        if isinstance(error, Overdue):
            self._write("overdue", now=now, told=error.detail)
        self.failure, self.last_failure = error, self.scheduler.depose(error, now)
        self.scheduler.wake_at = now

    def _hand_out(self) -> None:
        for req in self.scheduler.take_answered():
            self.stats.on_answer(req)
            self.steps.on_answer(req)
            self._on_answer(req)

    def _write(self, kind: str, **fields: Any) -> None:
        if self._log:
            self._log({"kind": kind, **fields})


def describe_policy(policy: Policy) -> dict[str, Any]:
    return {"mode": mode_of(policy), "params": asdict(policy.params) if isinstance(policy.params, Params) else {}}


def describe_request(req: Request) -> dict[str, Any]:
    """A request as it came in, in JSON's terms, without its stop condition, which is code."""
    return {
        "id": req.id,
        "tokens": list(req.tokens),
        "max_tokens": req.max_tokens,
        "priority": req.priority.value,
        "arrival": req.arrival,
        "deadline": req.deadline,
        "due": req.due,
        "sampling": asdict(req.sampling),
        "output_len": req.output_len,
        "prompt_logprobs": req.prompt_logprobs,
    }
