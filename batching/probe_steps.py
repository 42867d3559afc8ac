"""Steps that are made up to measure an engine by, before anybody is served: a real one computes them while it loads
(`model/probe.py`), a simulated one asks its law (`simulator/step_times.py`), so that both predict from the first request on.
"""

from array import array

from batching.blocks import blocks_for
from batching.policy import Limits
from batching.request import Request
from batching.step import Row, Step


def probe_steps(limits: Limits, variant: int = 0) -> list[Step]:
    """Decodes, few and many, near and far, and chunks of prompts. None is larger than the engine; in the last one all slots
    decode, in the middle of what each can hold."""
    slots = limits.max_batch_size
    room = limits.num_blocks * limits.block_size
    far = max(1, min(limits.max_context // 2, room // slots // limits.block_size * limits.block_size - 1))
    most = min(limits.token_budget, limits.max_context, room)
    late = min(limits.max_context // 2, room // 2)
    decodes = [(1, 1, 1), (slots, 1, 1), (max(1, slots // 2), 1, far)]  # rows, tokens each, columns before
    chunks = [(1, min(count, most), 0) for count in (16, 64, 256, most)]
    shapes = [*decodes, *chunks, (1, min(64, late), late), (slots, 1, far)]
    return [_step(limits, variant, *shape) for shape in shapes]


def _step(limits: Limits, variant: int, rows: int, count: int, start: int) -> Step:
    """In whichever blocks: what they hold does not matter."""
    each = blocks_for(start + count, limits.block_size)
    requests = [Request(f"probe-{row}", [0] * (start + count), 1) for row in range(rows)]
    for row, req in enumerate(requests):
        req.blocks = array("i", ((row * each + i) % limits.num_blocks for i in range(each)))
    return Step(0, tuple(Row(req, start, count, 0, 0, True) for req in requests), 0.0, variant=variant)
