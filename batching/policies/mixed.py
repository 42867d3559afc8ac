"""Immediate and deferred requests in one batch: the two-class rule of FlexiBatch (relatives: ConServe, HyGen).

Immediate requests are planned first, as under `dynamic`; deferred ones, earliest deadline first, fill what is left of the
token budget. An immediate request that lacks a seat or blocks preempts deferred ones, latest deadline first. Left out: the
time-between-tokens limit with its learned step time, and promotion, so that a full load of immediate work starves the rest.
"""

import math

from batching.policies.dynamic import run_or_preempt
from batching.policy import Planner, Policy, View
from batching.request import Priority, Request


class Mixed(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.release(*view.done)
        immediate = [req for req in view.resident if not _deferred(req)]
        deferred = sorted(filter(_deferred, view.resident), key=_deadline)

        run_or_preempt(plan, immediate, victims=deferred)
        all_joined = _join(plan, [req for req in view.waiting if not _deferred(req)], victims=deferred)
        run_or_preempt(plan, deferred)
        if all_joined and not plan.preempted:  # what it gave up for an immediate request, deferred work does not take back
            _join(plan, sorted(filter(_deferred, view.waiting), key=_deadline), victims=[])
        return plan


def _join(plan: Planner, waiting: list[Request], victims: list[Request]) -> bool:
    """Admit in order, at the victims' cost, until one finds no room; whether all found it."""
    for req in waiting:
        while not plan.run(req):
            if not victims or not plan.budget:
                return False
            plan.preempt(victims.pop())
    return True


def _deferred(req: Request) -> bool:
    return req.priority is Priority.DEFERRED


def _deadline(req: Request) -> float:
    return math.inf if req.deadline is None else req.deadline
