"""What is counted since the start, from runs whose every time is known."""

from dataclasses import replace
from itertools import accumulate, pairwise
from math import ceil
from random import Random

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed
from batching.policies.nobatch import NoBatch
from batching.policies.static import Static
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError
from batching.scheduler import Scheduler
from batching.totals import QUANTILE_ERROR, REQUEST_S, TOKEN_S, Histogram
from simulator.virtual import VirtualClock, VirtualExecutor

LIMITS = Limits(max_batch_size=2, token_budget=64, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=4)


class World:
    """A driver in virtual time; every step takes a second."""

    def __init__(self, policy: Policy, limits: Limits = LIMITS, depth: int = 1, failing: tuple[int, ...] = ()) -> None:
        self.clock = VirtualClock()
        self.driver = Driver(Scheduler(policy, limits), self.clock, lambda req: None)
        self.executor = VirtualExecutor(self.clock, depth=depth, failing=failing)

    def submit(self, *requests: Request) -> "World":
        for req in requests:
            self.driver.submit(req)
        return self

    def turn(self, times: int) -> "World":
        for _ in range(times):
            self.driver.iterate(self.executor)
        return self

    def finish(self) -> "World":
        while (due := self.driver.iterate(self.executor)) is not None:
            self.clock.now = max(self.clock.now, due)
        return self

    @property
    def counts(self):
        return self.driver.stats.totals().counts

    @property
    def histograms(self):
        return self.driver.stats.totals().histograms

    def summary(self):
        return self.driver.stats.summary(self.clock.now, live=False)


def entered(histogram: Histogram) -> tuple[int, float]:
    return sum(histogram.buckets), histogram.sum


def test_a_value_on_a_bound_lies_under_it():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3, 4):
        histogram.observe(value)
    assert histogram.buckets == [2, 2, 2]
    assert histogram.sum == 12
    histogram.observe(2, times=3)
    assert (histogram.buckets, histogram.sum) == ([2, 5, 2], 18)


def quantile(histogram: Histogram, share: float) -> float:
    """As Prometheus' histogram_quantile has it: a straight line through the bucket in which the rank lies."""
    at_most, rank = list(accumulate(histogram.buckets)), share * sum(histogram.buckets)
    bucket = next(i for i, count in enumerate(at_most) if count >= rank)
    low, below = (histogram.bounds[bucket - 1], at_most[bucket - 1]) if bucket else (0.0, 0)
    return low + (histogram.bounds[bucket] - low) * (rank - below) / (at_most[bucket] - below)


DISTRIBUTIONS = {
    "lognormal": lambda draw: draw.lognormvariate(-3.0, 0.5),
    "a long lognormal": lambda draw: draw.lognormvariate(0.0, 1.2),
    "heavy tail up to minutes": lambda draw: min(0.05 * draw.paretovariate(0.7), 900.0),
    "all the same": lambda draw: 0.01201,
    "just above a bound": lambda draw: 2.4000001,
    "two lumps": lambda draw: draw.choice((0.0123, 7.3)),
    "uniform": lambda draw: draw.uniform(0.002, 6.0),
}


