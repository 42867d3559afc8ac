"""Policies that break a rule each, for the tests of what happens then."""

from batching.policy import Plan, Policy, RequestView, View
from batching.request import Request, State


class Raises(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        raise ZeroDivisionError("no idea")


class Overreaches(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.waiting:
            plan.run_exactly(req, req.remaining + 1)
        return plan


class PlansNothing(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        return Plan(view)


class WaitsForEver(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.wait_until(now + 1)
        return plan


class LeavesResidentsAlone(Policy):
    """Admits everyone, then never runs them again."""

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.waiting:
            plan.run(req)
        return plan


class ChangesTheQueue(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.run(view.waiting.popleft())  # type: ignore[attr-defined]
        return plan


class KeepsItsPlan(Policy):
    plan: Plan | None = None

    def schedule(self, view: View, now: float) -> Plan:
        if self.plan is None:
            self.plan = Plan(view)
            self.plan.wait_until(now + 1)
        return self.plan


class TakesMore(Policy):
    """Helps itself to `what`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view, budget=10**9 if self.what == "budget" else None)
        setattr(plan, self.what, 10**9)
        for req in view.waiting:
            plan.run_exactly(req, req.remaining, reserve=64 if self.what == "free_blocks" else 0)
        return plan


class WaitsUntil(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.wait_until(float("inf"))
        return plan


class HalvesTokens(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.waiting:
            plan.run_exactly(req, req.remaining / 2)  # type: ignore[arg-type]
        return plan


class WritesBooks(Policy):
    """Would win any comparison if it could: every request ends after its first token."""

    def schedule(self, view: View, now: float) -> Plan:
        for req in view.waiting:
            req.max_tokens = 1
        return Plan(view)


class RemembersRequests(Policy):
    """Decides about requests that its view does not show any more."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[RequestView, None] = {}

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        self.known |= dict.fromkeys(view.waiting)
        for req in self.known:
            if req.state in (State.WAITING, State.RESIDENT):
                plan.run(req)
        return plan


class RunsAStranger(Policy):
    """Makes up a request to run."""

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.run(RequestView(Request("stranger", [0], 1)))
        return plan
