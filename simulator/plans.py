"""Which requests come when: read from a plan.json of the client, or drawn here, a request at a time, so that a million of them
take no memory. The client's file is read by its own module (`client/shared/plan.py`). Must not know which policy or engine
serves them.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from typing import NamedTuple

from batching.request import Priority, Request
from client.shared import plan
from simulator.virtual import Arrivals, OpenLoop

PIECE = re.compile(r"\w+|[^\w\s]")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Plan:
    """`draw` gives the requests in the order of their arrivals, new ones at each call. `users`: None in an open loop; else each
    of so many sends its next request when the one before is answered. `made` says in words what it is."""

    count: int
    draw: Callable[[], Iterator[Request]]
    users: int | None = None
    made: str = ""

    def arrivals(self) -> Arrivals:
        return ClosedLoop(self.draw(), self.users) if self.users else OpenLoop(self.draw())


class ClosedLoop:
    """Requests of `users`, who wait for their answers: `answered` has to be called with each."""

    def __init__(self, requests: Iterator[Request], users: int) -> None:
        self._requests = requests
        self._free = [0.0] * users  # a heap: since when each user who waits for nothing has been free
        self._next = next(requests, None)

    @property
    def due(self) -> float | None:
        return self._free[0] if self._free and self._next else None

    def take(self) -> Request:
        req, self._next = self._next, next(self._requests, None)
        assert req is not None
        req.arrival = heappop(self._free)
        return req

    def answered(self, req: Request) -> None:
        heappush(self._free, req.arrival if req.answered_at is None else req.answered_at)


# ---- drawn here


class Lengths(NamedTuple):
    """Uniform from `low` to `high` tokens, both possible."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    @classmethod
    def read(cls, text: str) -> "Lengths":
        """`64` or `16-128`. Raises ValueError."""
        low, dash, high = text.partition("-")
        bounds = [int(n) if n.isascii() and n.isdigit() and len(n) < 10 else 0 for n in (low, high if dash else low)]
        if not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"must be a number of tokens such as 64, or a range such as 16-128, not {text!r}")
        return cls(*bounds)


def poisson_plan(count: int, rate: float, prompt: Lengths, output: Lengths, *, deferred: float = 0.0, seed: int = 0) -> Plan:
    """Exponential gaps, `rate` requests a second; with an infinite rate all come at once."""
    times = "at once" if rate == inf else f"{rate:g} a second (Poisson)"
    share = f", {deferred:.0%} deferred" if deferred else ""
    made = f"{count} requests{share}; {times}; prompts: {prompt} tokens; outputs: {output} tokens; seed {seed}"
    return Plan(count, partial(_draw, count, rate, prompt, output, deferred, seed), made=made)


def _draw(count: int, rate: float, prompt: Lengths, output: Lengths, deferred: float, seed: int) -> Iterator[Request]:
    rng, at = random.Random(seed), 0.0
    draw, (shortest, longest), (fewest, most) = rng.random, prompt, output
    for index in range(count):
        length = shortest + int(draw() * (longest - shortest + 1))
        tokens = list(range(index * longest, index * longest + length))  # no two prompts begin alike
        generate = fewest + int(draw() * (most - fewest + 1))
        priority = Priority.DEFERRED if deferred and draw() < deferred else Priority.IMMEDIATE
        yield Request(str(index), tokens, generate, priority, at)
        at += rng.expovariate(rate) if rate < inf else 0.0


# ---- the client's file


class Words:
    """Stands in for a tokenizer: each word or mark is a token, the same one wherever it occurs. The prompts that the client
    makes to a length have exactly so many; other texts have about so many."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self._ids.setdefault(piece, len(self._ids)) for piece in PIECE.findall(text)] or [0]


def read_plan(path: Path, encode: Encode | None = None) -> Plan:
    """A plan.json of the client. Prompts are encoded by `encode`, or else counted in words. Raises PlanError."""
    read = plan.read_plan(path)
    encode = encode or Words()
    entries = [(request, _tokens(request, encode)) for request in read.requests]
    made = read.made or f"a plan of {len(entries)} requests"
    return Plan(len(entries), partial(_requests, entries), read.users, made)


def _tokens(request: plan.PlannedRequest, encode: Encode) -> list[int]:
    """The prompt's, so many as the plan says, if it does."""
    tokens, length = encode(request.prompt), request.prompt_tokens
    return (tokens * -(-length // len(tokens)))[:length] if length else tokens


def _requests(entries: list[tuple[plan.PlannedRequest, list[int]]]) -> Iterator[Request]:
    for request, tokens in entries:
        yield Request(str(request.index), list(tokens), request.num_tokens, Priority(request.priority), request.at_s)
