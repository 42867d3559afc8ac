"""Where a law of step times comes from: the step records of a running server, the input log of one, or steps made here on the
real engine. Also what else a log tells: the requests that came, and what became of them.
"""

import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batching.driver import LOG_SCHEMA
from batching.policies.dynamic import Dynamic
from batching.policy import Limits, Policy
from batching.replay import policy_of, replay
from batching.request import Request
from batching.step import Step
from batching.step_log import KEPT, SCHEMA, StepLog
from batching.step_time import Load, Probe
from client.shared.schema import SchemaError, check
from simulator.plans import Plan

if TYPE_CHECKING:
    from simulator.real import RealEngine

TIMEOUT_S = 30.0
NOT_SIMULATED = ("cancel", "switch", "drain", "failed step")  # what a log may hold beside requests
EXPIRED = ("deadline_exceeded", "deadline_missed")  # how a request ends that its deadline ended
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the steps made here
LONG_S = 10.0  # all over again until they took so long: a small model's steps are over in a moment of the machine's mood


class LogError(ValueError):
    """Steps that cannot be had or read; the message is one line."""


# ---- from a server


def read_steps(url: str, key: str = "") -> tuple[list[dict[str, Any]], Limits]:
    """A server's newest step records, and its limits. Raises LogError."""
    address = f"{url.rstrip('/')}/steps?limit={KEPT}"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            value = json.load(answer)
        check(value.get("schema"), SCHEMA, "step records")
        steps, limits = list(value["steps"]), Limits(**value["limits"])
    except urllib.error.HTTPError as error:
        raise LogError(f"--url: {address} answers {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise LogError(f"--url: {address}: {getattr(error, 'reason', error)}") from None
    except (KeyError, TypeError, AttributeError):
        raise LogError(f"--url: {address} answers, but not as a BatchLab server does") from None
    return steps, _of_one_variant(limits, f"--url: {address}")


def busy_steps(records: Sequence[Mapping[str, Any]]) -> list[Probe]:
    """The steps of step records with their seconds. Where a request was resident before there was no pause, so that a step's
    are those since the end of the one before, for it is more than its computation; elsewhere there may have been one, whether
    somebody waited or not (a batch's time-out), and they are those of its computation."""
    found = []
    for before, record in pairwise(records):
        since, computed = record["end"] - before["end"], record["ms"] / 1e3
        stayed = record["running"] > len(record["new"])
        if record["id"] == before["id"] + 1:
            found.append(Probe(Load(*record["load"]), since if stayed else min(since, computed)))
    return [step for step in found if step.seconds > 0]


def _of_one_variant(limits: Limits, name: str) -> Limits:
    if len(limits.variants) > 1:
        there_are = f"{len(limits.variants)} ({', '.join(limits.variants)})"
        raise LogError(f"{name}: variants: a law is that of one variant of a model, this engine has {there_are}")
    return limits


# ---- from an input log


@dataclass
class Logged:
    """A run, made again from its input log. `seconds`: of each step, as `replay` has it. `answered`: its requests, in the order
    of their answers. `unlike`: what of NOT_SIMULATED came."""

    policy: Policy
    limits: Limits
    plans: list[tuple]
    seconds: list[Probe]
    answered: list[Request]
    steps: StepLog
    unlike: list[str] = field(default_factory=list)

    @property
    def begun(self) -> float:
        """The first arrival, on the clock of the log."""
        return min((req.arrival for req in self.answered), default=0.0)

    def plan(self) -> Plan:
        """The same requests: they come when they came, and stop where they stopped. Those that were refused are left out."""
        taken_in = [req for req in self.answered if req.error is None or req.error.code in EXPIRED]
        taken_in.sort(key=lambda req: req.arrival)
        return Plan(len(taken_in), partial(_again, taken_in, self.begun), made=f"{len(taken_in)} requests of a log")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of `./server.sh MODE --input-log FILE`. Raises LogError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # the last may be half written
                raise LogError(f"{path}, line {number}: is not JSON: {error}") from None
    return records


def make_again(records: Sequence[Mapping[str, Any]], name: str = "the log") -> Logged:
    """Replay a log. Raises LogError."""
    seconds: list[Probe] = []
    answered: list[Request] = []

    def on_step(step: Step, took: float) -> None:
        if took > 0:
            seconds.append(Probe(step.load, took))

    try:
        if records[0].get("kind") == "start":
            check(records[0].get("schema"), LOG_SCHEMA, "an input log")
        limits = Limits(**records[0]["limits"])
        policy = policy_of(records[0])
        steps = StepLog(limits.max_batch_size)
        plans = replay(records, on_step=on_step, on_answer=answered.append, steps=steps)
        kinds = ["failed step" if record.get("error") else str(record["kind"]) for record in records]
    except SchemaError as error:
        raise LogError(f"{name}: {error}") from None
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise LogError(f"{name}: is no input log: {type(error).__name__}: {error}") from None
    steps.publish()
    unlike = [kind for kind in kinds if kind in NOT_SIMULATED]
    return Logged(policy, _of_one_variant(limits, name), plans, seconds, answered, steps, unlike)


def _again(taken_in: Iterable[Request], begun: float) -> Iterator[Request]:
    for index, req in enumerate(taken_in):
        again = Request(
            str(index),
            req.tokens[: req.prompt_len],
            req.max_tokens,
            req.priority,
            req.arrival - begun,
            None if req.deadline is None else req.deadline - begun,
            None if req.due is None else req.due - begun,
            output_len=req.output_len,
            prompt_logprobs=req.prompt_logprobs,
        )
        if req.finish_reason == "stop":
            again.stop = partial(_has, len(req.token_times))
        yield again


def _has(tokens: int, req: Request) -> bool:
    return len(req.token_times) >= tokens


# ---- made here


def make_steps(engine: "RealEngine", seed: int, told: Callable[[str], None]) -> list[Probe]:
    """Steps of every kind on the real engine: ever more users, with prompts and outputs of all lengths that fit."""
    steps: list[Probe] = []
    limits = engine.limits
    rng = random.Random(seed)
    while sum(step.seconds for step in steps) < LONG_S:
        for users in [users for users in USERS if users < limits.max_batch_size] + [limits.max_batch_size]:
            plan = Plan(users, partial(_mixture, users, limits, rng.random()), users)
            logged = make_again(engine.serve(Dynamic(), plan).log)
            steps += logged.seconds
            told(f"{users} users: {len(logged.seconds)} steps")
    return steps


def _mixture(count: int, limits: Limits, seed: float) -> Iterator[Request]:
    rng = random.Random(seed)
    room = min(limits.max_context, limits.num_blocks * limits.block_size)
    for index in range(count):
        prompt = rng.randint(1, max(1, room // 2))
        output = rng.randint(1, max(1, room // 8))
        yield Request(str(index), rng.choices(range(1000), k=prompt), output)
