"""The scheduler's rules one by one: order after preemption, switching, policies that break rules, deadlines, refusals."""

import pytest

from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed
from batching.policies.nobatch import NoBatch
from batching.policies.static import Static
from batching.policy import Limits, Policy
from batching.request import Priority, Refused, Request, RequestError, State
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from simulator.virtual import simulate
from tests.told import Plans

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
    plans = Plans()
    tight = Limits(max_batch_size=2, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=4)
    requests = [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5), Request("C", [0] * 7, 5)]
    answered = simulate(Dynamic(), tight, requests, on_plan=plans)
    assert plans[2].preempted == ("B",)
    assert [req.id for req in answered] == ["A", "B", "C"]


def test_deferred_work_does_not_take_back_what_an_immediate_request_still_waits_for():
    """C waits for the memory that B holds; D, preempted for C's sake, stays out until nobody immediate waits."""
    tight = Limits(max_batch_size=3, token_budget=32, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=5)
    plans = Plans()
    requests = [
        Request("D", [0] * 4, 8, Priority.DEFERRED),
        Request("B", [0] * 8, 4, arrival=0.5),
        Request("C", [0] * 14, 4, arrival=0.5),
    ]
    answered = simulate(Mixed(), tight, requests, on_plan=plans)
    assert sum("D" in plan.preempted for plan in plans) == 1
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


@pytest.mark.parametrize("mode", POLICIES)
def test_a_prompt_of_the_contexts_length_may_ask_for_one_token_in_every_mode(mode: str):
    """Whose text is not wanted: it is computed for its log probabilities."""
    fills = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=34)
    requests = [Request("short", [0] * 5, 3), Request("fills", [0] * 64, 1), Request("next", [0] * 5, 3)]
    assert all(req.error is None for req in simulate(POLICIES[mode](), fills, requests))
    with pytest.raises(Refused, match=r"at most 64"):
        Scheduler(POLICIES[mode](), fills).submit(Request("longer", [0] * 65, 1), 0.0)


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
