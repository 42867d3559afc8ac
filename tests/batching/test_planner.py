"""The planner: what it grants, refuses and refunds, and what raises."""

import pytest

from batching.policy import Limits, PlanError, Planner, View
from batching.request import Request
from batching.step_time import StepTime

LIMITS = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16)


class TestPlanner:
    def view(self, *requests: Request, **changes: int) -> View:
        return View(requests, (), (), LIMITS, changes.get("free_blocks", 16), changes.get("free_seats", 4), [StepTime()])

    def test_grants_what_the_budget_leaves_or_exactly_what_is_asked_for(self):
        a, b, c = (Request(name, [0] * 10, 2) for name in "abc")
        plan = Planner(self.view(a, b, c))
        assert plan.run(a) == 10
        assert plan.run(b, 10) == 0, "6 are left: not all of it"
        assert plan.run(b) == 6
        assert plan.run(c) == 0

    def test_refuses_without_blocks_or_seats(self):
        a, b = (Request(name, [0] * 5, 2) for name in "ab")
        assert Planner(self.view(a, free_blocks=1)).run(a) == 0
        plan = Planner(self.view(a, b, free_seats=1))
        assert plan.run(a) == 5
        assert plan.run(b) == 0
        assert Planner(self.view(a, free_blocks=3)).run(a, reserve=16) == 0, "reserved though not used"

    def test_a_preempted_request_with_a_step_under_way_waits_for_its_token(self):
        req = Request("a", [0] * 5, 2)
        req.in_flight = 1
        assert Planner(self.view(req)).run(req) == 0

    def test_preempting_refunds_what_this_plan_had_granted(self):
        a, b = (Request(name, [0] * 10, 2) for name in "ab")
        view = self.view(a, b, free_seats=1)
        plan = Planner(view)
        assert plan.run(a) == 10
        plan.preempt(a)
        assert (plan.budget, plan.free_blocks, plan.free_seats) == (16, 16, 1)
        assert plan.run(b) == 10
        decided = plan.plan(view)
        assert [work.req.id for work in decided.work] == ["b"]
        assert decided.preempt == ()

    @pytest.mark.parametrize(
        "breach",
        [
            lambda plan, req: (plan.run(req), plan.run(req)),
            lambda plan, req: plan.run(req, 11),
            lambda plan, req: plan.run(req, 0),
            lambda plan, req: plan.keep(req),
            lambda plan, req: plan.release(req),
            lambda plan, req: plan.preempt(req),
        ],
        ids=["twice", "too much", "nothing", "keep a live one", "release a live one", "preempt a waiting one"],
    )
    def test_what_breaks_a_rule_raises_and_names_the_request(self, breach):
        req = Request("a", [0] * 10, 2)
        with pytest.raises(PlanError, match="request a"):
            breach(Planner(self.view(req)), req)
