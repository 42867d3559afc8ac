"""Sequence scheduling: what grouping by predicted length saves, what wrong predictions cost, and that nobody gets another's
answer."""

import random
import re

import pytest

from batching.policies.sequence import SequenceParams, SequenceScheduling
from batching.policies.static import Static
from batching.policy import Limits, Policy
from batching.request import Request
from batching.step import Step
from simulator.virtual import simulate
from tests.told import Plans

EXAMPLE = [10, 200, 15, 190]


def limits(seats: int) -> Limits:
    return Limits(max_batch_size=seats, max_context=1024, block_size=16, num_blocks=100_000, max_queue=10_000)


def jobs(lengths: list[int], most: int | None = None, prompt: int = 1) -> list[Request]:
    """Requests that stop after so many tokens; `most` is what they ask for."""
    return [
        Request(
            f"job{i}",
            [0] * prompt,
            most or length,
            stop=lambda req, length=length: len(req.output) == length,
            output_len=length,
        )
        for i, length in enumerate(lengths)
    ]


def sequence(**params: float | str) -> Policy:
    return SequenceScheduling.from_arguments({"batch_timeout_ms": 0, **params})


def run(policy: Policy, requests: list[Request], seats: int, plans: Plans | None = None) -> list[Step]:
    steps: list[Step] = []
    answered = simulate(policy, limits(seats), requests, on_step=steps.append, on_plan=Plans() if plans is None else plans)
    assert len(answered) == len(requests)
    for req in requests:
        begin = req.prompt_len
        assert req.output == list(range(begin, begin + (req.output_len or 0))), "answer i belongs to prompt i"
    return steps


def slot_steps(steps: list[Step]) -> int:
    return sum(len(step.rows) for step in steps)


def wasted(steps: list[Step]) -> int:
    return sum(row.count == 0 for step in steps for row in step.rows)


def batches(steps: list[Step]) -> list[list[str]]:
    """Who is in each batch: the rows of the steps that prefill."""
    return [[row.req.id for row in step.rows] for step in steps if any(row.start == 0 for row in step.rows)]


def test_the_papers_four_lengths_take_430_slot_steps_sorted_and_780_in_order_of_arrival():
    in_order = run(Static.from_arguments({"batch_timeout_ms": 0}), jobs(EXAMPLE), seats=2)
    by_length = run(sequence(), jobs(EXAMPLE), seats=2)
    assert batches(by_length) == [["job0", "job2"], ["job3", "job1"]]
    assert (slot_steps(in_order), slot_steps(by_length)) == (780, 430)
    useful = sum(row.count > 0 for step in by_length for row in step.rows)
    assert useful == sum(EXAMPLE) == 415


def test_fewer_slot_steps_are_wasted_than_by_static_batches_of_the_same_requests():
    rng = random.Random(7)
    lengths = [rng.choice((rng.randint(1, 40), rng.randint(100, 400))) for _ in range(256)]
    static = run(Static.from_arguments({"batch_timeout_ms": 0}), jobs(lengths, prompt=5), seats=64)
    by_length = run(sequence(), jobs(lengths, prompt=5), seats=64)
    noisy = run(sequence(predictor="noisy", error=0.3), jobs(lengths, prompt=5), seats=64)
    assert wasted(static) > sum(lengths), "more than half of the rows are padding"
    assert wasted(by_length) < wasted(static) / 5
    assert wasted(by_length) < wasted(noisy) < wasted(static) / 2


def test_the_shorter_the_bucket_the_larger_its_batches():
    lengths = [10] * 64 + [60] * 32 + [110] * 16 + [160] * 16 + [260] * 16
    shapes = [len(batch) for batch in batches(run(sequence(longest_batch=4), jobs(lengths), seats=64))]
    assert shapes == [64, 32, 16, 8, 8, 4, 4, 4, 4]


def test_a_remainder_that_fills_less_than_half_of_a_batch_joins_the_next_bucket():
    few, many = [10] * 7, [10] * 8
    assert [len(batch) for batch in batches(run(sequence(longest_batch=8), jobs(few + [70] * 8), seats=16))] == [8, 7]
    assert [len(batch) for batch in batches(run(sequence(longest_batch=8), jobs(many + [70] * 8), seats=16))] == [8, 8]


class Says:
    """Predicts what it was given, the true length for everybody else."""

    def __init__(self, **lengths: int) -> None:
        self.lengths = lengths

    def predict(self, req: Request) -> int:
        return self.lengths.get(req.id, req.output_len or 0)

    def learn(self, req: Request) -> None:
        pass


