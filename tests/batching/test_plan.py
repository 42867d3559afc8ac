"""A plan: what it grants, refuses and refunds, and what raises."""

import pytest

from batching.plan import LONGEST_REASON
from batching.policy import Limits, Plan, PlanError, RequestView, View
from batching.request import Request, State
from batching.step_time import Load, StepTime
from batching.view import StepTimeView

LIMITS = Limits(max_batch_size=4, token_budget=16, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=16)


def waiting(names: str, tokens: int = 10) -> list[RequestView]:
    return [RequestView(Request(name, [0] * tokens, 2)) for name in names]


def finished(name: str) -> RequestView:
    req = Request(name, [0] * 3, 1)
    req.state, req.num_computed = State.DONE, 3
    req.blocks.append(0)
    return RequestView(req)


def view_of(*requests: RequestView, done: tuple[RequestView, ...] = (), **changes: object) -> View:
    free = changes.pop("free_blocks", 16), changes.pop("free_slots", 4)
    return View(requests, (), done, LIMITS, *free, [StepTime()], **changes)


def test_run_grants_what_the_budget_leaves_and_run_exactly_all_or_nothing():
    a, b, c = waiting("abc")
    plan = Plan(view_of(a, b, c), budget=16)
    assert plan.run(a) == 10
    assert plan.run_exactly(b, 10) == 0, "6 are left: not all of it"
    assert plan.refusal == "tokens"
    assert plan.run(b) == 6
    assert plan.run(c) == 0


def test_the_token_budget_binds_run_and_whole_prompts_are_bound_by_max_prefill_tokens():
    a, b, c = waiting("abc", tokens=30)
    plan = Plan(view_of(a, b, c, free_blocks=100))
    assert plan.run(a) == 16
    assert plan.run_exactly(b, 30) == 30
    assert plan.run_exactly(c, 30) == 0, "46 of 64 are taken"
    assert plan.run_exactly(c, 18) == 18


def test_run_starts_behind_what_the_prefix_cache_holds_and_run_exactly_computes_it_again():
    (a,), (b,) = waiting("a"), waiting("b")
    view = view_of(a, b, cached_prefix=lambda req: [7, 8], references=lambda block: 1)
    plan = Plan(view)
    assert plan.run(a) == 2, "behind two blocks of four"
    assert plan.run_exactly(b, 10) == 10


def test_the_time_limit_binds_run_and_not_run_exactly():
    (a,), (b,) = waiting("a"), waiting("b")
    slow = StepTime()
    for tokens in [2, 8, 16] * 10:
        slow.observe(Load.of([(tokens, 0)]), 0.1 * tokens)
    plan = Plan(view_of(a, b)._replace(step_times=[slow]))
    plan.time_limit_s = 0.5
    assert 0 < plan.run(a) < 6
    assert plan.run_exactly(b, 10) == 10


def test_refuses_without_blocks_or_slots():
    a, b = waiting("ab", tokens=5)
    assert Plan(view_of(a, free_blocks=1)).run(a) == 0
    plan = Plan(view_of(a, b, free_slots=1))
    assert plan.run(a) == 5
    assert plan.run(b) == 0
    assert plan.refusal == "slots"
    assert Plan(view_of(a, free_blocks=3)).run(a, reserve=16) == 0, "reserved though not used"


def test_a_preempted_request_with_a_step_under_way_waits_for_its_token():
    req = Request("a", [0] * 5, 2)
    req.in_flight = 1
    seen = RequestView(req)
    assert Plan(view_of(seen)).run(seen) == 0


def test_preempting_refunds_what_this_plan_had_granted():
    a, b = waiting("ab")
    view = view_of(a, b, free_slots=1)
    plan = Plan(view)
    assert plan.run(a) == 10
    plan.preempt(a)
    assert (plan.budget, plan.whole_budget, plan.free_blocks, plan.free_slots) == (16, 64, 16, 1)
    assert plan.run(b) == 10
    plan.check(view)
    assert [req.id for req in (a, b) if req in plan] == ["b"]
    assert plan.preempted == ()


