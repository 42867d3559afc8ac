"""Policies that break a rule each, for the tests of what happens then."""

from batching.policy import Planner, Policy, View


class Raises(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        raise ZeroDivisionError("no idea")


class Overreaches(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        for req in view.waiting:
            plan.run(req, req.remaining + 1)
        return plan


class PlansNothing(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        return Planner(view)


class WaitsForEver(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.wait_until(now + 1)
        return plan


class LeavesResidentsAlone(Policy):
    """Admits everyone, then never runs them again."""

    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        for req in view.waiting:
            plan.run(req)
        return plan


class ChangesTheQueue(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.run(view.waiting.popleft())  # type: ignore[attr-defined]
        return plan


class KeepsItsPlanner(Policy):
    plan: Planner | None = None

    def schedule(self, view: View, now: float) -> Planner:
        if self.plan is None:
            self.plan = Planner(view)
            self.plan.wait_until(now + 1)
        return self.plan


class TakesMore(Policy):
    """Helps itself to `what`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view, budget=10**9 if self.what == "budget" else None)
        setattr(plan, self.what, 10**9)
        for req in view.waiting:
            plan.run(req, req.remaining, reserve=64 if self.what == "free_blocks" else 0)
        return plan


class WaitsUntil(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.wait_until(float("inf"))
        return plan


class HalvesTokens(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        for req in view.waiting:
            plan.run(req, req.remaining / 2)  # type: ignore[arg-type]
        return plan
