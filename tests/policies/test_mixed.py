"""What `mixed` promises, in virtual time on a machine whose step times follow the law that it learns."""

import random
from collections.abc import Callable
from math import ceil

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed, MixedParams
from batching.policy import Limits, Policy
from batching.request import Priority, Request
from batching.scheduler import Scheduler
from batching.stats import distribution
from batching.step import Step
from batching.step_time import Load, Probe
from jobs.runner import due_share
from simulator.virtual import VirtualClock, VirtualExecutor
from tests.policies.machine import a_gpt, serve
from tests.told import Plans

LIMITS = Limits(max_batch_size=32, token_budget=256, max_context=1024, num_blocks=1000, max_queue=10**6)
SLO_S = 0.05


def step_time(step: Step) -> float:
    """In seconds: 5 ms, 0.3 ms a prompt token, 0.8 ms a decode, and what attention takes."""
    load = Load.of((row.count, row.start) for row in step.rows)
    return 0.005 + 3e-4 * load.prefill + 8e-4 * load.decodes + 1e-6 * load.kv + 1e-7 * load.products


PROBES = [
    Probe(Load.of([(count, start)] * rows), 0.005 + rows * (8e-4 if count == 1 else 3e-4 * count))
    for rows in (1, 4, 16)
    for count, start in ((1, 10), (1, 500), (50, 0), (200, 100))
]


class World:
    """The real driver over a virtual machine; requests come at their arrivals."""

    def __init__(self, policy: Policy, limits: Limits = LIMITS, time: Callable[[Step], float] = step_time) -> None:
        self.clock = VirtualClock()
        self.steps: list[Step] = []
        self.answered: list[Request] = []
        self.plans = Plans()
        self.driver = Driver(Scheduler(policy, limits), self.clock, self.answered.append, on_plan=self.plans)
        for probe in PROBES:
            self.driver.learn(probe)

        def timed(step: Step) -> float:
            self.steps.append(step)
            return time(step)

        self.executor = VirtualExecutor(self.clock, timed)

    def serve(self, requests: list[Request], until: float | None = None) -> "World":
        coming = sorted(requests, key=lambda req: -req.arrival)
        while until is None or self.clock.now < until:
            while coming and coming[-1].arrival <= self.clock.now:
                self.driver.submit(coming.pop())
            due = self.driver.iterate(self.executor)
            assert self.driver.last_failure is None
            if due is None or due > self.clock.now:
                times = [time for time in (due, coming[-1].arrival if coming else None) if time is not None]
                if not times:
                    break
                self.clock.now = min(times)
        return self

    def seconds_of(self, priority: Priority) -> list[float]:
        return [req.token_times[0] - req.arrival for req in self.answered if req.priority is priority and not req.error]


def mixed(**params: float) -> Mixed:
    return Mixed(MixedParams(tbt_slo_ms=1e3 * SLO_S, **params))


def immediate(count: int, rate: float, seed: int = 1) -> list[Request]:
    rng, at, requests = random.Random(seed), 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        requests.append(Request(f"now-{i}", [i % 50] * rng.randint(10, 200), rng.randint(5, 60), arrival=at))
    return requests


def backlog(count: int, arrival: float = 0.0, **fields: float) -> list[Request]:
    rng = random.Random(2)
    return [
        Request(f"later-{i}", [i % 50] * rng.randint(10, 200), rng.randint(5, 60), Priority.DEFERRED, arrival, **fields)
        for i in range(count)
    ]


def gaps(requests: list[Request]) -> list[float]:
    return [b - a for req in requests for a, b in zip(req.token_times, req.token_times[1:], strict=False)]


def test_no_step_is_predicted_or_lasts_longer_than_the_limit_while_somebody_waits():
    world = World(mixed()).serve(immediate(300, 5.0) + backlog(1500), until=50)
    shared = [step for step in world.steps if any(row.req.priority is Priority.IMMEDIATE for row in step.rows)]
    assert len(shared) > 500
    over = [step for step in shared if step_time(step) > SLO_S]
    assert len(over) <= 0.01 * len(shared)
    waiting = [req for req in world.answered if req.priority is Priority.IMMEDIATE]
    assert distribution(gaps(waiting))["p99"] <= 1.1 * SLO_S


