"""What `fastserve` promises: short jobs pass long ones, nobody starves, and what was preempted is not computed again."""

import random

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.fastserve import FastServe, FastServeParams
from batching.policies.orca import Orca
from batching.policies.support.feedback_queue import FeedbackQueue, first_queue
from batching.policy import Limits, Policy
from batching.request import Request
from batching.scheduler import Scheduler
from batching.step import Step
from simulator.virtual import VirtualClock, VirtualExecutor, simulate
from tests.policies.machine import a_gpt, a_millisecond_a_token, serve
from tests.told import Plans


def fastserve(base_s: float = 1.0, alpha_s: float = 1e6) -> FastServe:
    return FastServe(FastServeParams(base_ms=1e3 * base_s, alpha_s=alpha_s))


def limits(**changes: int) -> Limits:
    return Limits(
        **{"max_batch_size": 1, "token_budget": 64, "max_context": 64, "block_size": 1, "num_blocks": 1000, **changes}
    )


def ids(steps: list[Step]) -> str:
    return " ".join("".join(row.req.id for row in step.rows) for step in steps)


# The queue.


@pytest.mark.parametrize(
    ("prefill_ms", "queue"), [(4, 0), (10, 0), (10.1, 1), (35, 2), (80, 3), (81, 4)], ids=lambda value: f"{value:g}"
)
def test_a_request_enters_the_first_queue_whose_quantum_covers_its_prefill(prefill_ms: float, queue: int):
    assert first_queue(prefill_ms / 1e3, base_s=0.01) == queue


def prefill_s(req: Request) -> float:
    """A second a token."""
    return req.num_tokens


class TestFeedbackQueue:
    """Base 1 s: quanta of 1, 2, 4 s. a joins queue 0, b queue 1, c queue 2, by the length of their prefills."""

    def queue(self, alpha_s: float = 100.0) -> tuple[FeedbackQueue, list[Request]]:
        requests = [Request(name, [0] * tokens, 1) for name, tokens in (("c", 4), ("b", 2), ("a", 1))]
        queue = FeedbackQueue(1.0, alpha_s)
        queue.update(requests, (), 0.0, 0.0, prefill_s)
        return queue, requests

    def test_higher_queues_come_first(self):
        queue, _ = self.queue()
        assert [req.id for req in queue.ranking()] == ["a", "b", "c"]

    def test_who_has_used_up_its_quantum_goes_one_queue_down_and_behind_those_who_are_there(self):
        queue, (c, b, a) = self.queue()
        queue.update([c, b, a], {a, b}, 1.0, 1.0, prefill_s)
        assert [queue.queue_of(req) for req in (a, b, c)] == [1, 1, 2]
        assert [req.id for req in queue.ranking()] == ["b", "a", "c"]
        queue.update([c, b, a], {b}, 1.0, 2.0, prefill_s)
        assert [req.id for req in queue.ranking()] == ["a", "c", "b"], "b had a second of its two before"

    def test_who_has_waited_too_long_returns_to_queue_0_with_a_new_quantum(self):
        queue, (c, b, _) = self.queue(alpha_s=3.0)
        queue.update([c, b], {b}, 0.5, 3.0, prefill_s)
        assert queue.queue_of(c) == 2
        queue.update([c, b], {b}, 0.5, 3.5, prefill_s)
        assert queue.queue_of(c) == 0
        assert queue.queue_of(b) == 1, "it ran"

    def test_in_queue_0_nobody_loses_its_place_by_waiting(self):
        queue, (_, _, a) = self.queue(alpha_s=3.0)
        later = Request("later", [0], 1)
        queue.update([a, later], (), 0.0, 2.0, prefill_s)
        queue.update([a, later], (), 0.0, 3.5, prefill_s)
        assert queue.ranking() == [a, later]

    def test_the_next_run_comes_after_the_quanta_ahead_or_with_the_return_to_queue_0(self):
        queue, (c, b, a) = self.queue(alpha_s=10.0)
        assert queue.until_next_run(2, now=0.0) == {a: 0.0, b: 0.5, c: 1.5}
        assert queue.until_next_run(2, now=9.0) == {a: 0.0, b: 0.5, c: 1.0}


