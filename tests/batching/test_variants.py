"""Variants of the model: a step runs on one, a request stays with it, each has its own step times. And rejections."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from batching.driver import Driver
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policy import Limits, Plan, PlanError, Policy, RequestView, View
from batching.replay import replay
from batching.request import Request, State
from batching.scheduler import Scheduler
from batching.step import Step
from batching.step_log import MAX_REASONS
from batching.step_time import Load, Probe
from simulator.virtual import PolicyFailed, VirtualClock, VirtualExecutor, simulate
from tests.told import Plans

LIMITS = Limits(
    max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16,
    variants=("large", "small"),
)  # fmt: skip


class On(Dynamic):
    """Runs each step on the variant that `choose` names for the view."""

    def __init__(self, choose: Callable[[View], int]) -> None:
        super().__init__()
        self._choose = choose

    def schedule(self, view: View, now: float) -> Plan:
        plan = super().schedule(view, now)
        plan.variant = self._choose(view)
        return plan


class Rejects(Policy):
    """Whatever it is asked to run."""

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.waiting:
            plan.reject(req, "rejected: nobody wants it any more")
        return plan


def steps_of(policy: Policy, *requests: Request, limits: Limits = LIMITS) -> list[Step]:
    steps: list[Step] = []
    simulate(policy, limits, requests, on_step=steps.append)
    return steps


def test_a_policy_that_does_not_choose_runs_the_first_variant():
    assert {step.variant for step in steps_of(Dynamic(), Request("a", [0], 3))} == {0}


def test_a_step_runs_on_the_variant_of_its_plan_and_so_does_the_request():
    req = Request("a", [0], 3)
    assert {step.variant for step in steps_of(On(lambda view: 1), req)} == {1}
    assert req.variant == 1


@pytest.mark.parametrize(
    ("choose", "rule"),
    [
        (lambda view: 2, "a variant that there is"),
        (lambda view: -1, "a variant that there is"),
        (lambda view: int(bool(view.resident)), "the variant that computed its KV"),
    ],
    ids=["beyond the last", "negative", "changed under way"],
)
def test_a_plan_for_a_variant_that_cannot_go_on_breaks_a_rule(choose: Callable[[View], int], rule: str):
    with pytest.raises(PolicyFailed, match=rule):
        steps_of(On(choose), Request("a", [0] * 20, 3))


def test_a_plan_that_turns_to_another_variant_after_it_shared_a_prefix_breaks_a_rule():
    """The cached KV is the first variant's."""
    requests = [Request("a", [0] * 20, 2), Request("b", [0] * 20, 2, arrival=9.0)]
    limits = replace(LIMITS, prefix_caching=True)
    with pytest.raises(PolicyFailed, match="the variant that computed its KV"):
        simulate(On(lambda view: int(any(req.id == "b" for req in (*view.waiting, *view.resident)))), limits, requests)


def test_a_preempted_request_may_come_back_on_another_variant():
    """B is preempted for A's sake; when A has gone it computes its KV again, on the other one."""
    tight = replace(LIMITS, num_blocks=4)
    requests = [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)]
    comes_back = On(lambda view: int(all(req.preemptions for req in (*view.resident, *view.waiting))))
    steps: list[Step] = []
    simulate(comes_back, tight, requests, on_step=steps.append)
    assert [req.preemptions for req in requests] == [0, 1]
    assert [step.variant for step in steps] == [0] * 5 + [1] * 3
    assert [req.output for req in requests] == [[7, 8, 9, 10, 11]] * 2


def test_step_times_are_learned_for_each_variant_by_itself():
    clock = VirtualClock()
    scheduler = Scheduler(On(lambda view: 1), LIMITS)
    driver = Driver(scheduler, clock, lambda req: None)
    for seconds, variant in [(0.4, 0), (0.1, 1)] * 10:
        driver.learn(Probe(Load.of([(1, 5)]), seconds, variant))
    driver.submit(Request("a", [0], 3))
    executor = VirtualExecutor(clock, lambda step: 0.1)
    while driver.iterate(executor) is not None:
        pass
    assert [model.steps for model in scheduler.step_times] == [10, 13]
    assert [model.predict(Load.of([(1, 5)])) for model in scheduler.step_times] == pytest.approx([0.4, 0.1])


