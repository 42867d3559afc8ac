"""Requests that wait and hold KV blocks: they go on where they were, and however they end, no block is lost."""

from collections.abc import Callable

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policy import Limits, Plan, PlanError, Policy, View
from batching.request import Request, RequestError, State
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from simulator.virtual import VirtualClock, VirtualExecutor
from tests.told import told

LIMITS = Limits(max_batch_size=2, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16)
GONE = RequestError("cancelled", "hung up")
Turn = Callable[[Plan, dict[str, Request]], object]


class Scripted(Policy):
    """Plans what its next turn says, with the requests by their names; then runs everybody."""

    def __init__(self, *turns: Turn) -> None:
        super().__init__()
        self.turns = list(turns)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        live = {req.id: req for req in (*view.resident, *view.waiting)}
        if self.turns:
            self.turns.pop(0)(plan, live)
        else:
            for req in live.values():
                plan.run(req)
        return plan


def both(plan: Plan, live: dict[str, Request]) -> None:
    plan.run(live["a"])
    plan.run(live["b"])


def a_waits(plan: Plan, live: dict[str, Request]) -> None:
    plan.preempt(live["a"], keep_kv=True)
    plan.run(live["b"])


def started(*turns: Turn, **changes: int) -> tuple[Scheduler, Request, Request]:
    """a and b have 5 tokens each, in two blocks of 4."""
    a, b = (Request(name, [0] * 5, 9, deadline=100.0 if name == "a" else None) for name in "ab")
    scheduler = Scheduler(Scripted(*turns), Limits(**vars(LIMITS) | changes))
    scheduler.submit(a, 0.0)
    scheduler.submit(b, 0.0)
    return scheduler, a, b


def planned(scheduler: Scheduler, now: float = 0.0) -> Step:
    step = scheduler.next_step(now)
    assert step is not None
    return step


def complete(scheduler: Scheduler, step: Step, error: Exception | None = None) -> None:
    tokens = {} if error else {row.req.id: row.start + row.count for row in step.rows if row.samples}
    scheduler.complete(StepResult(step.id, 0.0, 1.0, tokens, error))


def a_waits_with_its_blocks(**changes: int) -> tuple[Scheduler, Request, Request]:
    scheduler, a, b = started(both, a_waits, **changes)
    for _ in range(2):
        complete(scheduler, planned(scheduler))
    assert a.state is State.WAITING
    assert (len(a.blocks), a.num_computed) == (2, 5)
    return scheduler, a, b


def test_it_gives_up_its_seat_and_goes_on_where_it_was():
    scheduler, a, _ = a_waits_with_its_blocks()
    assert [req.id for req in scheduler.resident] == ["b"]
    row = next(row for row in planned(scheduler).rows if row.req is a)
    assert (row.start, row.count) == (5, 1)
    assert (a.preemptions, a.lost) == (1, 0)


def test_preempted_again_while_it_waits_it_loses_its_blocks_and_recomputes():
    scheduler, a, _ = started(both, a_waits, lambda plan, live: (plan.preempt(live["a"]), plan.run(live["b"])))
    for _ in range(2):
        complete(scheduler, planned(scheduler))
    step = planned(scheduler)
    plan = told(scheduler.plan)
    assert (plan.preempted, plan.dropped) == ((), ("a",))
    assert scheduler.blocks.num_free == 14
    complete(scheduler, step)
    row = next(row for row in planned(scheduler).rows if row.req is a)
    assert (row.start, row.count) == (0, 6)
    assert (a.preemptions, a.lost) == (1, 5), "it lost its seat once"


def test_one_that_loses_its_blocks_while_it_waits_does_not_run_in_the_same_plan():
    scheduler, _, _ = started(both, a_waits, lambda plan, live: (plan.preempt(live["a"]), plan.run(live["a"])))
    for _ in range(2):
        complete(scheduler, planned(scheduler))
    with pytest.raises(PlanError, match=r"one decision a request: request a"):
        scheduler.next_step(1.0)


def test_a_plan_that_only_takes_blocks_is_followed_by_the_next_one_at_once():
    scheduler, _, _ = started(both, a_waits, lambda plan, live: plan.preempt(live["a"]))
    for _ in range(2):
        complete(scheduler, planned(scheduler))
    assert scheduler.next_step(1.0) is None
    assert scheduler.wake_at == 1.0
    assert {row.req.id for row in planned(scheduler).rows} == {"a", "b"}


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_one_that_ends_while_it_waits_gives_its_blocks_back(how: str):
    scheduler, a, _ = a_waits_with_its_blocks()
    if how == "cancel":
        scheduler.cancel("a", 1.0, GONE)
    else:
        planned(scheduler, now=100.0)
    assert [req.id for req in scheduler.take_answered()] == ["a"]
    assert not a.blocks
    assert scheduler.blocks.num_free == 14