def test_who_is_predicted_too_short_is_stopped_and_runs_again_in_the_windows_last_batch():
    policy = SequenceScheduling(SequenceParams(batch_timeout_ms=0, bucket=20))
    policy.predictor = Says(job0=10)
    plans = Plans()
    steps = run(policy, jobs([90, 15, 70, 75], most=100), 2, plans)
    assert batches(steps) == [["job0", "job1"], ["job2", "job3"], ["job0"]]
    assert [len(step.rows) for step in steps] == [2] * 20 + [2] * 75 + [1] * 70
    assert [row.count for row in steps[20 + 75].rows] == [1 + 20], "its prompt, and the bucket's 20 tokens that it had"
    (stopped,) = (plan for plan in (*plans, *plans.others) if plan.preempted)
    assert stopped.preempted == ("job0",)
    assert stopped.reasons["job0"].startswith("failed: longer than predicted")


def test_a_window_is_run_to_its_last_failure_before_the_next_one_begins():
    policy = SequenceScheduling(SequenceParams(batch_timeout_ms=0, bucket=20, window=2))
    policy.predictor = Says(job0=10, job1=10)
    plans = Plans()
    steps = run(policy, jobs([30, 30, 5], most=100), 2, plans)
    assert batches(steps) == [["job0", "job1"], ["job1", "job0"], ["job2"]]
    assert [plan.preempted for plan in plans.others if plan.preempted] == [("job0", "job1")], "their plan computes nothing"


def test_a_batch_has_room_for_its_buckets_length_and_no_more():
    """200 columns: 3 outputs of at most 60 tokens fit; of those 100 that each may ask for, one would."""
    policy = sequence(bucket=30)
    steps: list[Step] = []
    small = Limits(max_batch_size=4, max_context=512, block_size=1, num_blocks=200)
    simulate(policy, small, jobs([50] * 3, most=150), on_step=steps.append)
    assert len(steps[0].rows) == 3
    assert max(len(row.req.blocks) for step in steps for row in step.rows) <= 60


def test_a_window_that_does_not_fill_starts_when_its_first_request_has_waited_for_the_time_out():
    requests = jobs([5, 5, 5])
    for req, arrival in zip(requests, (1.0, 1.04, 1.06), strict=True):
        req.arrival = arrival
    steps: list[Step] = []
    policy = sequence(batch_timeout_ms=50)
    simulate(policy, limits(8), requests, lambda step: 0.001, on_step=steps.append)
    assert batches(steps) == [["job0", "job1"], ["job2"]]
    assert [step.planned_at for step in (steps[0], steps[5])] == pytest.approx([1.05, 1.11])
    steps.clear()
    simulate(sequence(batch_timeout_ms=50, window=2), limits(8), [*jobs([5, 5])], lambda step: 0.001, on_step=steps.append)
    assert steps[0].planned_at == 0.0, "a full window does not wait"


def test_the_running_mean_follows_the_lengths_that_finished():
    """The first batch is long, as nothing is known then; the second is stopped near the mean, and its failures run again."""
    steps = run(sequence(predictor="mean", window=4, bucket=1), jobs([20] * 4 + [10, 20, 30, 40], most=50), seats=4)
    assert batches(steps) == [[f"job{i}" for i in range(4)], [f"job{i}" for i in range(4, 8)], ["job7", "job6"]]
    assert [len(step.rows) for step in steps] == [4] * 20 + [4] * 20 + [2] * 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"predictor": "psychic"}, "predictor: must be one of oracle, noisy, mean, not 'psychic'"),
        ({"predictor": 3}, "predictor: must be a name, not 3"),
        ({"error": "large"}, "error: must be a number, not 'large'"),
        ({"error": -1}, "error: must lie between 0 and 10, not -1"),
        ({"window": 0}, "window: must lie between 1 and 1e+06, not 0"),
        ({"bucket": "nan"}, "bucket: must lie between"),
        ({"longest_batch": 0.5}, "longest_batch: must lie between"),
        ({"batch_timeout_ms": 1e9}, "batch_timeout_ms: must lie between"),
    ],
)
def test_a_bad_parameter_is_one_line_naming_it_and_what_it_may_be(arguments: dict, told: str):
    with pytest.raises(ValueError, match=re.escape(told)):
        SequenceScheduling.from_arguments(arguments)