def test_the_limit_on_a_steps_time_is_that_of_the_plans_variant():
    scheduler = Scheduler(Dynamic(), LIMITS)
    for _ in range(10):
        for tokens in (2, 8, 16):
            scheduler.step_times[0].observe(Load.of([(tokens, 0)]), 0.1 * tokens)
            scheduler.step_times[1].observe(Load.of([(tokens, 0)]), 0.01 * tokens)
    req = RequestView(Request("a", [0] * 16, 1))
    view = View((req,), (), (), LIMITS, 16, 4, scheduler.step_times)
    granted = []
    for variant in (0, 1):
        plan = Plan(view)
        plan.variant, plan.time_limit_s = variant, 0.5
        granted.append(plan.run(req))
    assert granted[0] < 6, "half a second is time for five tokens"
    assert granted[1] == 16


def test_the_log_of_a_run_over_variants_replays_to_the_same_plans():
    log: list[dict] = []
    steps: list[Step] = []
    limits, requests = LIMITS, [Request(str(i), [0] * 3, 4, arrival=0.3 * i) for i in range(20)]
    policy = POLICIES["deadline"].from_arguments({"deadline_ms": 6000, "window_s": 1})
    seconds = (1.0, 0.3)
    simulate(policy, limits, requests, lambda s: seconds[s.variant], on_step=steps.append, log=log.append)
    assert {step.variant for step in steps} == {0, 1}
    assert replay(log) == [step.values() for step in steps]


def test_plans_that_only_reject_are_told_of_and_not_all_kept():
    plans = Plans()
    driver = Driver(Scheduler(Rejects(), LIMITS), VirtualClock(), lambda req: None, on_plan=plans)
    for i in range(3000):
        driver.submit(Request(f"{i}", [0], 1))
        assert driver.next_step() is None
    assert [len(plan.reasons) for plan in plans.others] == [1] * 3000
    assert len(driver.steps._why) == MAX_REASONS


def test_a_rejected_request_is_answered_with_the_reason():
    (req,) = simulate(Rejects(), LIMITS, [Request("a", [0], 3)])
    assert req.state is State.ANSWERED
    assert req.error is not None
    assert (req.error.code, req.error.message) == ("deadline_missed", "rejected: nobody wants it any more")


@pytest.mark.parametrize(
    "breach",
    [
        lambda plan, req: (plan.run(req), plan.reject(req, "late")),
        lambda plan, req: (plan.reject(req, "late"), plan.run(req)),
        lambda plan, req: (plan.reject(req, "late"), plan.reject(req, "late")),
    ],
    ids=["after running it", "before running it", "twice"],
)
def test_one_decision_a_request_holds_for_rejections(breach: Callable[[Plan, RequestView], object]):
    req = RequestView(Request("a", [0], 3))
    view = View((req,), (), (), LIMITS, 16, 4, Scheduler(Dynamic(), LIMITS).step_times)
    with pytest.raises(PlanError, match="one decision"):
        breach(Plan(view), req)


def test_only_waiting_requests_are_rejected():
    req = Request("a", [0], 3)
    scheduler = Scheduler(Dynamic(), LIMITS)
    scheduler.submit(req, 0.0)
    scheduler.next_step(0.0)
    view = scheduler._view()
    with pytest.raises(PlanError, match="only waiting requests are rejected"):
        Plan(view).reject(view.resident[0], "late")


def test_the_statistics_count_requests_by_variant():
    clock = VirtualClock()
    driver = Driver(Scheduler(On(lambda view: 1), LIMITS), clock, lambda req: None)
    driver.submit(Request("a", [0], 3))
    executor = VirtualExecutor(clock)
    while driver.iterate(executor) is not None:
        pass
    assert driver.stats.summary(0.0, live=False)["requests_by_variant"] == {"1": 1}
