"""What a run gives: an answer for each request, and a mode's answers with what the server said of itself.

It must not know of HTTP, or of what is made of the figures. Times are seconds from the start of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from client.shared.figures import middle_one
from client.shared.plan import Plan, PlannedRequest


@dataclass(frozen=True)
class Answer:
    """What became of one request. ``piece_times``: when each piece of a streamed text came, usually one token each."""

    request: PlannedRequest
    sent_s: float
    done_s: float
    error: str = ""  # its kind, "" where the request succeeded
    message: str = ""
    tokens: int = 0
    prompt_tokens: int | None = None
    completion: str = ""
    finish_reason: str = ""
    piece_times: tuple[float, ...] = ()
    server_ttft_s: float | None = None
    server_latency_s: float | None = None
    mode: str = ""  # as the server named it: another one where somebody switched during the run
    instance: str = ""  # the id of the server that answered: another one where two stand behind one address

    @property
    def lag_s(self) -> float:
        """How late it was sent: the client's fault."""
        return self.sent_s - self.request.at_s

    @property
    def latency_s(self) -> float:
        """E2EL, from the planned send."""
        return self.done_s - self.request.at_s

    @property
    def ttft_s(self) -> float | None:
        """From the planned send to the first piece; None where nothing was streamed."""
        return self.piece_times[0] - self.request.at_s if self.piece_times else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, up to the last piece; undefined for a single one."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.piece_times and self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """ITL: each piece's time after the one before."""
        return [later - earlier for earlier, later in pairwise(self.piece_times)]


@dataclass
class ModeRun:
    """The answers of one mode, in the order they came, the server's /stats after the last, and its step records, by the
    clock of the run; None where it keeps none. ``unserved``: requests without an answer by their error, of the simulator.

    For whether it was the mode that was asked for: its ``params`` as asked for (None: not known), /stats ``before`` the first
    request, and the ids of the servers that answered the calls around the run."""

    mode: str
    answers: list[Answer] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] | None = None
    slots: int = 0
    unserved: dict[str, int] = field(default_factory=dict)
    params: dict[str, Any] | None = None
    before: dict[str, Any] = field(default_factory=dict)
    instances: list[str] = field(default_factory=list)
    repeat: int = 1  # its number
    repeats: list[ModeRun] = field(
        default_factory=list
    )  # all runs of this mode, where there are several and this stands for them

    @property
    def last_s(self) -> float:
        """When the last answer came."""
        return max((answer.done_s for answer in self.answers), default=0.0)

    @property
    def wall_s(self) -> float:
        """From the first planned send to the last answer."""
        return self.last_s - min((answer.request.at_s for answer in self.answers), default=0.0)

    def of(self, group: str) -> list[Answer]:
        """The answers to the requests of a priority; to ``all`` of them."""
        return [answer for answer in self.answers if group in ("all", answer.request.priority)]

    @property
    def simulated(self) -> bool:
        """Whether it is the simulator's: its requests have no text, and nothing was sent."""
        return bool(self.answers) and not any(answer.request.prompt for answer in self.answers)

    @property
    def recorded_from_s(self) -> float:
        """Before this time there are no step records, though there may have been steps: the simulator keeps the newest only."""
        if not (self.simulated and self.steps) or self.steps[0]["id"] == 1:
            return 0.0
        return float(self.steps[0]["end_s"] - self.steps[0]["ms"] / 1e3)

    @property
    def groups(self) -> list[str]:
        """``all``, and the priorities where there are both."""
        there = sorted({answer.request.priority for answer in self.answers}, reverse=True)
        return ["all", *there] if "deferred" in there else ["all"]


def each_of(runs: Iterable[ModeRun]) -> list[ModeRun]:
    """All runs, the repeats among them."""
    return [one for run in runs for one in (run.repeats or [run])]


def one_of_each_mode(runs: Iterable[ModeRun]) -> list[ModeRun]:
    """A run for each mode, in the order of the modes; of repeats those of one repeat, which know the others."""
    by_mode: dict[str, list[ModeRun]] = {}
    for run in runs:
        by_mode.setdefault(run.mode, []).append(run)
    number = middle_one(next(iter(by_mode.values())), _throughput).repeat if by_mode else 1
    chosen = [next((run for run in same if run.repeat == number), same[-1]) for same in by_mode.values()]
    for run, same in zip(chosen, by_mode.values(), strict=True):
        run.repeats = same if len(same) > 1 else []
    return chosen


def _throughput(run: ModeRun) -> float:
    return sum(answer.tokens for answer in run.answers if not answer.error) / (run.wall_s or 1.0)


@dataclass
class Stream:
    """A plan, and what it gave in each mode. ``name`` tells several of them apart; it is empty where there is one."""

    name: str
    plan: Plan
    runs: list[ModeRun] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Its own within the folder of the results; that folder itself where there is one stream."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name)
