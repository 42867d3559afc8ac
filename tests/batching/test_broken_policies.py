"""A policy that raises or breaks a rule is deposed: the error names both, the last good one goes on, nothing is lost."""

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Limits, Policy
from batching.request import Request
from batching.scheduler import Scheduler
from simulator.virtual import VirtualClock, VirtualExecutor
from tests.broken_policies import (
    ChangesTheQueue,
    HalvesTokens,
    KeepsItsPlan,
    LeavesResidentsAlone,
    Overreaches,
    PlansNothing,
    Raises,
    RemembersRequests,
    RunsAStranger,
    TakesMore,
    WaitsForEver,
    WaitsUntil,
    WritesBooks,
)

LIMITS = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16)


@pytest.mark.parametrize(
    ("policy", "rule", "request_shape"),
    [
        (ChangesTheQueue(), "raised", (3, 3)),
        (KeepsItsPlan(), "view of its own step", (3, 3)),
        (TakesMore("free_blocks"), "no more blocks", (3, 5)),
        (TakesMore("free_slots"), "no more requests", (8, 3)),
        (TakesMore("budget"), "no more tokens", (4, 20)),
        (WaitsUntil(), "time-outs end", (3, 3)),
        (HalvesTokens(), "a whole number", (3, 3)),
        (WritesBooks(), "a policy only reads requests: max_tokens of request 0", (3, 3)),
        (RunsAStranger(), "the requests of its view: request stranger", (3, 3)),
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


def test_a_policy_that_remembers_requests_cannot_let_them_in_before_a_switch_is_over():
    clock, answered = VirtualClock(), []
    driver = Driver(Scheduler(RemembersRequests(), Limits(max_batch_size=1)), clock, answered.append)
    executor = VirtualExecutor(clock)
    for name in "ab":
        driver.submit(Request(name, [0], 3))
    driver.iterate(executor)
    driver.switch(NoBatch())
    while driver.iterate(executor) is not None:
        pass
    assert "the requests of its view: request b is not one of them" in str(driver.last_failure)
    assert [(req.id, req.error and req.error.code) for req in answered] == [("a", "policy_failed"), ("b", None)]
    assert isinstance(driver.scheduler.policy, NoBatch)
