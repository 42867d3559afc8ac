"""Measures an engine before it serves: a few made-up steps, so that step times can be predicted from the first request on, and
the default limit on the time between tokens is a multiple of what this machine needs.
"""

from dataclasses import replace

from batching.policy import Limits
from batching.probe_steps import probe_steps
from batching.step import Executor, Step
from batching.step_time import Probe

SLO_IN_FULL_DECODES = 4  # the default time between tokens, in decode steps with all slots taken


def probe(executor: Executor, limits: Limits) -> tuple[Limits, list[Probe]]:
    """The limits with their `tbt_slo_ms`, and steps with their seconds, on each variant of the model. Nothing may be under way.
    Raises what goes wrong."""
    measured = []
    for variant in range(len(limits.variants)):
        steps = probe_steps(limits, variant)
        _run(executor, steps[-1])  # its memory is touched for the first time
        measured.append([_run(executor, step) for step in steps])
    full_decode = measured[0][-1].seconds
    return replace(limits, tbt_slo_ms=SLO_IN_FULL_DECODES * full_decode * 1e3), [one for probes in measured for one in probes]


def _run(executor: Executor, step: Step) -> Probe:
    executor.submit(step)
    result = executor.collect()
    if result.error is not None:
        raise result.error
    return Probe(step.load, result.ended - result.started, step.variant)
