"""The scheduler's rules one by one: order after preemption, switching, policies that break rules, deadlines, refusals."""

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed
from batching.policies.nobatch import NoBatch
from batching.policies.static import Static
from batching.policy import Limits, PlanError, Planner, Policy, View
from batching.request import Priority, Refused, Request, RequestError, State
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from simulator.virtual import VirtualClock, VirtualExecutor, simulate

LIMITS = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16)


def result_of(step: Step, ended: float = 1.0, error: Exception | None = None) -> StepResult:
    tokens = {row.req.id: row.start + row.count for row in step.rows if row.samples and error is None}
    return StepResult(step.id, ended - 1, ended, tokens, error)


def started(policy: Policy, *requests: Request, limits: Limits = LIMITS) -> Scheduler:
    scheduler = Scheduler(policy, limits)
    for req in requests:
        scheduler.submit(req, 0.0)
    return scheduler


def planned(scheduler: Scheduler, now: float = 0.0) -> Step:
    step = scheduler.next_step(now)
    assert step is not None
    return step


def ids(step: Step) -> list[str]:
    return [row.req.id for row in step.rows]


def test_a_preempted_request_runs_again_before_those_that_came_after_it():
    steps: list[Step] = []
    tight = Limits(max_batch_size=2, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=4)
    requests = [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5), Request("C", [0] * 7, 5)]
    answered = simulate(Dynamic(), tight, requests, on_step=steps.append)
    assert steps[2].preempted == ("B",)
    assert [req.id for req in answered] == ["A", "B", "C"]


def test_deferred_work_does_not_take_back_what_an_immediate_request_still_waits_for():
    """C waits for the memory that B holds; D, preempted for C's sake, stays out until nobody immediate waits."""
    tight = Limits(max_batch_size=3, token_budget=32, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=5)
    steps: list[Step] = []
    requests = [
        Request("D", [0] * 4, 8, Priority.DEFERRED),
        Request("B", [0] * 8, 4, arrival=0.5),
        Request("C", [0] * 14, 4, arrival=0.5),
    ]
    answered = simulate(Mixed(), tight, requests, on_step=steps.append)
    assert sum("D" in step.preempted for step in steps) == 1
    assert [req.id for req in answered] == ["B", "C", "D"]


def test_a_switch_lets_running_requests_finish_under_the_old_policy_and_keeps_new_ones_waiting():
    old, new = NoBatch(), Dynamic()
    scheduler = started(old, Request("running", [0], 3))
    scheduler.complete(result_of(planned(scheduler)))
    scheduler.switch(new)
    scheduler.submit(Request("later", [0], 1), 1.0)
    for _ in range(2):
        assert scheduler.policy is old
        step = planned(scheduler)
        assert ids(step) == ["running"]
        scheduler.complete(result_of(step))
    assert scheduler.next_step(3.0) is None, "the old policy releases its last request"
    assert ids(planned(scheduler, 3.0)) == ["later"]
    assert scheduler.policy is new
    assert not scheduler.switching


def test_a_policy_that_takes_over_turns_away_what_it_can_never_run():
    class Choosy(NoBatch):
        def refuses(self, req: Request, limits: Limits) -> str | None:
            return "has too long a prompt" if req.prompt_len > 4 else None

    scheduler = started(Dynamic(), Request("short", [0] * 4, 1), Request("long", [0] * 5, 1))
    scheduler.switch(Choosy())
    assert ids(planned(scheduler)) == ["short"]
    (turned_away,) = scheduler.take_answered()
    assert turned_away.id == "long"
    assert "has too long a prompt" in str(turned_away.error)


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


@pytest.mark.parametrize(
    ("policy", "rule", "request_shape"),
    [
        (ChangesTheQueue(), "raised", (3, 3)),
        (KeepsItsPlanner(), "view of its own step", (3, 3)),
        (TakesMore("free_blocks"), "no more blocks", (3, 5)),
        (TakesMore("free_seats"), "no more requests", (8, 3)),
        (TakesMore("budget"), "no more tokens", (4, 20)),
        (WaitsUntil(), "time-outs end", (3, 3)),
        (HalvesTokens(), "a whole number", (3, 3)),
    ],
    ids=lambda value: value.what if isinstance(value, TakesMore) else type(value).__name__ if isinstance(value, Policy) else "",
)
def test_a_policy_that_goes_around_the_planner_is_deposed_too(policy: Policy, rule: str, request_shape: tuple[int, int]):
    number, prompt = request_shape
    answered: list[Request] = []
    clock = VirtualClock()
    roomy = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=20)
    driver = Driver(Scheduler(Dynamic(), roomy), clock, answered.append)
    driver.switch(policy)
    for i in range(number):
        driver.submit(Request(str(i), [0] * prompt, 4))
    executor = VirtualExecutor(clock)
    while (due := driver.iterate(executor)) is not None:
        clock.now = max(clock.now, due)
    assert driver.last_failure is not None
    assert rule in driver.last_failure
    assert [req.error for req in answered] == [None] * number