# The schedule. One sequence slot and a second a step, unless it says otherwise.


def test_a_short_job_passes_a_long_one_which_goes_on_where_it_was():
    """L has used up the quanta of queue 0 (1 s) and 1 (2 s) when S comes. S is through after 2.5 s instead of 6.5."""
    clock, steps, plans, answered = VirtualClock(), [], Plans(), []
    driver = Driver(Scheduler(fastserve(), limits()), clock, answered.append, on_plan=plans)
    executor = VirtualExecutor(clock, lambda step: steps.append(step) or 1.0)
    long, short = Request("L", [0] * 3, 7), Request("S", [0], 2, arrival=2.5)
    driver.submit(long)
    for _ in range(3):
        driver.iterate(executor)
    driver.submit(short)
    while driver.iterate(executor) is not None:
        pass
    assert ids(steps) == "L L L S S L L L L"
    assert [(req.id, req.answered_at) for req in answered] == [("S", 5.0), ("L", 9.0)]
    assert (plans[3].preempted, plans[3].dropped) == (("L",), ())
    assert plans[3].reasons["L"] == "preempted in queue 2: request S lacked slots"
    assert [(row.start, row.count) for step in steps for row in step.rows if row.req is long][3] == (5, 1)
    assert long.output == [3, 4, 5, 6, 7, 8, 9]
    stats = driver.stats.summary(9.0, live=False)
    assert (stats["preemptions"], stats["recomputed_tokens"]) == (1, 0)
    assert stats["tokens_computed"] == 3 + 6 + 2


def test_jobs_of_one_queue_take_turns_of_its_quantum():
    steps: list[Step] = []
    simulate(fastserve(), limits(), [Request("A", [0], 7), Request("B", [0], 7)], on_step=steps.append)
    assert ids(steps) == "A B A A B B A A A A B B B B"


def test_a_long_prompt_skips_the_queues_whose_quantum_is_shorter_than_its_prefill():
    """A millisecond a token, quanta of 9.5, 19, 38 ms: P joins queue 2. B is done before it, though it came later; A has used
    up a quantum after ten tokens and is in queue 1 then, still before P."""
    requests = [Request("A", [0], 12), Request("P", [0] * 35, 2), Request("B", [0], 3, arrival=0.005)]
    run = serve(fastserve(0.0095), limits(), requests, a_millisecond_a_token)
    assert [req.id for req in run.answered] == ["B", "A", "P"]
    assert ids(run.steps) == " ".join("A" * 10 + "B" * 3 + "A" * 2 + "P" * 2)


def test_who_has_waited_longer_than_alpha_runs_though_shorter_jobs_keep_coming():
    requests = [Request("L", [0], 4), *(Request(f"{i}", [0], 1, arrival=float(i)) for i in range(1, 10))]
    steps: list[Step] = []
    simulate(fastserve(alpha_s=3.0), limits(), requests, on_step=steps.append)
    assert ids(steps) == "L 1 2 3 4 L 5 6 7 8 9 L L", "idle since 1 s, it has waited longer than 3 s at 5 s; then since 6 s"


def test_where_blocks_are_short_the_one_that_would_run_again_last_loses_its_kv_and_recomputes():
    """Eight KV columns. When S comes, A (in queue 2, three columns) and B (queue 1, two) wait with theirs; three are free and S
    needs four. A would run again last. It computes its columns again, B goes on where it was."""
    a, b, s = Request("A", [0], 5), Request("B", [0], 4, arrival=2.5), Request("S", [0] * 4, 1, arrival=4.5)
    steps: list[Step] = []
    plans = Plans()
    simulate(fastserve(), limits(num_blocks=8), [a, b, s], on_step=steps.append, on_plan=plans)
    assert ids(steps) == "A A A B B S B A A B"
    assert (plans[3].preempted, plans[3].dropped) == (("A",), ())
    assert (plans[5].preempted, plans[5].dropped) == (("B",), ("A",))
    assert plans[5].reasons["A"] == "preempted in queue 2: request S lacked blocks"
    assert (a.lost, b.lost) == (3, 0)
    assert [(row.start, row.count) for row in steps[7].rows] == [(0, 4)], "its prompt and what it had generated"
    assert (a.output, b.output, s.output) == ([1, 2, 3, 4, 5], [1, 2, 3, 4], [4])


