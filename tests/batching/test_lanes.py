"""Two steps side by side, one in each lane: what keeps them apart, and what is told of them."""

import json

import pytest

from batching.driver import Driver
from batching.policies import POLICIES
from batching.policies.flover import Flover
from batching.policy import Limits, Plan, Policy, View
from batching.request import Lane, Request, RequestError
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from batching.step_time import Load, StepTime
from simulator.virtual import PolicyFailed, VirtualClock, simulate
from tests.told import told


def limits(lanes: int = 2, blocks: int = 100) -> Limits:
    return Limits(max_batch_size=4, max_context=64, block_size=1, num_blocks=blocks, lanes=lanes)


class Machine:
    """A driver whose steps end when a test says so, in any order."""

    def __init__(self, *requests: Request, blocks: int = 100) -> None:
        self.clock = VirtualClock()
        self.answered: list[Request] = []
        self.scheduler = Scheduler(Flover(), limits(blocks=blocks))
        self.driver = Driver(self.scheduler, self.clock, self.answered.append)
        for req in requests:
            self.driver.submit(req)

    def plan(self) -> Step:
        step = self.driver.next_step()
        assert step is not None
        return step

    def end(self, step: Step, at: float) -> None:
        self.clock.now = at
        tokens = {row.req.id: row.start + row.count for row in step.rows if row.samples}
        self.driver.complete(StepResult(step.id, step.planned_at, at, tokens))

    def beside(self) -> tuple[Step, Step]:
        """A prompt of 30 tokens in its lane, and beside it a decode, both under way."""
        self.driver.submit(Request("decodes", [0], 9))
        self.end(self.plan(), 1.0)
        self.driver.submit(Request("prompt", [0] * 30, 2))
        decode, prefill = self.plan(), self.plan()
        assert [row.req.id for row in prefill.rows] == ["prompt"]
        assert [row.req.id for row in decode.rows] == ["decodes"]
        return prefill, decode


def test_a_request_whose_prompt_is_under_way_joins_the_decodes_when_it_is_complete():
    machine = Machine()
    prefill, decode = machine.beside()
    machine.end(decode, 2.0)
    decode = machine.plan()
    assert [row.req.id for row in decode.rows] == ["decodes"]
    machine.end(prefill, 2.5)
    machine.end(decode, 3.0)
    assert [row.req.id for row in machine.plan().rows] == ["decodes", "prompt"]


def test_blocks_of_a_request_that_ends_go_to_the_other_lane_only_when_its_step_is_complete():
    """Where steps follow each other the next plan may have them at once."""
    machine = Machine(Request("ends", [0] * 5, 2), blocks=8)
    machine.end(machine.plan(), 1.0)
    last = machine.plan()
    machine.driver.submit(Request("next", [0] * 6, 1))
    assert machine.driver.next_step() is None
    machine.end(last, 2.0)
    step = machine.plan()
    assert (told(machine.scheduler.plan).released, [row.req.id for row in step.rows]) == (("ends",), ["next"])


def test_a_cancelled_request_keeps_its_blocks_until_the_step_that_computes_it_is_complete():
    machine = Machine()
    prefill, decode = machine.beside()
    held = machine.scheduler.blocks.num_free
    machine.driver.cancel("prompt", RequestError("cancelled", "gone"))
    machine.end(decode, 2.0)
    assert machine.scheduler.blocks.num_free == held
    machine.end(prefill, 3.0)
    assert machine.scheduler.blocks.num_free == held + 31


def test_records_are_published_in_the_order_of_the_steps_though_they_are_complete_in_another():
    machine = Machine()
    prefill, decode = machine.beside()
    for at in (2.0, 3.0, 4.0):
        machine.end(decode, at)
        decode = machine.plan()
    assert machine.driver.steps.last == 2, "the prompt's step is the third"
    machine.end(prefill, 4.5)
    machine.end(decode, 5.0)
    machine.plan()
    records = [json.loads(text) for text in machine.driver.steps.read(0, 100)[1]]
    assert [(record["id"], record["end"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 4.5), (4, 3.0), (5, 4.0), (6, 5.0)]
    assert [record["cells"] for record in records[:4]] == ["p", "d", "wp", "dw"]


class Remembers(StepTime):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Load, float]] = []

    def observe(self, load: Load, seconds: float) -> None:
        self.seen.append((load, seconds))


def test_a_steps_duration_is_learned_by_its_own_lane():
    machine = Machine()
    learned = Remembers()
    machine.scheduler.step_times = [learned]
    prefill, decode = machine.beside()
    machine.end(decode, 2.0)
    machine.end(machine.plan(), 3.0)
    machine.end(prefill, 3.5)
    assert [(load.prefill, seconds) for load, seconds in learned.seen] == [(0, 1.0), (0, 1.0), (0, 1.0), (30, 2.5)]


@pytest.mark.parametrize("mode", [name for name, policy in POLICIES.items() if len(policy.lanes) == 1])
def test_a_policy_of_one_lane_plans_the_same_where_there_are_two(mode: str):
    plans: dict[int, list] = {1: [], 2: []}
    for lanes, made in plans.items():
        requests = [Request(str(i), [0] * (3 + i), 4 + i % 3, arrival=float(i)) for i in range(9)]
        simulate(POLICIES[mode](), limits(lanes), requests, on_step=lambda step, made=made: made.append(step.values()))
    assert plans[1] == plans[2]


class TwoInOneLane(Policy):
    lanes = (Lane.MAIN, Lane.PREFILL)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.waiting[:1]:
            plan.run(req)
        return plan


class PreemptsWhatIsUnderWay(Policy):
    lanes = (Lane.MAIN, Lane.PREFILL)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        if view.resident:
            plan.preempt(view.resident[0])
        else:
            plan.run(view.waiting[0])
        return plan


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (TwoInOneLane(), "a lane computes one step at a time"),
        (PreemptsWhatIsUnderWay(), "what the other lane computes is not preempted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_plan_that_would_let_two_steps_meet_breaks_a_rule(policy: Policy, rule: str):
    with pytest.raises(PolicyFailed, match=rule):
        simulate(policy, limits(), [Request("a", [0], 3), Request("b", [0], 3)])


def test_there_are_as_many_lanes_as_have_a_name():
    with pytest.raises(ValueError, match="lanes: must be at most 2, not 3"):
        Limits(lanes=3)
    with pytest.raises(ValueError, match="lanes: must be at least 1, not 0"):
        Limits(lanes=0)
