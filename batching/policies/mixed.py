"""Immediate and deferred requests in one batch: the two classes of FlexiBatch (relatives: ConServe, HyGen, Sarathi-Serve).

While immediate requests are there, no step is to last longer than the limit on the time between tokens. They are planned
first: decodes, then prompts in chunks as large as the limit allows. What the step-time model says is left goes to deferred
requests, earliest due first (those with a common prefix beside each other), each in the largest chunk that fits; some KV
blocks stay free for immediate requests to come. An immediate request that lacks a seat or blocks preempts deferred ones,
latest due first. Without immediate requests neither limit nor reserve applies, and deferred work fills the engine as under
`dynamic`.

Nobody starves: a deferred request that is due no later than it can be finished (times a safety factor) becomes immediate, and
so does the first in line after so many steps in which all deferred work was passed over. It takes its place by its arrival.

Left out: swapping instead of recomputing (ConServe's checkpoints), preemption inside a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from batching.policy import Planner, Policy, View
from batching.request import Priority, Request

PREFIX = 64  # tokens by which requests due at the same time are ordered


@dataclass(frozen=True)
class MixedParams:
    tbt_slo_ms: float = 0.0  # limit on the time between tokens; 0: the engine's own, measured when it started
    kv_reserve: float = 0.05  # share of the KV blocks that deferred work leaves free
    safety: float = 1.5  # on the predicted remaining time, before it is compared with the time left
    max_passes: float = 100  # steps in which the first deferred request in line may be passed over

    def __post_init__(self) -> None:
        for name, low, high in (("tbt_slo_ms", 0, 3.6e6), ("kv_reserve", 0, 1), ("safety", 0, 100), ("max_passes", 1, 1e9)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must lie between {low:g} and {high:g}, not {getattr(self, name):g}")


class Mixed(Policy):
    Params = MixedParams
    first: Request | None = None  # of the deferred, in the last step; passed over in so many steps:
    passes = 0

    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.release(*view.done)
        live = [*view.resident, *view.waiting]
        interactive = any(req.priority is Priority.IMMEDIATE for req in live)
        if interactive:
            for req in live:
                if not req.urgent and (why := self._promotes(req, view, now)):
                    plan.promote(req, why)
        immediate = sorted(filter(plan.urgent, view.resident), key=_arrival)
        deferred = sorted((req for req in view.resident if not plan.urgent(req)), key=_place)
        ranking = immediate + deferred  # who goes first when seats or blocks are short: the last

        _run(plan, (req for req in immediate if req.remaining == 1), ranking)  # their tokens are never held back
        if interactive:
            plan.time_limit_s = (self.params.tbt_slo_ms or view.limits.tbt_slo_ms) / 1000
        _run(plan, (req for req in immediate if req.remaining > 1), ranking)
        arriving = sorted(filter(plan.urgent, view.waiting), key=_arrival)
        _run(plan, arriving, ranking, spare=len(immediate))
        if interactive:
            plan.keep_free = int(self.params.kv_reserve * view.limits.num_blocks)
        _run(plan, deferred, ranking)
        if (
            plan.free_seats and not plan.preempted and all(req in plan for req in arriving)
        ):  # what others need is not taken back
            _run(plan, sorted((req for req in view.waiting if not plan.urgent(req)), key=_place), ranking, spare=len(ranking))
        self._count_passes(plan, [req for req in live if not plan.urgent(req)])
        return plan

    def _promotes(self, req: Request, view: View, now: float) -> str | None:
        if req is self.first and self.passes >= self.params.max_passes:
            return f"promoted: passed over in {self.passes} steps"
        if req.due is None:
            return None
        steps = req.max_tokens - req.num_generated + req.remaining // view.limits.token_budget
        needs = self.params.safety * steps * view.step_time.recent_s
        return f"promoted: due in {req.due - now:.1f} s, may need {needs:.1f} s" if now + needs >= req.due else None

    def _count_passes(self, plan: Planner, deferred: list[Request]) -> None:
        first = min(deferred, key=_place) if deferred and not any(req in plan for req in deferred) else None
        self.passes = self.passes + 1 if first and first is self.first else int(first is not None)
        self.first = first


def _run(plan: Planner, requests: Iterable[Request], ranking: list[Request], spare: int = 0) -> None:
    """Each in turn gets its tokens, at the cost of those ranked last but for the first `spare`, until the step is full."""
    for req in requests:
        while req not in plan.preempted and not plan.run(req):
            if plan.refusal not in ("seats", "blocks") or len(ranking) <= spare or ranking[-1] is req:
                return
            victim = ranking.pop()
            plan.preempt(victim)
            plan.because(victim, f"preempted: its {plan.refusal} went to request {req.id}")


def _arrival(req: Request) -> float:
    return req.arrival


def _place(req: Request) -> tuple[float, list[int]]:
    """In the line of deferred requests: by when it is due, then by how its prompt begins, so that common prefixes meet."""
    return inf if req.due is None else req.due, req.tokens[: min(req.prompt_len, PREFIX)]