def test_deferred_work_fills_what_the_limit_leaves():
    world = World(mixed()).serve(immediate(300, 5.0) + backlog(1500), until=50)
    lengths = [step_time(step) for step in world.steps[50:]]
    assert sum(lengths) / len(lengths) > 0.8 * SLO_S, "the steps are used up to the limit"
    alone = World(mixed()).serve(immediate(300, 5.0))
    without = distribution(alone.seconds_of(Priority.IMMEDIATE))["p99"]
    assert distribution(world.seconds_of(Priority.IMMEDIATE))["p99"] < without + 2 * SLO_S, "a step under way, and its own"
    fcfs = World(Dynamic()).serve(immediate(300, 5.0) + backlog(1500), until=400)
    worse = distribution(fcfs.seconds_of(Priority.IMMEDIATE))["p99"]
    assert worse > 5 * distribution(world.seconds_of(Priority.IMMEDIATE))["p99"]


def test_without_immediate_requests_deferred_ones_run_as_under_dynamic():
    times = []
    for policy in (mixed(), Dynamic()):
        world = World(policy).serve(backlog(300))
        assert len(world.answered) == 300
        times.append(world.clock.now)
    assert times[0] == pytest.approx(times[1], rel=0.05)


def test_some_blocks_stay_free_for_immediate_requests_to_come():
    limits = Limits(max_batch_size=32, token_budget=256, num_blocks=100, max_queue=10**6)
    requests = [Request("now", [1] * 20, 200), *backlog(50, arrival=0.01)]
    world = World(mixed(kv_reserve=0.2), limits)
    used = []
    world.executor._step_time = lambda step: used.append(100 - world.driver.scheduler.blocks.num_free) or step_time(step)
    world.serve(requests, until=1.0)
    assert max(used) <= 80 + 14, "what the immediate request itself came to hold"
    assert max(used) > 60


def test_a_batch_with_a_window_ends_in_it_though_immediate_requests_leave_little():
    """It is due in stages, as the runner has it. By itself it would have the whole slack; here a backlog competes."""
    window = 40.0
    batch = [
        Request(f"batch-{i}", [1] * 100, 40, Priority.DEFERRED, 0.0, due=due_share((i + 1) / 400) * window) for i in range(400)
    ]
    world = World(mixed()).serve(immediate(200, 5.0) + backlog(800) + batch, until=60)
    ended = {req.id: req.answered_at for req in world.answered}
    assert max(ended[req.id] for req in batch) <= window


def test_a_request_that_is_due_soon_becomes_immediate_and_is_counted_apart():
    """All seats are taken by immediate requests for long; it needs one second and a half of safety."""
    limits = Limits(max_batch_size=4, token_budget=256, max_queue=100)
    requests = [Request(f"now-{i}", [1] * 20, 100, arrival=0.1 * i) for i in range(40)]
    late = Request("late", [1] * 20, 100, Priority.DEFERRED, 0.05, due=5.0)
    world = World(mixed(max_passes=10**9), limits).serve([*requests, late])
    promoted = [plan for plan in world.plans if "late" in plan.promoted]
    assert len(promoted) == 1
    assert promoted[0].reasons["late"].startswith("promoted: due in")
    assert late.answered_at < 8.0, "the next seat was its own: it came before nearly all of them"
    assert late.answered_at < sorted(req.answered_at for req in requests)[12]
    stats = world.driver.stats.summary(world.clock.now, live=False)
    assert stats["promotions"] == 1
    assert stats["latency"]["promoted"]["requests"] == 1
    assert stats["latency"]["deferred"]["requests"] == 0


