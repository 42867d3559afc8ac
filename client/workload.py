"""The plan of a run: which request is sent when, all of it drawn from one seed before the first is sent.

It must not know of HTTP, clocks or modes. Every mode is fired the same plan, so
that a difference between two modes is the server's doing and not the workload's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.arrivals import Arrivals, draw_arrivals
from client.distributions import Shape
from client.lengths import draw_lengths, fit, words
from client.shared.plan import Plan, PlannedRequest
from client.traces import TraceRow

SELECTIONS = ("random", "descend")

OPENINGS = (
    "The old house at the end of the lane",
    "On the morning of the wedding, my aunt",
    "No one in the village could remember",
    "The letter had lain unopened for a week when",
    "It was a cold evening in November, and the coach",
    "My father kept a small shop near the harbour, where",
    "The two sisters had never agreed about",
    "When the captain came down to the cabin",
    "There was a garden behind the church, and in it",
    "The young doctor had been in the town a month before",
    "Every Sunday the schoolmaster walked",
    "The road over the moor was long, and the traveller",
    "She closed the piano, rose from her chair and",
    "The lawyer read the will aloud, and the family",
    "A great storm had passed in the night, and the fishermen",
    "I was a boy of twelve when I first saw",
)


@dataclass(frozen=True)
class Workload:
    """What a plan is drawn from. Requests leave as ``arrivals`` has it within ``duration_s``, or as in ``trace``, or as soon
    as one of ``users`` is free, or else after gaps uniform in 0..``wait_s``. Prompts are the sentences of OPENINGS where no
    lengths are given; outputs have lengths from a list or a distribution. A trace's own lengths hold where they are None."""

    count: int = 100
    seed: int = 0
    wait_s: float = 1.0
    arrivals: Arrivals | None = None
    duration_s: float = 0.0
    bins: int = 20
    users: int | None = None
    trace: tuple[TraceRow, ...] = ()
    rows_left_out: int = 0  # of the trace, among those
    speed: float = 1.0
    prompt_lengths: Shape | None = None
    output_lengths: Shape | tuple[int, ...] | None = None
    selection: str = "random"
    deferred_share: float = 0.0
    context: int = 512


def make_plan(workload: Workload) -> Plan:
    """Draw it. Exactly ``deferred_share`` of the requests, rounded half up, are deferred; ``descend`` gives the output lengths
    of ``random``, longest first. Raises ValueError where a parameter will not do."""
    count, seed = workload.count, workload.seed
    times = _times(workload)
    outputs = _outputs(workload)
    prompts = _prompt_lengths(workload)
    pairs = [
        (prompt, output) if prompt is None else fit(prompt, output, workload.context)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    cut = sum(pair != before for pair, before in zip(pairs, zip(prompts, outputs, strict=True), strict=True))
    notes = [f"{cut} of {count} requests were cut to fit a context of {workload.context} tokens"] if cut else []
    if workload.rows_left_out:
        rows = count + workload.rows_left_out
        notes.append(f"{workload.rows_left_out} of {rows} rows of the trace were left out: they have no prompt or no output")
    if workload.trace:
        notes.append(f"sending takes {_span(times[-1])} in each mode")

    prompt_draw, seed_draw = _stream(seed, "prompt"), _stream(seed, "seed")
    share = math.floor(workload.deferred_share * count + 0.5)
    deferred = set(_stream(seed, "priority").sample(range(count), share))
    requests = tuple(
        PlannedRequest(
            index=index,
            at_s=times[index],
            prompt=prompt_draw.choice(OPENINGS) if prompt is None else words(prompt, prompt_draw),
            num_tokens=output,
            priority="deferred" if index in deferred else "immediate",
            seed=seed_draw.randrange(2**31),
            prompt_tokens=prompt,
        )
        for index, (prompt, output) in enumerate(pairs)
    )
    return Plan(requests, workload.users, _in_words(workload), tuple(notes))


def _span(seconds: float) -> str:
    """As one says it: 45 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _stream(seed: int, name: str) -> random.Random:
    """A stream of draws for each property: changing the lengths must not move the send times, and so on."""
    return random.Random(f"{seed}/{name}")


def _numpy_stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(_stream(seed, name).getrandbits(128))


def _times(workload: Workload) -> list[float]:
    if workload.users:
        return [0.0] * workload.count
    if workload.trace:
        return [row.at_s / workload.speed for row in workload.trace]
    if workload.arrivals:
        rng = _numpy_stream(workload.seed, "arrivals")
        drawn = draw_arrivals(workload.arrivals, workload.count, workload.duration_s, workload.bins, rng)
        return [round(float(at_s), 9) for at_s in drawn]
    gap_draw, times = _stream(workload.seed, "gap"), [0.0]
    while len(times) < workload.count:
        times.append(times[-1] + gap_draw.uniform(0.0, workload.wait_s))
    return times


def _outputs(workload: Workload) -> list[int]:
    lengths = workload.output_lengths
    if lengths is None:
        outputs = [row.output_tokens for row in workload.trace]
    elif isinstance(lengths, Shape):
        outputs = draw_lengths(lengths, workload.count, _numpy_stream(workload.seed, "length"))
    else:
        length_draw = _stream(workload.seed, "length")
        outputs = [length_draw.choice(lengths) for _ in range(workload.count)]
    return sorted(outputs, reverse=True) if workload.selection == "descend" else outputs


def _prompt_lengths(workload: Workload) -> Sequence[int | None]:
    if workload.prompt_lengths:
        return draw_lengths(workload.prompt_lengths, workload.count, _numpy_stream(workload.seed, "prompt length"))
    return [row.prompt_tokens for row in workload.trace] or [None] * workload.count


def _in_words(workload: Workload) -> str:
    if workload.users:
        times = f"closed loop with {workload.users} users"
    elif workload.trace:
        times = "times of a trace" + (f", {workload.speed:.4g} times as fast" if workload.speed != 1 else "")
    elif workload.arrivals:
        times = f"arrivals {workload.arrivals} within {round(workload.duration_s, 2):g} s"
    else:
        times = f"gaps uniform in 0..{workload.wait_s:g} s"
    outputs = workload.output_lengths
    if isinstance(outputs, tuple):
        outputs_said = "one of " + ", ".join(map(str, sorted(set(outputs))))
    else:
        outputs_said = str(outputs or "as in the trace")
    prompts = workload.prompt_lengths or ("as in the trace" if workload.trace else "short sentences")
    deferred = f", {workload.deferred_share:.0%} deferred" if workload.deferred_share else ""
    lengths = f"prompts: {prompts}; outputs: {outputs_said} tokens, {workload.selection}"
    return f"{workload.count} requests{deferred}; {times}; {lengths}; seed {workload.seed}"