def test_policies_that_raise_when_asked_to_refuse_are_deposed_one_after_the_other():
    class Refuses(NoBatch):
        def refuses(self, req: Request, limits: Limits) -> str | None:
            raise ValueError("cannot say")

    answered: list[Request] = []
    clock = VirtualClock()
    driver = Driver(Scheduler(Refuses(), LIMITS), clock, answered.append)
    driver.switch(Refuses())
    executor = VirtualExecutor(clock)
    driver.iterate(executor)
    driver.submit(Request("a", [0], 2))
    while (due := driver.iterate(executor)) is not None:
        clock.now = max(clock.now, due)
    assert [(req.id, req.error) for req in answered] == [("a", None)]
    assert "cannot say" in str(driver.last_failure)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (Raises(), "raised"),
        (Overreaches(), "no more than what remains"),
        (PlansNothing(), "something must be planned"),
        (WaitsForEver(), "something must be planned"),
        (LeavesResidentsAlone(), "something must be planned"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_a_policy_that_breaks_a_rule_is_named_and_the_last_good_one_goes_on(policy: Policy, rule: str):
    clock = VirtualClock()
    answered: list[Request] = []
    driver = Driver(Scheduler(Dynamic(), LIMITS), clock, answered.append)
    executor = VirtualExecutor(clock)
    driver.switch(policy)
    requests = [Request(str(i), [0] * 3, 4) for i in range(3)]
    for req in requests:
        driver.submit(req)
    for _ in range(3000):
        due = driver.iterate(executor)
        if due is None:
            break
        clock.now = max(clock.now, due)
    assert driver.last_failure is not None
    assert type(policy).__name__ in driver.last_failure
    assert rule in driver.last_failure
    assert len(answered) == 3
    assert all(req.error is None or req.error.code == "policy_failed" for req in answered)
    resident = isinstance(policy, LeavesResidentsAlone)
    assert all((req.error is not None) == resident for req in answered), "only those that were resident fail"
    assert driver.scheduler.blocks.num_free == LIMITS.num_blocks
    assert isinstance(driver.scheduler.policy, Dynamic)


def test_a_failed_step_ends_its_own_requests_only():
    scheduler = started(Dynamic(), Request("a", [0] * 3, 4), Request("b", [0] * 3, 4))
    first = planned(scheduler)
    scheduler.submit(Request("c", [0], 1), 0.0)
    scheduler.complete(result_of(first, error=RuntimeError("boom")))
    failed = scheduler.take_answered()
    assert {req.id for req in failed} == {"a", "b"}
    assert all(req.error and req.error.code == "step_failed" and "boom" in req.error.message for req in failed)
    assert ids(planned(scheduler)) == ["c"]


@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_a_request_whose_deadline_passes_is_ended(running: bool):
    req = Request("late", [0] * 3, 8, deadline=5.0)
    others = [] if running else [Request("first", [0], 20)]
    scheduler = started(NoBatch(), *others, req)
    scheduler.complete(result_of(planned(scheduler, 0.0)))
    scheduler.next_step(5.0)
    assert [r.id for r in scheduler.take_answered()] == ["late"]
    assert req.error is not None
    assert req.error.code == "deadline_exceeded"
    assert not req.blocks


def test_an_idle_engine_wakes_for_a_deadline():
    policy = Static()
    scheduler = started(policy, Request("a", [0], 1, deadline=0.01))
    assert scheduler.next_step(0.0) is None
    assert scheduler.wake_at == 0.01


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(Dynamic(), LIMITS)
    with pytest.raises(Refused, match=r"at most 64"):
        scheduler.submit(Request("long", [0] * 60, 5), 0.0)
    small = Limits(max_batch_size=1, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=4)
    with pytest.raises(Refused, match=r"needs 17 columns of KV memory, the engine has 16"):
        Scheduler(Dynamic(), small).submit(Request("large", [0] * 10, 8), 0.0)
    Scheduler(Dynamic(), small).submit(Request("fits", [0] * 10, 7), 0.0)


def test_a_full_queue_refuses_and_a_second_request_of_one_name_too():
    limits = Limits(max_batch_size=1, token_budget=16, max_prefill_tokens=64, max_context=64, max_queue=2)
    scheduler = started(NoBatch(), Request("a", [0], 1), Request("b", [0], 1), limits=limits)
    with pytest.raises(Refused, match="max_queue is 2"):
        scheduler.submit(Request("c", [0], 1), 0.0)
    planned(scheduler)
    with pytest.raises(Refused, match="already"):
        scheduler.submit(Request("b", [0], 1), 0.0)


def test_draining_ends_what_waits_and_lets_finish_what_has_begun():
    scheduler = started(NoBatch(), Request("running", [0], 2), Request("queued", [0], 1))
    scheduler.complete(result_of(planned(scheduler)))
    scheduler.drain(1.0, RequestError("draining", "going down"))
    assert [req.id for req in scheduler.take_answered()] == ["queued"]
    assert ids(planned(scheduler)) == ["running"]


def test_a_cancelled_request_keeps_its_blocks_until_no_step_holds_it():
    req = Request("gone", [0] * 5, 3)
    scheduler = started(Dynamic(), req)
    step = planned(scheduler)
    scheduler.cancel("gone", 0.5, RequestError("cancelled", "hung up"))
    assert req.state is State.ANSWERED
    assert len(req.blocks) == 2
    scheduler.complete(result_of(step))
    assert not req.blocks
    assert scheduler.blocks.num_free == LIMITS.num_blocks


class TestPlanner:
    def view(self, *requests: Request, **changes: int) -> View:
        return View(requests, (), (), LIMITS, changes.get("free_blocks", 16), changes.get("free_seats", 4))

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
