"""Immediate and deferred requests in one batch: the two classes of FlexiBatch (relatives: ConServe, HyGen, Sarathi-Serve).

While immediate requests are there, no step is to last longer than the limit on the time between tokens. They are planned
first: decodes, then prompts in chunks as large as the limit allows. What the step-time model says is left goes to deferred
requests, earliest due first (of those due together, common prefixes beside each other), each in the largest chunk that fits;
of deferred requests that begin alike the first computes the common prefix, and the others wait until it is in the prefix cache;
some seats and KV blocks stay free for immediate requests to come. An immediate request that lacks a seat or blocks preempts
deferred ones, latest due first. Without immediate requests neither limit nor reserve applies: deferred work fills the engine
as under `dynamic`.

Nobody starves: a deferred request that is due no later than it can be finished (times a safety factor) becomes immediate, and
so does the first in line after so many steps in which all deferred work was passed over. It takes its place by its arrival.

Left out: swapping instead of recomputing (ConServe's checkpoints), preemption inside a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from batching.policy import Planner, Policy, View
from batching.request import Priority, Request

PREFIX = 64  # tokens by which requests due together are ordered
TOGETHER_S = 10.0  # those that came within so long are due together, if they do not say when


@dataclass(frozen=True)
class MixedParams:
    tbt_slo_ms: float = 0.0  # limit on the time between tokens; 0: the engine's own, measured when it started
    kv_reserve: float = 0.05  # share of the KV blocks that deferred work leaves free
    seat_reserve: float = 0.05  # and of the sequence slots: an arrival that finds one free preempts nobody
    safety: float = 1.5  # on the predicted remaining time, before it is compared with the time left
    max_passes: float = 100  # steps in which the first deferred request in line may be passed over
    patience_s: float = 600.0  # a deferred request that does not say when it is due is so long after its arrival

    def __post_init__(self) -> None:
        most = {"tbt_slo_ms": 3.6e6, "kv_reserve": 1, "seat_reserve": 1, "safety": 100, "max_passes": 1e9, "patience_s": 1e9}
        for name, high in most.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must lie between 0 and {high:g}, not {getattr(self, name):g}")


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
        deferred = sorted((req for req in view.resident if not plan.urgent(req)), key=self._rank)
        ranking = immediate + deferred  # who goes first when seats or blocks are short: the last

        _run(plan, (req for req in immediate if req.remaining == 1), ranking)  # their tokens are never held back
        if interactive:
            plan.time_limit_s = (self.params.tbt_slo_ms or view.limits.tbt_slo_ms) / 1000
        _run(plan, (req for req in immediate if req.remaining > 1), ranking)
        arriving = sorted(filter(plan.urgent, view.waiting), key=_arrival)
        _run(plan, arriving, ranking, spare=len(immediate))
        if interactive:
            plan.keep_blocks = int(self.params.kv_reserve * view.limits.num_blocks)
            plan.keep_seats = int(self.params.seat_reserve * view.limits.max_batch_size)
        _run(plan, deferred, ranking)
        given_up = plan.preempted or not all(req in plan for req in arriving)  # for others: it is not taken back
        if plan.free_seats and not given_up:
            in_line = sorted((req for req in view.waiting if not plan.urgent(req)), key=self._place)
            _run(plan, (req for req in in_line if not plan.prefix_coming(req)), ranking, spare=len(ranking))
        self._count_passes(plan, [req for req in live if not plan.urgent(req)])
        return plan

    def _promotes(self, req: Request, view: View, now: float) -> str | None:
        if req is self.first and self.passes >= self.params.max_passes:
            return f"promoted: passed over in {self.passes} steps"
        steps = req.max_tokens - req.num_generated + req.remaining // view.limits.token_budget
        needs = self.params.safety * steps * view.step_time.recent_s
        left = self._due(req) - now
        return f"promoted: due in {left:.1f} s, may need {needs:.1f} s" if needs >= left else None

    def _count_passes(self, plan: Planner, deferred: list[Request]) -> None:
        first = min(deferred, key=self._place) if deferred and not any(req in plan for req in deferred) else None
        self.passes = self.passes + 1 if first and first is self.first else int(first is not None)
        self.first = first

    def _place(self, req: Request) -> tuple[float, list[int]]:
        """In the line of deferred requests: by when it is due, then by how its prompt begins."""
        return self._due(req), req.tokens[: min(req.prompt_len, PREFIX)]

    def _rank(self, req: Request) -> tuple[float, int]:
        """Of those that run: by when it is due, then by what would have to be computed again."""
        return self._due(req), -req.num_computed

    def _due(self, req: Request) -> float:
        if req.due is not None:
            return req.due
        return TOGETHER_S * ceil((req.arrival + self.params.patience_s) / TOGETHER_S)


def _run(plan: Planner, requests: Iterable[Request], ranking: list[Request], spare: int = 0) -> None:
    """Each in turn gets its tokens, at the cost of those ranked last but for the first `spare`, until the step is full."""
    for req in requests:
        while req not in plan.preempted and not plan.run(req):
            if plan.refusal not in ("seats", "blocks") or len(ranking) <= spare or ranking[-1] is req:
                return
            victim = ranking.pop()
            plan.preempt(victim)
            plan.because(victim, f"preempted: request {req.id} lacked {plan.refusal}")


def _arrival(req: Request) -> float:
    return req.arrival
