"""Measuring an engine, on a machine in virtual time whose law is known."""

import pytest

from batching.policy import Limits
from batching.step import Step
from batching.step_time import Load, StepTime
from model.probe import SLO_IN_FULL_DECODES, probe
from simulator.virtual import VirtualClock, VirtualExecutor


def law(step: Step) -> float:
    load = Load.of((row.count, row.start) for row in step.rows)
    return 0.003 + 2e-4 * load.prefill + 5e-4 * load.decodes + 1e-6 * load.kv + 2e-7 * load.products


def test_after_the_probes_step_times_are_known():
    limits = Limits(max_batch_size=32, token_budget=256)
    measured, probes = probe(VirtualExecutor(VirtualClock(), law), limits)
    model = StepTime()
    for one in probes:
        model.observe(one.load, one.seconds)
    for load in (Load.of([(1, 50)]), Load.of([(1, 400)] * 20), Load.of([(128, 0)]), Load.of([(1, 200)] * 10 + [(100, 50)])):
        expected = 0.003 + 2e-4 * load.prefill + 5e-4 * load.decodes + 1e-6 * load.kv + 2e-7 * load.products
        assert model.predict(load) == pytest.approx(expected, rel=0.35)
    full = 0.003 + 5e-4 * 32 + 1e-6 * 32 * 512
    assert measured.tbt_slo_ms == pytest.approx(1e3 * SLO_IN_FULL_DECODES * full, rel=0.1)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_batch_size=1, token_budget=1, max_prefill_tokens=8, max_context=8, block_size=1, num_blocks=8),
        Limits(max_batch_size=64, token_budget=64, max_context=1024, num_blocks=64),
        Limits(max_batch_size=8, token_budget=512, max_context=64, block_size=16, num_blocks=4),
    ],
)
def test_no_probe_is_larger_than_the_engine(limits: Limits):
    seen: list[Step] = []
    probe(VirtualExecutor(VirtualClock(), lambda step: seen.append(step) or 0.01), limits)  # type: ignore[func-returns-value]
    for step in seen:
        assert len(step.rows) <= limits.max_batch_size
        for row in step.rows:
            assert row.start + row.count <= min(limits.max_context, len(row.req.blocks) * limits.block_size)
            assert max(row.req.blocks) < limits.num_blocks


def test_a_probe_that_fails_fails_the_load():
    with pytest.raises(RuntimeError, match="told to fail"):
        probe(VirtualExecutor(VirtualClock(), law, failing=[0]), Limits())
