"""Immediate and deferred requests in one batch: the two classes of FlexiBatch (relatives: ConServe, HyGen, Sarathi-Serve).

While immediate requests are there, no step is to last longer than the limit on the time between tokens. They are planned
first: decodes, then prompts in chunks as large as the limit allows. What the step-time model says is left goes to deferred
requests, earliest due first (of those due together, common prefixes beside each other), each in the largest chunk that fits;
of deferred requests that begin alike the first computes the common prefix, and the others wait until it is in the prefix cache;
some slots and KV blocks stay free for immediate requests to come. An immediate request that lacks a slot or blocks preempts
deferred ones, latest due first. Without immediate requests neither limit nor reserve applies: deferred work fills the engine
as under `dynamic`.

Nobody starves: a deferred request that is due no later than it can be finished (times a safety factor) becomes immediate, and
so does the first in line when `max_passes` requests have joined the batch while all deferred work was passed over. It then
queues by its arrival. So while the same request stays first in line, at most `max_passes` requests join before it rises, on a
fast engine as on a slow one; a new first in line begins the count anew.

Left out: swapping instead of recomputing (ConServe's checkpoints), preemption inside a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from batching.params import Params, number
from batching.policies.support.deferred_line import DeferredLine
from batching.policy import Plan, Policy, RequestView, View
from batching.request import Priority


@dataclass(frozen=True)
class MixedParams(Params):
    tbt_slo_ms: float = number(0, 0, 3.6e6)  # limit on the time between tokens; 0: the engine's own, measured when it started
    kv_reserve: float = number(0.05, 0, 1)  # share of the KV blocks that deferred work leaves free
    seat_reserve: float = number(0.05, 0, 1)  # share of the slots kept free for immediate arrivals, which then preempt nobody
    safety: float = number(1.5, 0, 100)  # on the predicted remaining time, before it is compared with the time left
    max_passes: int = number(
        100, 0, 1e9
    )  # requests that may join, all deferred work passed over, before the first in line rises
    patience_s: float = number(600, 0, 1e9)  # a deferred request without a due time is due this many seconds after arrival


class Mixed(Policy):
    """Preempts: deferred requests, latest due first, for an immediate one that lacks a slot or blocks; of equals the one
    ranked last, where blocks are short. They recompute.
    Reserves: a share of slots and KV blocks for immediate requests to come.
    Prefix cache: used.
    """

    Params = MixedParams

    def __init__(self, params: MixedParams | None = None) -> None:
        super().__init__(params)
        self.line = DeferredLine(self.params.patience_s, self.params.safety, self.params.max_passes)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        live = [*view.resident, *view.waiting]
        interactive = any(req.priority is Priority.IMMEDIATE for req in live)
        if interactive:
            for req in live:
                if not req.urgent and (why := self.line.overdue(req, view, now)):
                    plan.promote(req, f"promoted: {why}")
        immediate = sorted(filter(plan.urgent, view.resident), key=attrgetter("arrival"))
        deferred = sorted((req for req in view.resident if not plan.urgent(req)), key=self.line.rank)
        ranking = immediate + deferred  # who goes first when seats or blocks are short: the last

        _run(plan, (req for req in immediate if req.remaining == 1), ranking)  # their tokens are never held back
        if interactive:
            plan.time_limit_s = (self.params.tbt_slo_ms or view.limits.tbt_slo_ms) / 1000
        _run(plan, (req for req in immediate if req.remaining > 1), ranking)
        arriving = sorted(filter(plan.urgent, view.waiting), key=attrgetter("arrival"))
        _run(plan, arriving, ranking, spare=len(immediate))
        if interactive:
            plan.keep_blocks = int(self.params.kv_reserve * view.limits.num_blocks)
            plan.keep_slots = int(self.params.seat_reserve * view.limits.max_batch_size)
        _run(plan, deferred, ranking)
        given_up = plan.preempted or not all(req in plan for req in arriving)  # for others: it is not taken back
        if plan.free_slots and not given_up:
            in_line = sorted((req for req in view.waiting if not plan.urgent(req)), key=self.line.place)
            _run(plan, (req for req in in_line if not plan.prefix_coming(req)), ranking, spare=len(ranking))
        self.line.count_passes(plan, [req for req in live if not plan.urgent(req)], arriving)
        return plan


def _run(plan: Plan, requests: Iterable[RequestView], ranking: list[RequestView], spare: int = 0) -> None:
    """Each in turn gets its tokens, at the cost of those ranked last but for the first `spare`, until the step is full."""
    for req in requests:
        while req not in plan.preempted and not plan.run(req):
            if plan.refusal not in ("slots", "blocks") or len(ranking) <= spare or ranking[-1] is req:
                return
            victim = ranking.pop()
            plan.preempt(victim)
            plan.because(victim, f"preempted: request {req.id} lacked {plan.refusal}")
