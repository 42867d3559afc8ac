"""The CENG523 tables, and the project's worked example: the formula, and what really happens."""

import pytest

from batching.request import Request
from batching.step import Row, Step
from batching.step_time import Load
from simulator.tables import KnownStepTime, StepTimeTable, Table, ceng523
from teaching.examples.deadline import formula, static_run


def test_a_batch_takes_inference_communication_and_the_fixed_times():
    large, middle, small = ceng523()
    assert [large.ms[size] for size in (1, 2, 4, 8, 16, 32, 64)] == [15, 20.5, 31, 47, 83, 149, 271]
    assert [table.ms[8] for table in (large, middle, small)] == [40 + 4 + 3, 30 + 4 + 3, 15 + 4 + 3]


def test_a_batch_between_two_sizes_is_padded_to_the_larger_one():
    table = ceng523()[0]
    assert [table.seconds(rows) for rows in (1, 2, 3, 4, 5, 64)] == pytest.approx([0.015, 0.0205, 0.031, 0.031, 0.047, 0.271])
    with pytest.raises(ValueError, match="a batch of 65: the table ends at 64"):
        table.seconds(65)


def test_a_step_takes_what_the_table_of_its_variant_says():
    rows = tuple(Row(Request(str(i), [0], 1), 0, 1, 0, 0, True) for i in range(8))
    times = StepTimeTable(ceng523())
    assert [times(Step(1, rows, 0.0, variant=variant)) for variant in range(3)] == pytest.approx([0.047, 0.037, 0.022])


def test_a_policy_knows_the_table_from_the_start_and_observing_changes_nothing():
    known = KnownStepTime(Table({1: 10, 4: 20}))
    known.observe(Load(decodes=1), 99.0)
    assert [known.bound(Load(decodes=rows)) for rows in (1, 3, 4)] == [0.010, 0.020, 0.020]
    assert known.bound(Load(decodes=5)) == float("inf"), "no batch may be so large"


def test_the_worked_example_gives_127_ms_and_63_requests_a_second():
    latency, throughput = formula(ceng523()[0], batch=8, rate=100)
    assert latency == pytest.approx(0.080 + 0.002 + 0.004 + 0.040 + 0.001)
    assert round(throughput) == 63


def test_but_the_next_batch_is_collected_while_one_is_served_and_100_a_second_are_sustained():
    done = static_run(ceng523(), batch=8, rate=100)
    seconds = done[-1].answered_at - done[0].arrival
    assert len(done) / seconds == pytest.approx(100, rel=0.001)
    latencies = [req.answered_at - req.arrival for req in done]
    assert max(latencies) == pytest.approx(0.070 + 0.047), "the first of a batch waits for seven gaps, not for eight"
    assert min(latencies) == pytest.approx(0.047), "the last one for none"


def test_beyond_what_the_batches_can_serve_the_queue_grows():
    """8 every 47 ms are 170 a second; at 200 each request waits a little longer than the one before."""
    done = static_run(ceng523(), batch=8, rate=200)
    assert len(done) / (done[-1].answered_at - done[0].arrival) == pytest.approx(8 / 0.047, rel=0.01)
    assert done[-1].answered_at - done[-1].arrival == pytest.approx(8000 * (0.047 / 8 - 1 / 200), rel=0.05)