@pytest.mark.parametrize(
    "breach",
    [
        lambda plan, req: (plan.run(req), plan.run(req)),
        lambda plan, req: plan.run_exactly(req, 11),
        lambda plan, req: plan.run_exactly(req, 0),
        lambda plan, req: plan.run_exactly(req, 2.5),
        lambda plan, req: plan.run(req, reserve=-1),
        lambda plan, req: plan.run_exactly(req, 1, pad=-1),
        lambda plan, req: plan.keep(req),
        lambda plan, req: plan.release(req),
        lambda plan, req: plan.preempt(req),
        lambda plan, req: plan.because(req, object()),
        lambda plan, req: plan.reject(req, None),
    ],
    ids=[
        "twice", "too much", "nothing", "part of a token", "negative reservation", "negative padding", "keep a live one",
        "release a live one", "preempt a waiting one", "a reason that is no string", "rejected without a reason",
    ],
)  # fmt: skip
def test_what_breaks_a_rule_raises_and_names_the_request(breach):
    (req,) = waiting("a")
    with pytest.raises(PlanError, match="request a"):
        breach(Plan(view_of(req)), req)


def test_finished_requests_are_released_once_and_only_those_of_the_view():
    a, b = finished("a"), finished("b")
    plan = Plan(view_of(done=(a,)))
    plan.release(a)
    with pytest.raises(PlanError, match="one decision a request: request a"):
        plan.release(a)
    with pytest.raises(PlanError, match="only finished requests are released or kept: request b"):
        plan.release(b)


@pytest.mark.parametrize("what", [Request("a", [0], 1), "a", None, object()], ids=lambda what: type(what).__name__)
def test_a_plan_takes_requests_as_its_view_shows_them_and_nothing_else(what: object):
    plan = Plan(view_of())
    for decide in (plan.run, plan.preempt, lambda req: plan.reject(req, "late"), lambda req: plan.because(req, "so")):
        with pytest.raises(PlanError, match="the requests of its view"):
            decide(what)


def test_a_long_reason_is_cut_short():
    (req,) = waiting("a")
    plan = Plan(view_of(req))
    plan.because(req, "x" * 10_000_000)
    assert plan.reasons == {"a": "x" * LONGEST_REASON}


@pytest.mark.parametrize("name", ["max_tokens", "num_computed", "state", "arrival", "tokens", "blocks", "no_such_thing"])
def test_a_request_that_a_policy_sees_cannot_be_written(name: str):
    (req,) = waiting("a")
    with pytest.raises(PlanError, match=f"a policy only reads requests: {name} of request a"):
        setattr(req, name, 1)
    with pytest.raises(PlanError, match="a policy only reads requests"):
        delattr(req, name)


def test_half_a_token_breaks_a_rule():
    (req,) = waiting("a")
    plan = Plan(view_of(req), budget=4.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="a token budget is a whole number"):
        plan.run(req)


def test_a_policy_cannot_teach_the_step_time_model():
    learned = StepTime()
    for _ in range(20):
        learned.observe(Load(0, 1, 1), 0.01)
    seen = StepTimeView(learned)
    assert seen.bound(Load(0, 1, 1)) == learned.bound(Load(0, 1, 1)) > seen.predict(Load(0, 1, 1)) > 0
    with pytest.raises(AttributeError):
        seen.observe(Load(), 9.0)  # type: ignore[attr-defined]
    for name in ("margin", "recent_s"):
        with pytest.raises(PlanError, match=f"a policy only reads step times: {name} of the step-time model"):
            setattr(seen, name, 9.0)


def test_nor_can_its_lists_and_they_go_on_growing():
    request = Request("a", [5, 6], 9)
    req = RequestView(request)
    tokens = req.tokens
    for change in (
        lambda: tokens.append(7),
        lambda: tokens.__setitem__(0, 7),
        lambda: req.blocks.extend([1]),
        lambda: req.token_times.clear(),
    ):
        with pytest.raises(AttributeError):
            change()
    tokens[:].append(7)  # a copy
    assert request.tokens == [5, 6]
    request.tokens.append(7)
    assert list(tokens) == [5, 6, 7]
    assert tokens[1:] == [6, 7]