@pytest.mark.parametrize("bounds", [TOKEN_S, REQUEST_S], ids=["between tokens", "of requests"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_quantile_estimated_from_the_buckets_is_within_the_stated_error(name: str, bounds: tuple[float, ...]):
    draw = Random(7)
    most = 20.0 if bounds is TOKEN_S else 1000.0
    values = sorted(min(DISTRIBUTIONS[name](draw), most) for _ in range(20_000))
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    for share in (0.5, 0.9, 0.99, 0.999):
        exact = values[ceil(share * len(values)) - 1]
        assert quantile(histogram, share) == pytest.approx(exact, rel=QUANTILE_ERROR), share


def test_each_bound_of_a_time_is_at_most_the_stated_error_above_the_one_before():
    for bounds, first, last in ((TOKEN_S, 0.0002, 20.0), (REQUEST_S, 0.001, 1000.0)):
        fine = [bound for bound in bounds if bound <= last]
        assert (fine[0], fine[-1]) == (pytest.approx(first, rel=0.1), last)
        assert max(high / low for low, high in pairwise(fine)) <= 1 + QUANTILE_ERROR + 1e-9
        assert list(bounds) == sorted(set(bounds))


@pytest.mark.parametrize(("policy", "num_blocks"), [(Dynamic(), 4), (Static(), 16)], ids=["preemption", "padding"])
def test_until_the_first_reset_the_summary_says_the_same(policy: Policy, num_blocks: int):
    world = (
        World(policy, replace(LIMITS, num_blocks=num_blocks))
        .submit(Request("A", [0] * 7, 5), Request("B", [0] * 7, 4, Priority.DEFERRED))
        .finish()
    )
    counts, summary = world.counts, world.summary()
    assert counts.preemptions + counts.padding_tokens > 0
    assert {
        "total-tokens-handled": counts.output_tokens,
        "steps": counts.steps,
        "tokens_computed": counts.computed_tokens,
        "padding_tokens": counts.padding_tokens,
        "recomputed_tokens": counts.recomputed_tokens,
        "preemptions": counts.preemptions,
        "requests_finished": counts.finished.total(),
        "batch_size_histogram": {str(size): steps for size, steps in sorted(counts.batch_sizes.items())},
        "busy_share": counts.busy_s / world.clock.now,
    }.items() <= summary.items()
    assert counts.prompt_tokens == 14
    assert dict(counts.finished) == {("immediate", "length"): 1, ("deferred", "length"): 1}


def test_a_reset_begins_the_summary_anew_and_takes_nothing_from_the_totals():
    world = World(Dynamic()).submit(Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)).finish()
    before = world.counts
    world.driver.stats.reset(world.clock.now, live=False)
    assert world.counts == before
    assert (world.summary()["preemptions"], world.summary()["requests_finished"], world.summary()["errors"]) == (0, 0, {})
    world.submit(Request("C", [0], 3, arrival=world.clock.now)).finish()
    assert world.summary()["total-tokens-handled"] == 3
    assert world.counts.output_tokens == before.output_tokens + 3
    assert world.counts.preemptions == before.preemptions == 1


def test_what_was_read_once_does_not_change_any_more():
    world = World(Dynamic()).submit(Request("a", [0], 3)).turn(1)
    totals = world.driver.stats.totals()
    world.finish()
    assert totals.counts.output_tokens == 1
    assert entered(totals.histograms.first_token["immediate"]) == (1, 1.0)
    assert entered(totals.histograms.between_tokens["immediate"]) == (0, 0.0)


def test_tokens_are_entered_as_they_come_and_the_rest_when_the_request_has_finished():
    world = World(Dynamic()).submit(Request("a", [0] * 5, 4)).turn(3)
    assert entered(world.histograms.first_token["immediate"]) == (1, 1.0)
    assert entered(world.histograms.between_tokens["immediate"]) == (2, 2.0)
    assert entered(world.histograms.latency["immediate"]) == (0, 0.0)
    assert world.counts.prompt_tokens == 5
    world.finish()
    assert entered(world.histograms.latency["immediate"]) == (1, 4.0)
    assert entered(world.histograms.per_output_token["immediate"]) == (1, 1.0)
    assert entered(world.histograms.prompt_tokens["immediate"]) == (1, 5)
    assert entered(world.histograms.output_tokens["immediate"]) == (1, 4)
    assert entered(world.histograms.step_tokens) == (4, 5 + 3)


def test_the_times_of_a_request_add_up_to_its_latency():
    world = World(NoBatch()).submit(Request("first", [0], 3), Request("second", [0], 5, Priority.DEFERRED)).finish()
    found = world.histograms
    assert entered(found.queue["immediate"]) == (1, 0.0)
    assert entered(found.queue["deferred"]) == (1, 3.0), "it waited for all of the first"
    assert entered(found.prefill["deferred"]) == (1, 1.0)
    assert entered(found.decode["deferred"]) == (1, 4.0)
    assert entered(found.latency["deferred"]) == (1, 8.0)


def test_time_in_the_queue_ends_with_the_first_seat_whatever_preempts_it():
    world = World(Dynamic()).submit(Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)).finish()
    assert world.counts.preemptions == 1
    assert entered(world.histograms.queue["immediate"]) == (2, 0.0)


def test_a_single_token_has_no_time_per_output_token():
    world = World(Dynamic()).submit(Request("a", [0], 1)).finish()
    assert entered(world.histograms.per_output_token["immediate"]) == (0, 0.0)
    assert entered(world.histograms.latency["immediate"]) == (1, 1.0)


def test_of_a_request_that_fails_the_tokens_count_and_the_error():
    world = World(Dynamic(), failing=(3,)).submit(Request("a", [0] * 5, 4)).finish()
    assert world.counts.errors == {"step_failed": 1}
    assert world.counts.finished.total() == 0
    assert (world.counts.prompt_tokens, world.counts.output_tokens) == (5, 2)
    assert entered(world.histograms.latency["immediate"]) == (0, 0.0)


def test_a_stop_met_with_two_steps_under_way_counts_once():
    stops = Request("a", [0] * 5, 9, stop=lambda req: len(req.output) == 3)
    world = World(Dynamic(), depth=2).submit(stops).finish()
    assert dict(world.counts.finished) == {("immediate", "stop"): 1}
    assert entered(world.histograms.output_tokens["immediate"]) == (1, 3)
    assert entered(world.histograms.max_tokens["immediate"]) == (1, 9)
    assert world.counts.output_tokens == 3


def test_a_promoted_request_is_of_a_class_of_its_own_from_then_on():
    limits = replace(LIMITS, max_batch_size=1, num_blocks=16)
    late = Request("late", [0], 3, Priority.DEFERRED, due=4.0)
    world = World(Mixed(), limits).submit(Request("a", [0], 9)).turn(8)
    world.submit(late).finish()
    assert late.promoted
    assert world.counts.promotions == 1
    assert world.counts.finished["promoted", "length"] == 1
    assert entered(world.histograms.first_token["promoted"])[0] == 1


def test_a_cancelled_request_is_an_error_by_its_code():
    world = World(Dynamic()).submit(Request("a", [0], 3)).turn(1)
    world.driver.cancel("a", RequestError("cancelled", "gone"))
    assert world.counts.errors == {"cancelled": 1}