def test_nobody_loses_its_kv_for_one_that_would_not_fit_all_the_same():
    """Of 14 KV columns H, which goes first, takes 8, and L, in queue 1, holds 2. P, between them, needs 7: L's would not do. Q
    would fit, but came after P."""
    requests = [
        Request("L", [0], 9),
        Request("H", [0] * 8, 2, arrival=1.5),
        Request("P", [0] * 7, 1, arrival=1.5),
        Request("Q", [0], 1, arrival=1.6),
    ]
    steps: list[Step] = []
    plans = Plans()
    simulate(fastserve(base_s=1.5), limits(num_blocks=14, max_batch_size=3), requests, on_step=steps.append, on_plan=plans)
    assert not any(plan.dropped for plan in plans)
    assert ids(steps) == "L L HL HL PQL L L L L"


def test_nobody_loses_its_seat_for_one_that_finds_no_blocks_all_the_same():
    """Of 45 KV columns H, in queue 0, takes up to 20; P, which comes then, needs 40, and L, in queue 1, has few."""
    requests = [Request("L", [0], 40), Request("H", [0] * 8, 12, arrival=1.5), Request("P", [0] * 40, 1, arrival=1.6)]
    steps: list[Step] = []

    def first_two_are_slow(step: Step) -> float:
        return 1.0 if step.id <= 2 else 0.01

    simulate(fastserve(base_s=1.5), limits(num_blocks=45, max_batch_size=2), requests, first_two_are_slow, on_step=steps.append)
    together = [step for step in steps if any(row.req.id == "H" for row in step.rows)]
    assert all({row.req.id for row in step.rows} == {"L", "H"} for step in together)


# What comes of it.


ENGINE = Limits(max_batch_size=8, token_budget=256, max_context=300, num_blocks=2000)


def heavy_tailed(count: int, rate: float) -> list[Request]:
    """Seven of ten generate 4 to 16 tokens, one in ten more than 70, up to 240 (Pareto, shape 0.8)."""
    rng, at, requests = random.Random(1), 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        output = min(240, int(4 * rng.paretovariate(0.8)))
        requests.append(Request(str(i), [0] * rng.randint(5, 60), output, arrival=at))
    return requests


def mean_latency_s(requests: list[Request]) -> float:
    return sum(req.answered_at - req.arrival for req in requests) / len(requests)


@pytest.mark.parametrize("fcfs", [Dynamic(), Orca()], ids=["dynamic", "orca"])
def test_short_jobs_wait_far_less_than_under_first_come_first_served(fcfs: Policy):
    means = {}
    for policy in (FastServe(), fcfs):
        answered = serve(policy, ENGINE, heavy_tailed(400, rate=21.0), a_gpt).answered
        short = [req for req in answered if req.max_tokens <= 16]
        long = [req for req in answered if req.max_tokens > 16]
        assert len(short) + len(long) == 400
        means[type(policy)] = [mean_latency_s(group) for group in (short, long, answered)]
    ours, theirs = means[FastServe], means[type(fcfs)]
    assert ours[0] < 0.2 * theirs[0]
    assert ours[2] < 0.8 * theirs[2], "and so does the mean over all"
    assert ours[1] < 1.3 * theirs[1], "what the long ones pay"


def test_with_memory_to_spare_nothing_is_computed_twice():
    run = serve(FastServe(), ENGINE, heavy_tailed(400, rate=21.0), a_gpt)
    stats = run.driver.stats.summary(0.0, live=False)
    assert stats["preemptions"] > 100
    assert stats["recomputed_tokens"] == 0
    assert not any(plan.dropped for plan in run.plans)


@pytest.mark.parametrize(("name", "value"), [("base_ms", 0), ("alpha_s", -1)])
def test_a_parameter_out_of_its_range_is_refused_by_name(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}: must lie between"):
        FastServe.from_arguments({name: value})