def test_under_overload_promoted_requests_wait_no_longer_than_computed_and_immediate_ones_are_shed():
    """Immediate requests come at three times what the machine can do. All deferred work is passed over; when `passes` requests
    have joined the first of it is promoted, stands in front of the whole queue by its arrival, and gets the next slot."""
    passes, output, slots = 15, 40, 8
    limits = Limits(max_batch_size=slots, token_budget=256, max_queue=60)
    longest_step = SLO_S * 1.1
    count = 5
    requests = [Request(f"now-{i}", [1] * 50, output, arrival=0.02 + i / 60) for i in range(1500)]
    deferred = [Request(f"later-{i}", [1] * 50, output, Priority.DEFERRED, 0.01) for i in range(count)]
    world = World(mixed(max_passes=passes), limits).serve(requests + deferred)
    # A running request ends within `service`, so the slots take in as many as they are in that time. Its turn comes when those
    # before it were promoted and `passes` have joined; then a slot is free when a running request has ended at the latest;
    # then it runs, a token in every step.
    service = (output + 10) * longest_step
    turn = ceil((passes + 1) / slots) * service
    for place, req in enumerate(sorted(deferred, key=lambda req: req.answered_at)):
        assert req.error is None
        assert req.answered_at - req.arrival <= (place + 1) * turn + 2 * service
    assert world.driver.stats.summary(world.clock.now, live=False)["promotions"] >= count - 1
    shed = [req for req in world.answered if req.error is not None]
    assert {req.error.code for req in shed} == {"queue_full"}
    assert {req.priority for req in shed} == {Priority.IMMEDIATE}
    assert len(shed) > 300


@pytest.mark.parametrize("factor", [0.05, 5.0], ids=["a fast engine", "a slow engine"])
def test_under_a_high_load_immediate_requests_keep_their_precedence_however_fast_the_engine_is(factor: float):
    """Four slots and twice the requests that they can serve, half of them deferred. Whether the first deferred one may be
    passed over by so many requests or for ever makes no great difference to immediate ones."""

    def law(load: Load) -> float:
        return factor * a_gpt(load)

    limits = Limits(max_batch_size=4, token_budget=256, num_blocks=1000, max_queue=10**6, tbt_slo_ms=1e3 * factor * SLO_S)
    rng, at, requests = random.Random(3), 0.0, []
    for i in range(400):
        at += rng.expovariate(20.0) * factor
        priority = Priority.DEFERRED if i % 2 else Priority.IMMEDIATE
        requests.append(Request(str(i), [0] * 64, 40, priority, at))
    ttft = {}
    for passes in (100, 10**9):
        again = [Request(req.id, [*req.tokens], req.max_tokens, req.priority, req.arrival, due=1e9) for req in requests]
        run = serve(Mixed(MixedParams(max_passes=passes)), limits, again, law)
        waits = [req.token_times[0] - req.arrival for req in run.answered if req.priority is Priority.IMMEDIATE]
        ttft[passes] = sum(waits) / len(waits)
    assert ttft[100] < 1.2 * ttft[10**9]


def test_each_decision_has_its_reason():
    limits = Limits(max_batch_size=2, token_budget=64, max_context=64, num_blocks=100)
    requests = [Request(f"later-{i}", [i] * 9, 30, Priority.DEFERRED) for i in range(3)]
    requests.append(Request("now", [0] * 6, 20, arrival=0.02))
    world = World(mixed(), limits).serve(requests)
    assert world.plans[0].reasons["later-2"] == "waits: all sequence slots are taken"
    preempting = next(plan for plan in world.plans if plan.preempted)
    assert preempting.reasons[preempting.preempted[0]] == "preempted: request now lacked slots"
    told = world.driver.stats.summary(world.clock.now, live=False)["decisions"]
    assert {"step", "seconds_ago", "request", "why"} == set(told[0])
    assert any(decision["why"].startswith("preempted") for decision in told)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kv_reserve": 1.5}, "kv_reserve: must lie between 0 and 1"),
        ({"tbt_slo_ms": -1}, "tbt_slo_ms"),
        ({"max_passes": -1}, "max_passes"),
        ({"safety": -1}, "safety"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused_by_name(params: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Mixed.from_arguments(params)


def test_a_limit_that_cannot_be_kept_slows_but_stops_nobody():
    world = World(Mixed(MixedParams(tbt_slo_ms=0.01))).serve(immediate(20, 5.0) + backlog(20))
    assert len(world.answered) == 40
    assert all(req.error is None for req in world.answered)


def test_a_deferred_request_that_says_nothing_is_served_beside_a_batch_that_has_all_day():
    batch = [Request(f"batch-{i}", [1] * 50, 40, Priority.DEFERRED, 0.0, due=86400.0) for i in range(600)]
    flex = [Request(f"flex-{i}", [99 - i] * 50, 40, Priority.DEFERRED, 1.0 + i) for i in range(5)]
    World(mixed()).serve(batch + flex)
    assert max(req.answered_at - req.arrival for req in flex) < 10
    assert max(req.answered_at for req in batch) > 30, "the batch takes longer by far"
