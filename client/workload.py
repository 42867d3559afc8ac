"""The plan of a run: which request is sent when, all of it drawn from one seed before the first is sent.

Pure: it must not know of HTTP, clocks or modes. Every mode is fired the same plan, so that a difference between
two modes is the server's doing and not the workload's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
class PlannedRequest:
    """One request of the plan; ``at_s`` counts from the start of the run."""

    index: int
    at_s: float
    prompt: str
    num_tokens: int
    priority: str
    seed: int

    def body(self) -> dict[str, str | int]:
        """The JSON body of its POST /inference; its own seed makes the text the same in every mode."""
        return {
            "prompt": self.prompt,
            "num_tokens": self.num_tokens,
            "priority": self.priority,
            "seed": self.seed,
        }


def make_plan(
    numsamples: int,
    wait_s: float,
    lengths: Sequence[int],
    selection: str = "random",
    deferred_share: float = 0.0,
    seed: int = 0,
) -> tuple[PlannedRequest, ...]:
    """Draw ``numsamples`` requests, the first at 0 s, the next ones after gaps uniform in 0..``wait_s`` seconds.

    ``descend`` gives the lengths of ``random``, longest first. Exactly ``deferred_share`` of the requests, rounded
    half up, are deferred.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, not {selection!r}")

    # A stream of draws for each property: changing the lengths must not move the send times, and so on.
    def stream(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    length_draw, prompt_draw, gap_draw, seed_draw = map(stream, ("length", "prompt", "gap", "seed"))
    num_tokens = [length_draw.choice(lengths) for _ in range(numsamples)]
    if selection == "descend":
        num_tokens.sort(reverse=True)
    deferred = set(stream("priority").sample(range(numsamples), math.floor(deferred_share * numsamples + 0.5)))

    plan: list[PlannedRequest] = []
    at_s = 0.0
    for index in range(numsamples):
        if index:
            at_s += gap_draw.uniform(0.0, wait_s)
        plan.append(
            PlannedRequest(
                index=index,
                at_s=at_s,
                prompt=prompt_draw.choice(OPENINGS),
                num_tokens=num_tokens[index],
                priority="deferred" if index in deferred else "immediate",
                seed=seed_draw.randrange(2**31),
            )
        )
    return tuple(plan)
