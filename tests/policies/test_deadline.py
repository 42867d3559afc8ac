"""`deadline`: the hand-computed capacities and where it switches variants by them, on machines whose step times are known."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from batching.policies.deadline import Deadline, DeadlineParams
from batching.policies.support.capacity import ArrivalRate, Shape, capacity, covering, service_time, service_times
from batching.policy import Limits
from batching.request import Priority, Request
from batching.step import Step
from batching.step_time import Load, StepTime
from simulator.tables import KnownStepTime, StepTimeTable, Table, ceng523
from simulator.virtual import simulate

# The hand check: T = a + c * b ms for b <= 8 requests, in 100 ms.
HAND = [Table({b: a + c * b for b in range(1, 9)}) for a, c in ((35, 5), (15, 2), (5, 1))]
LIMITS = Limits(max_batch_size=8, block_size=1, num_blocks=4096, max_queue=10**6, variants=("L", "M", "S"))
ONE = Shape(1, 1)


def deadline(**params: float) -> Deadline:
    return Deadline(DeadlineParams(**{"deadline_ms": 100.0} | params))


def requests(times: list[float], **fields: float) -> list[Request]:
    return [Request(str(i), [0], 1, arrival=time, **fields) for i, time in enumerate(times)]


def poisson(rate: float, seconds: float, start: float = 0.0, seed: int = 3) -> list[float]:
    rng, times = random.Random(seed), [start]
    while times[-1] < start + seconds:
        times.append(times[-1] + rng.expovariate(rate))
    return times


def serve(policy: Deadline, coming: list[Request], limits: Limits = LIMITS, tables: list[Table] = HAND) -> list[Step]:
    steps: list[Step] = []
    known = [KnownStepTime(table) for table in tables]
    simulate(policy, limits, coming, StepTimeTable(tables), on_step=steps.append, known=known)
    return steps


def usual_variant(served: list[Request]) -> str:
    return LIMITS.variants[Counter(req.variant for req in served).most_common(1)[0][0]]


# Capacities.


def test_the_hand_computed_capacities():
    within = [capacity(KnownStepTime(table), 8, ONE, 0.1) for table in HAND]
    assert within == pytest.approx([60, 258.06, 615.38], abs=0.01), "batches of 3, 8 and 8"


def test_the_capacities_of_the_projects_table():
    within = [capacity(KnownStepTime(table), 64, ONE, 0.1) for table in ceng523()]
    assert within == pytest.approx([170.2, 216.2, 421.1], abs=0.05), "batches of 8, 8 and 16"


def test_a_model_that_is_never_quick_enough_has_no_capacity():
    assert capacity(KnownStepTime(HAND[0]), 8, ONE, 0.079) == 0


def test_a_variant_that_covers_the_rate_is_kept_and_one_left_comes_back_only_with_something_to_spare():
    assert covering([60, 258, 615], 50, level=0, hysteresis=0.1) == [0, 1, 2]
    assert covering([60, 258, 615], 57, level=0, hysteresis=0.1) == [0, 1, 2]
    assert covering([60, 258, 615], 57, level=1, hysteresis=0.1) == [1, 2], "60 less a tenth is 54"
    assert covering([60, 258, 615], 53, level=1, hysteresis=0.1) == [0, 1, 2]
    assert covering([60, 258, 615], 70, level=0, hysteresis=0.1) == [1, 2]
    assert covering([60, 258, 615], 1000, level=0, hysteresis=0.1) == [2], "the largest there is"
    assert covering([0, 0, 0], 50, level=0, hysteresis=0.1) == [2], "of equal ones the cheapest"


def test_a_batch_takes_a_step_for_its_prompts_and_one_for_each_further_token():
    """On a machine with a law: 4 ms a step, 1 ms a prompt token, 2 ms a decode, 0.01 ms a column read."""
    model = StepTime()
    for rows, count, start in [(r, c, s) for r in (1, 3, 8) for c, s in ((1, 5), (1, 60), (7, 0), (30, 0))] * 20:
        load = Load.of([(count, start)] * rows)
        model.observe(load, 0.004 + 1e-3 * load.prefill + 2e-3 * load.decodes + 1e-5 * load.kv)
    model.margin = 1.0
    prompts, decodes = 0.004 + 0.040, 4 * (0.004 + 0.008) + 1e-5 * 4 * (11 + 12 + 13 + 14)
    assert service_time(model, 4, Shape(10, 5)) == pytest.approx(prompts + decodes, rel=0.01)


def test_service_times_are_those_of_the_longest_prompt_and_the_longest_output_so_far():
    queue = [Request("a", [0] * 5, 2), Request("b", [0] * 3, 9)]
    model = StepTime()
    for _ in range(10):
        model.observe(Load(decodes=1), 0.1)  # any step takes 100 ms
    model.margin = 1.0
    assert service_times(model, queue) == pytest.approx([0.0, 0.2, 0.9, 0.9])


# The arrival rate.


@pytest.mark.parametrize("rate", [5, 100])
def test_the_arrival_rate_is_found(rate: int):
    estimate, waiting = ArrivalRate(window_s=10), requests(poisson(rate, 60))
    for req in waiting:
        estimate.see([req])
    assert estimate.per_second(60) == pytest.approx(rate, rel=3 / (2 * 10 * rate) ** 0.5), "three standard deviations"


def test_the_arrival_rate_follows_a_change_within_its_window():
    estimate = ArrivalRate(window_s=2)
    for i in range(1000):
        estimate.see(requests([i / 100]))
    assert estimate.per_second(10) == pytest.approx(100, rel=0.02)
    assert estimate.per_second(12) == pytest.approx(100 / 2.718, rel=0.02), "nobody came for a window"


def test_who_waits_on_is_counted_once():
    estimate, waiting = ArrivalRate(window_s=1), requests([0.0, 1.0])
    for _ in range(50):
        estimate.see(waiting)
    fresh = ArrivalRate(window_s=1)
    fresh.see(waiting)
    assert estimate.per_second(1.0) == fresh.per_second(1.0)


# Decisions.


@pytest.mark.parametrize(("rate", "variant"), [(50, "L"), (70, "M"), (300, "S")])
def test_it_runs_the_variant_that_the_hand_check_names(rate: float, variant: str):
    coming = requests(poisson(rate, 40))
    serve(deadline(), coming)
    assert usual_variant(coming[-len(coming) // 2 :]) == variant


def test_it_switches_at_the_hand_computed_rates_and_back():
    """30, then 80, then 300, then 30 requests a second: L, M, S and L again, each within three windows."""
    times = [time for start, rate in ((0, 30), (25, 80), (50, 300), (75, 30)) for time in poisson(rate, 25, start)]
    coming = requests(sorted(times))
    serve(deadline(), coming)
    seen = [usual_variant([r for r in coming if start + 15 <= r.arrival < start + 25]) for start in (0, 25, 50, 75)]
    assert seen == ["L", "M", "S", "L"]


def test_a_request_alone_is_served_at_once_by_the_most_accurate_variant():
    (step,) = serve(deadline(), requests([1.0]))
    assert (step.planned_at, step.variant) == (1.0, 0)


def test_the_earliest_deadline_goes_first():
    tables = [Table({1: 10.0})]
    limits = replace(LIMITS, max_batch_size=1, variants=("only",))
    coming = requests([0.0, 0.001, 0.002])
    coming[2].deadline = 0.05
    steps = serve(deadline(), coming, limits, tables)
    assert [step.rows[0].req.id for step in steps] == ["0", "2", "1"]


def test_a_request_that_no_variant_serves_in_time_is_rejected_and_says_so():
    hopeless, fine = requests([0.0, 0.0])
    hopeless.deadline = 0.005  # S needs 6 ms
    serve(deadline(), [hopeless, fine])
    assert hopeless.error is not None
    assert hopeless.error.code == "deadline_missed"
    assert fine.error is None


def test_with_little_time_left_the_faster_variant_serves():
    """L needs 40 ms, M 17, S 6."""
    for limit_s, variant in ((0.041, 0), (0.020, 1), (0.010, 2)):
        (hurried,) = requests([0.0])
        hurried.deadline = limit_s
        serve(deadline(), [hurried])
        assert (hurried.variant, hurried.error) == (variant, None)


def test_one_request_in_a_hurry_changes_the_model_of_no_other():
    """57 a second, which L carries if it need not come back: 60 less a tenth."""
    coming = requests([*(i / 30 for i in range(600)), *(20 + i / 57 for i in range(800))])
    hurried = Request("hurried", [0], 1, arrival=31.001, deadline=31.040)
    serve(deadline(), [*coming, hurried])
    assert hurried.variant > 0
    assert {req.variant for req in coming if req.arrival > 32} == {0}


def test_those_behind_are_thought_as_long_as_they_are_and_not_as_the_first_one():
    """A prompt of 900 tokens takes 0.28 s, the one behind it 0.02: both are in time, one after the other."""
    step_time = StepTime()
    for load in (Load.of([(count, 0)] * rows) for count in (1, 2, 50, 900) for rows in (1, 2, 8) for _ in range(3)):
        step_time.observe(load, 0.01 + 3e-4 * (load.prefill + load.decodes))
    long, short = Request("long", [0] * 900, 1, deadline=0.4), Request("short", [0] * 5, 1, deadline=0.4)
    limits = Limits(max_batch_size=8, num_blocks=1000)
    simulate(deadline(), limits, [long, short], lambda step: 0.01 + 3e-4 * step.num_tokens, known=[step_time])
    assert long.error is None
    assert short.error is None


def test_a_deferred_request_that_says_no_deadline_has_none_and_goes_last():
    tables = [Table({1: 60.0})]
    limits = replace(LIMITS, max_batch_size=1, variants=("only",))
    coming = [Request("deferred", [0], 1, Priority.DEFERRED, due=5.0), *requests([0.0, 0.05, 0.11])]
    steps = serve(deadline(), coming, limits, tables)
    assert [step.rows[0].req.id for step in steps] == ["0", "1", "2", "deferred"]
    assert coming[0].error is None


def test_with_two_steps_under_way_a_batch_waits_until_the_device_is_free():
    """Else its times would count from when the step before was begun."""
    answered = []
    for depth in (1, 2):
        coming = requests(poisson(250, 8))
        known = [KnownStepTime(table) for table in HAND]
        simulate(deadline(), LIMITS, coming, StepTimeTable(HAND), depth=depth, known=known)
        answered.append([(req.variant, req.answered_at) for req in coming])
        assert all(req.answered_at - req.arrival <= 0.1 + 1e-9 for req in coming if req.error is None)
    assert answered[0] == answered[1]


def test_a_batch_leaves_time_for_those_behind_it():
    """Ten at once. On L a batch of 8 takes 75 ms, and S then needs 7 for the other two; a batch of 7 takes 70, and S 8."""
    for limit_ms, rows in ((82, 8), (81, 7)):
        coming = requests([0.0] * 10)
        steps = serve(deadline(deadline_ms=limit_ms, window_s=1000), coming)
        assert (steps[0].variant, len(steps[0].rows)) == (0, rows)
        assert all(req.error is None for req in coming)


def test_a_batch_that_falls_behind_waits_but_only_as_long_as_its_first_request_can():
    """100 a second for two seconds, for a model that takes 20 ms whatever the batch, and half a second later one more. Nobody
    comes after it, so that it starts when it must: 20 ms before its deadline."""
    tables = [Table(dict.fromkeys(range(1, 9), 20.0))]
    coming = requests([*(i / 100 for i in range(200)), 2.5])
    steps = serve(deadline(window_s=1.0, deadline_ms=45), coming, replace(LIMITS, variants=("only",)), tables)
    assert steps[-1].planned_at == pytest.approx(2.5 + 0.025)
    assert all(req.error is None for req in coming)
    assert max(req.answered_at - req.arrival for req in coming) <= 0.045 + 1e-9
    assert min(len(step.rows) for step in steps[20:-1]) >= 2, "one alone would fall behind: 50 a second"


def test_it_does_not_wait_for_those_who_have_stopped_coming():
    """Five at once, of which four make a batch. The fifth would fall behind such a rate, but nobody follows for three gaps."""
    coming = requests([0.0] * 5)
    tables = [Table(dict.fromkeys(range(1, 5), 1000.0))]
    limits = replace(LIMITS, max_batch_size=4, variants=("only",))
    steps = serve(deadline(deadline_ms=60_000), coming, limits, tables)
    assert [(step.planned_at, len(step.rows)) for step in steps] == [(0.0, 4), (1.0, 1)]


def test_of_a_burst_too_large_for_its_deadline_as_many_are_served_as_there_is_time_for():
    """20 ms a request, whatever the batch: 50 in a second. A full batch of 64 would not be in time, nor leave any."""
    coming = requests([0.0] * 600)
    limits = replace(LIMITS, max_batch_size=64, variants=("only",))
    serve(deadline(deadline_ms=1000), coming, limits, [Table({b: 20.0 * b for b in range(1, 65)})])
    served = [req for req in coming if req.error is None]
    assert len(served) >= 49
    assert all(req.answered_at <= 1 + 1e-9 for req in served)


def test_an_overload_costs_those_it_must_and_the_others_are_in_time():
    """800 a second, of which S serves 615 in batches of 8."""
    coming = requests(poisson(800, 10))
    serve(deadline(), coming)
    served = [req for req in coming if req.error is None]
    assert all(req.answered_at - req.arrival <= 0.1 + 1e-9 for req in served)
    assert len(served) / coming[-1].arrival > 0.9 * 615


def test_before_anything_is_known_of_step_times_it_runs_and_learns():
    """The most accurate variant is tried first, and left when it proves too slow."""
    seconds = {0: 0.3, 1: 0.02, 2: 0.01}
    coming = requests(poisson(50, 20))
    steps: list[Step] = []
    simulate(deadline(), LIMITS, coming, lambda step: seconds[step.variant], on_step=steps.append)
    assert steps[0].variant == 0
    assert usual_variant(coming[len(coming) // 2 :]) == "M"


@pytest.mark.parametrize(("field", "value"), [("deadline_ms", 0), ("window_s", 0), ("hysteresis", 1), ("deadline_ms", "nan")])
def test_a_bad_parameter_is_one_line_naming_it(field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field}: must lie between"):
        Deadline.from_arguments({field: value})
