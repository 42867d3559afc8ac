"""The plans of a logged run, made again from what came in: arrivals, cancels, switches, results and the times of planning.

The plans themselves are not in the log, so equality with the run's own plans shows that scheduling depends on nothing else.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, pairwise
from typing import Any

from batching.driver import Driver
from batching.plan import Plan
from batching.policies import POLICIES
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError, SamplingParams
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from batching.step_log import StepLog
from batching.step_time import Load, Probe
from batching.view import Overdue


def replay(
    log: Iterable[Mapping[str, Any]],
    *,
    on_step: Callable[[Step, float], None] = lambda step, seconds: None,
    on_answer: Callable[[Request], None] = lambda req: None,
    steps: StepLog | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> list[tuple]:
    """The steps (`Step.values()`) that the run behind `log` made. Raises KeyError or TypeError for a malformed record.

    `on_step` is told of each step that succeeded how long it kept the engine: since the end of the one before, or since it was
    planned where the engine had been idle. `steps` keeps the steps' records."""
    records = iter(log)
    start = next(records)
    now, ended, idle, stopped, made = 0.0, 0.0, True, set[str](), []
    under_way: dict[int, tuple[Step, bool]] = {}  # with whether the engine was idle before
    scheduler = Scheduler(policy_of(start), Limits(**start["limits"]))
    driver = Driver(scheduler, lambda: now, on_answer, steps=steps, on_plan=on_plan)
    for record, following in pairwise(chain(records, [{"kind": "end"}])):
        now = record.get("now", now)
        if following["kind"] == "overdue" and record["kind"] != "overdue":
            scheduler.guard = _overdue_once(scheduler, following["told"])
        match record["kind"]:
            case "probe":
                driver.learn(Probe(Load(*record["load"]), record["seconds"], record["variant"]))
            case "submit":
                driver.submit(_request(record, stopped))
            case "cancel":
                driver.cancel(record["id"], RequestError(record["code"], "replayed"))
            case "switch":
                driver.switch(policy_of(record))
            case "drain":
                driver.drain(RequestError(record["code"], "replayed"))
            case "plan":
                if step := driver.next_step():
                    made.append(step.values())
                    under_way[step.id] = step, idle
                idle = not under_way
            case "result":
                stopped.clear()
                stopped.update(record["stopped"])
                error = record["error"] and RuntimeError(record["error"])
                driver.complete(StepResult(record["step"], record["started"], record["ended"], record["tokens"], error))
                step, was_idle = under_way.pop(record["step"])
                if error is None:
                    on_step(step, record["ended"] - (step.planned_at if was_idle else ended))
                ended = record["ended"]
    return made


def _overdue_once(scheduler: Scheduler, told: str) -> Callable[[Callable[[], Any]], Any]:
    """The guard of a policy that did not answer in time: it is not asked again, or this would take as long."""

    def guard(ask: Callable[[], Any]) -> Any:
        scheduler.guard = lambda ask: ask()
        raise Overdue("a policy answers in time", told)

    return guard


def policy_of(record: Mapping[str, Any]) -> Policy:
    return POLICIES[record["mode"]].from_arguments(record["params"])


def _request(record: Mapping[str, Any], stopped: set[str]) -> Request:
    """The request of a submit record; it stops where `stopped`, the record at hand, says so."""
    return Request(
        record["id"],
        list(record["tokens"]),
        record["max_tokens"],
        Priority(record["priority"]),
        record["arrival"],
        record["deadline"],
        record["due"],
        SamplingParams(**record["sampling"]),
        stop=lambda req: req.id in stopped,
        output_len=record["output_len"],
        prompt_logprobs=record["prompt_logprobs"],
    )
