"""Measures an engine before it serves: a few made-up steps, so that step times can be predicted from the first request on, and
the default limit on the time between tokens is a multiple of what this machine needs.
"""

from array import array
from dataclasses import replace

from batching.blocks import blocks_for
from batching.policy import Limits
from batching.request import Request
from batching.step import Executor, Row, Step
from batching.step_time import Load, Probe

SLO_IN_FULL_DECODES = 4  # the default time between tokens, in decode steps with all slots taken


def probe(executor: Executor, limits: Limits) -> tuple[Limits, list[Probe]]:
    """The limits with their `tbt_slo_ms`, and steps with their seconds, on each variant of the model. Nothing may be under way.
    Raises what goes wrong."""
    slots = limits.max_batch_size
    room = limits.num_blocks * limits.block_size
    far = max(1, min(limits.max_context // 2, room // slots // limits.block_size * limits.block_size - 1))
    most = min(limits.token_budget, limits.max_context, room)
    decodes = [(1, 1, 1), (slots, 1, 1), (max(1, slots // 2), 1, far)]  # rows, tokens each, columns before
    chunks = [(1, min(count, most), 0) for count in (16, 64, 256, most)]
    late = min(limits.max_context // 2, room // 2)
    shapes = [*decodes, *chunks, (1, min(64, late), late), (slots, 1, far)]
    probes = []
    for variant in range(len(limits.variants)):
        _run(executor, limits, variant, slots, 1, far)  # its memory is touched for the first time
        probes += [_run(executor, limits, variant, *shape) for shape in shapes]
    return replace(limits, tbt_slo_ms=SLO_IN_FULL_DECODES * probes[len(shapes) - 1].seconds * 1e3), probes


def _run(executor: Executor, limits: Limits, variant: int, rows: int, count: int, start: int) -> Probe:
    """One step, in whichever blocks: what they hold does not matter."""
    each = blocks_for(start + count, limits.block_size)
    requests = [Request(f"probe-{row}", [0] * (start + count), 1) for row in range(rows)]
    for row, req in enumerate(requests):
        req.blocks = array("i", ((row * each + i) % limits.num_blocks for i in range(each)))
    executor.submit(Step(0, tuple(Row(req, start, count, 0, 0, True) for req in requests), 0.0, variant=variant))
    result = executor.collect()
    if result.error is not None:
        raise result.error
    return Probe(Load.of([(count, start)] * rows), result.ended - result.started, variant)