def test_one_that_ends_with_a_step_under_way_keeps_its_blocks_until_then_but_no_seat():
    scheduler, a, _ = started(both, a_waits, lambda plan, live: plan.run(live["b"]) and plan.run(live["c"]))
    first = planned(scheduler)
    planned(scheduler)
    scheduler.cancel("a", 0.5, GONE)
    assert len(a.blocks) == 2
    scheduler.submit(Request("c", [0], 1), 0.5)
    assert [row.req.id for row in planned(scheduler).rows] == ["b", "c"], "both seats are free for others"
    complete(scheduler, first)
    assert not a.blocks


def test_one_that_stops_by_the_token_it_was_preempted_before_gives_its_blocks_back():
    scheduler, a, _ = started(both, a_waits)
    a.stop = lambda req: True
    first = planned(scheduler)
    planned(scheduler)
    complete(scheduler, first)
    assert (a.finish_reason, a.output) == ("stop", [5])
    assert not a.blocks
    assert scheduler.num_waiting == 0


def test_one_whose_step_fails_after_it_was_preempted_gives_its_blocks_back():
    scheduler, _, _ = started(both, a_waits)
    first, second = planned(scheduler), planned(scheduler)
    complete(scheduler, first, RuntimeError("boom"))
    complete(scheduler, second)
    assert {req.id for req in scheduler.take_answered()} == {"a", "b"}
    assert scheduler.blocks.num_free == 16


def test_draining_lets_it_finish():
    scheduler, _, _ = a_waits_with_its_blocks()
    scheduler.drain(1.0, GONE)
    assert not scheduler.take_answered()
    assert "a" in {row.req.id for row in planned(scheduler).rows}


def test_its_blocks_are_taken_before_another_policy_takes_over():
    """There are four blocks. b comes to need all of them under the old policy, which no longer sees who waits."""
    scheduler, a, b = a_waits_with_its_blocks(num_blocks=4)
    scheduler.switch(Dynamic())
    while b.finish_reason is None:
        step = planned(scheduler)
        assert [row.req.id for row in step.rows] == ["b"]
        complete(scheduler, step)
    assert len(b.output) == 9
    assert scheduler.next_step(1.0) is None, "b is released"
    (row,) = planned(scheduler).rows
    assert isinstance(scheduler.policy, Dynamic)
    assert (row.req, row.start, row.count) == (a, 0, 6)


def test_a_deposed_policy_leaves_nothing_in_memory():
    def breaks(plan: Plan, live: dict[str, Request]) -> None:
        raise ZeroDivisionError

    clock, answered = VirtualClock(), []
    driver = Driver(Scheduler(Scripted(both, a_waits, breaks), LIMITS), clock, answered.append)
    for name in "ab":
        driver.submit(Request(name, [0] * 5, 9))
    executor = VirtualExecutor(clock)
    for _ in range(3):
        driver.iterate(executor)
    assert [req.id for req in answered] == ["b"], "it was running"
    assert driver.scheduler.blocks.num_free == 16
    while driver.iterate(executor) is not None:
        pass
    assert answered[1].output == [5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_a_preemption_that_keeps_its_kv_is_counted_and_shown_but_nothing_is_computed_again():
    clock = VirtualClock()
    driver = Driver(Scheduler(Scripted(both, a_waits), LIMITS), clock, lambda req: None)
    for name in "ab":
        driver.submit(Request(name, [0] * 5, 2))
    executor = VirtualExecutor(clock)
    while driver.iterate(executor) is not None:
        pass
    stats = driver.stats.summary(clock.now, live=False)
    assert (stats["preemptions"], stats["recomputed_tokens"]) == (1, 0)
    records = driver.steps.read(0, 10)[1]
    assert '"gone":[[0,"p"]]' in records[1]
    assert '"cells":"d' in records[2]


class TestPlan:
    def running(self, *names: str) -> View:
        """Each has computed its 5 tokens, and holds two blocks and a seat."""
        scheduler = Scheduler(Scripted(), LIMITS)
        for name in names:
            scheduler.submit(Request(name, [0] * 5, 9), 0.0)
        complete(scheduler, planned(scheduler))
        return scheduler._view()

    def test_keeping_its_kv_a_request_gives_back_its_seat_and_what_this_plan_granted(self):
        view = self.running("a", "b")
        plan = Plan(view)
        assert plan.run(view.resident[0]) == 1
        plan.preempt(view.resident[0], keep_kv=True)
        assert (plan.budget, plan.free_blocks, plan.free_slots) == (16, 12, 1)
        plan.check(view)
        assert (plan.preempted, plan.dropped, view.resident[0] in plan) == ((view.resident[0],), (), False)

    def test_what_was_kept_can_be_taken_in_the_same_plan(self):
        view = self.running("a", "b")
        plan = Plan(view)
        plan.preempt(view.resident[0], keep_kv=True)
        plan.preempt(view.resident[0])
        assert (plan.free_blocks, plan.free_slots) == (14, 1)
        plan.check(view)
        assert plan.preempted == plan.dropped == (view.resident[0],)

    def test_nothing_is_taken_twice_and_nobody_runs_after_it(self):
        for breach in (lambda plan, req: plan.preempt(req), lambda plan, req: plan.run(req)):
            view = self.running("a")
            plan = Plan(view)
            plan.preempt(view.resident[0])
            with pytest.raises(PlanError, match="request a"):
                breach(plan, view.resident[0])
