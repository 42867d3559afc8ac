"""The plans of a logged run, made again from what came in: arrivals, cancels, switches, results and the times of planning.

The plans themselves are not in the log, so equality with the run's own plans shows that scheduling depends on nothing else.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from batching.driver import Driver
from batching.policies import POLICIES
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError, SamplingParams
from batching.scheduler import Scheduler
from batching.step import StepResult
from batching.step_time import Load, Probe


def replay(log: Iterable[Mapping[str, Any]]) -> list[tuple]:
    """The plans (`Step.plan()`) that the run behind `log` made. Raises KeyError or TypeError for a malformed record."""
    records = iter(log)
    start = next(records)
    now, stopped, plans = 0.0, set[str](), []
    driver = Driver(Scheduler(_policy(start), Limits(**start["limits"])), lambda: now, on_answer=lambda req: None)
    for record in records:
        now = record.get("now", now)
        match record["kind"]:
            case "probe":
                driver.learn(Probe(Load(*record["load"]), record["seconds"], record["variant"]))
            case "submit":
                driver.submit(_request(record, stopped))
            case "cancel":
                driver.cancel(record["id"], RequestError(record["code"], "replayed"))
            case "switch":
                driver.switch(_policy(record))
            case "drain":
                driver.drain(RequestError(record["code"], "replayed"))
            case "plan":
                if step := driver.plan():
                    plans.append(step.plan())
            case "result":
                stopped.clear()
                stopped.update(record["stopped"])
                error = record["error"] and RuntimeError(record["error"])
                driver.complete(StepResult(record["step"], record["started"], record["ended"], record["tokens"], error))
    return plans


def _policy(record: Mapping[str, Any]) -> Policy:
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
