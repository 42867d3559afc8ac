"""The figures of /stats from runs whose every time is known."""

import json

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.static import Static
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError
from batching.scheduler import Scheduler
from batching.stats import distribution
from batching.step import StepResult
from simulator.virtual import VirtualClock, VirtualExecutor

LIMITS = Limits(max_batch_size=2, token_budget=64, max_prefill_tokens=64, max_context=64, block_size=4, num_blocks=4)


def run(policy: Policy, requests: list[Request], step_time: float = 1.0, depth: int = 1) -> Driver:
    clock = VirtualClock()
    driver = Driver(Scheduler(policy, LIMITS), clock, lambda req: None)
    executor = VirtualExecutor(clock, lambda step: step_time, depth)
    for req in requests:
        driver.submit(req)
    while (due := driver.iterate(executor)) is not None:
        clock.now = max(clock.now, due)
    return driver


def test_throughput_is_per_wall_clock_second_and_not_per_summed_latency():
    driver = run(Dynamic(), [Request("a", [0] * 2, 4), Request("b", [0] * 2, 4, Priority.DEFERRED)], step_time=0.5)
    stats = driver.stats.summary(now=99.0, live=False)
    assert stats["total-tokens-handled"] == 8
    assert stats["total-elapsed-time"] == 2.0, "four steps of half a second; the clock stops with the last answer"
    assert stats["throughput"] == stats["output_token_throughput"] == 4.0
    assert stats["total_token_throughput"] == 6.0
    assert stats["request_throughput"] == 1.0
    assert stats["latency-per-token"] == 0.5
    assert stats["latency"]["all"]["requests"] == 2
    assert stats["latency"]["deferred"]["requests"] == 1
    assert stats["latency"]["immediate"]["server_ttft"]["mean"] == 0.5
    assert stats["latency"]["immediate"]["e2el"]["p99"] == 2.0
    assert stats["latency"]["immediate"]["tpot"]["p50"] == 0.5
    assert stats["latency"]["immediate"]["itl"]["mean"] == 0.5


def test_a_pause_is_in_the_wall_clock_and_not_in_the_time_with_work():
    clock = VirtualClock()
    driver = Driver(Scheduler(Dynamic(), LIMITS), clock, lambda req: None)
    executor = VirtualExecutor(clock, lambda step: 0.5)
    for arrival in (0.0, 0.5, 100.0):  # the second comes while the first runs
        clock.now = max(clock.now, arrival)
        driver.submit(Request(str(arrival), [0], 4, arrival=clock.now))
        while arrival and driver.iterate(executor) is not None:
            pass
        driver.iterate(executor)
    stats = driver.stats.summary(clock.now, live=False)
    assert stats["total-elapsed-time"] == 2.5 + 2.0
    assert stats["throughput"] == 12 / 4.5
    assert stats["wall_s"] == 102.0
    assert stats["output_token_throughput"] == 12 / 102
    assert stats["busy_share"] == 4.5 / 102


def test_a_request_that_waits_or_runs_is_work_and_one_that_was_refused_is_none():
    clock = VirtualClock()
    driver = Driver(Scheduler(Dynamic(), LIMITS), clock, lambda req: None)
    driver.submit(Request("too long", [0] * 60, 60))
    clock.now = 5.0
    driver.submit(Request("a", [0], 3, arrival=5.0))
    clock.now = 7.0
    assert driver.stats.summary(7.0, live=True)["total-elapsed-time"] == 2.0
    driver.stats.reset(7.0, live=True)
    clock.now = 8.0
    driver.cancel("a", RequestError("cancelled", "gone"))
    assert driver.stats.summary(99.0, live=False)["total-elapsed-time"] == 1.0


def test_what_a_steps_record_tells_since_the_reset_is_what_the_summary_does():
    driver = run(Static(), [Request("a", [0] * 2, 1), Request("b", [0] * 6, 3)])
    assert driver.stats.since_reset() == {"first_step": 1, "padding_share": 6 / 16}
    assert driver.stats.summary(0.0, live=False)["padding_share"] == 6 / 16
    driver.stats.reset(now=50.0, live=False)
    assert driver.stats.since_reset() == {"first_step": 4, "padding_share": 0.0}
    records = [json.loads(record) for record in driver.steps.read(0, 10)[1]]
    assert [(record["first_step"], record["padding_share"]) for record in records] == [(1, 4 / 12), (1, 5 / 14), (1, 6 / 16)]


def test_a_token_computed_after_the_stop_is_not_counted():
    stop_after_two = [Request(name, [0], 9, stop=lambda req: len(req.output) == 2) for name in "ab"]
    driver = run(Dynamic(), stop_after_two, depth=2)
    assert driver.stats.summary(now=0, live=False)["total-tokens-handled"] == 4


def test_a_step_that_was_under_way_at_a_reset_counts_from_the_reset_on():
    clock = VirtualClock()
    driver = Driver(Scheduler(Dynamic(), LIMITS), clock, lambda req: None)
    driver.submit(Request("a", [0], 2))
    step = driver.next_step()
    assert step is not None
    driver.stats.reset(now=9.0, live=True)
    driver.complete(StepResult(step.id, 0.0, 10.0, {"a": 1}))
    assert driver.stats.summary(now=10.0, live=True)["busy_share"] == 1.0


def test_padding_is_counted_apart_from_the_tokens_that_count():
    driver = run(Static(), [Request("a", [0] * 2, 1), Request("b", [0] * 6, 3)])
    stats = driver.stats.summary(now=0, live=False)
    assert stats["tokens_computed"] == 8 + 2
    assert stats["padding_tokens"] == 4 + 2
    assert stats["padding_share"] == 6 / 16
    assert stats["batch_size_histogram"] == {"1": 2, "2": 1}


def test_recomputed_tokens_are_what_a_preemption_threw_away():
    driver = run(Dynamic(), [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)])
    stats = driver.stats.summary(now=0, live=False)
    assert stats["preemptions"] == 1
    assert stats["recomputed_tokens"] == 8, "B's prompt and the one token it had fed back"


def test_a_reset_forgets_all_and_the_clock_starts_with_the_next_arrival():
    driver = run(Dynamic(), [Request("a", [0], 2)])
    driver.stats.reset(now=50.0, live=False)
    stats = driver.stats.summary(now=60.0, live=False)
    assert stats["total-tokens-handled"] == stats["steps"] == 0
    assert stats["total-elapsed-time"] == 0
    assert stats["throughput"] == 0
    assert stats["latency"]["all"]["e2el"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_a_single_token_has_no_time_per_output_token():
    driver = run(Dynamic(), [Request("a", [0], 1)])
    assert driver.stats.summary(now=0, live=False)["latency"]["all"]["tpot"]["mean"] is None


def test_percentiles_lie_linearly_between_the_nearest_ranks():
    assert distribution(range(1, 101)) == pytest.approx({"mean": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01})
    assert distribution([3.0]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}
