"""The figures of a run in the field's terms, and the server's own beside them, like with like.

It must not know of HTTP, threads or pictures. TTFT, E2EL and goodput count from the planned send, so that a late client cannot
flatter a slow server; what is compared with the server counts from the actual send. Rates are per wall-clock second. What each
measure means stands in docs/glossary.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.answers import Answer, ModeRun
from client.shared import figures
from client.shared.figures import LATENCIES, STATISTICS, Distribution, distribution

LIMITS = ("ttft", "tpot", "e2el")  # of goodput, as `vllm bench serve` has them
APART = 0.05
LATE_S = 0.010


def summary(run: ModeRun, group: str, limits: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a group of the run's answers, JSON-ready; None where there is nothing to count."""
    answers = run.of(group)
    good = [answer for answer in answers if not answer.error]
    prompts = [n for answer in good if (n := answer.prompt_tokens or answer.request.prompt_tokens) is not None]
    errors = Counter(answer.error for answer in answers if answer.error) + Counter(run.unserved if group == "all" else {})
    return figures.summary(
        ok=len(good),
        errors=dict(errors.most_common()),
        wall_s=run.wall_s,  # of the whole run for a priority too, so that their rates add up to the mode's
        output_tokens=sum(answer.tokens for answer in good),
        prompt_tokens=sum(prompts) if len(prompts) == len(good) else None,
        kept_limits=sum(meets(answer, limits) for answer in good) if limits else None,
        latencies={name: values(good, name) for name in LATENCIES},
    )


def values(answers: Sequence[Answer], name: str) -> list[float]:
    """The times of one of LATENCIES, one for each answer (for ITL one for each gap) that has it."""
    good = [answer for answer in answers if not answer.error]
    if name == "itl":
        return [gap for answer in good for gap in answer.gaps_s]
    found = [_latency(answer, name) for answer in good]
    return [value for value in found if value is not None]


def since_sent(answers: Sequence[Answer], name: str) -> list[float]:
    """As ``values``, for the two that count from a send: from the actual one, to set the server's beside them."""
    return [value - answer.lag_s for answer in answers if not answer.error and (value := _latency(answer, name)) is not None]


def _latency(answer: Answer, name: str) -> float | None:
    return {"ttft": answer.ttft_s, "tpot": answer.tpot_s, "e2el": answer.latency_s}[name]


def meets(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether it keeps every limit. A single token has no TPOT, and cannot break one; what else is unknown is not kept."""

    def keeps(name: str, limit: float) -> bool:
        value = _latency(answer, name)
        return name == "tpot" and answer.tokens <= 1 if value is None else value <= limit

    return all(keeps(name, limit) for name, limit in limits.items())


def lag(run: ModeRun) -> Distribution:
    """How late the requests were sent."""
    late = [answer.lag_s for answer in run.answers]
    return distribution(late) | {"max": max(late, default=None)}


@dataclass(frozen=True)
class Figure:
    """One figure as the client and as the server measured it."""

    name: str
    client: float
    server: float

    @property
    def apart(self) -> float:
        """The difference as a share of the server's figure."""
        return (self.client - self.server) / self.server if self.server else math.inf if self.client else 0.0

    @property
    def agrees(self) -> bool:
        return abs(self.apart) <= APART


def beside_the_server(run: ModeRun) -> list[Figure]:
    """Every figure that both have."""
    mine = summary(run, "all", {})
    pairs = [(name.replace("_", " "), mine[name], number(run.stats, name)) for name in mine if name.endswith("_throughput")]
    for name, shown in LATENCIES.items():
        counts_from_a_send = name in ("ttft", "e2el")
        client = distribution(since_sent(run.answers, name)) if counts_from_a_send else mine[name]
        theirs = "server_ttft" if name == "ttft" else name
        shown += " since sent" if counts_from_a_send else ""
        pairs += [(f"{shown} {s}", client[s], number(run.stats, "latency", "all", theirs, s)) for s in STATISTICS]
    return [Figure(name, c, s) for name, c, s in pairs if c is not None and s is not None]


def number(stats: Any, *keys: str) -> float | None:
    """A number in /stats, in which any key may be missing or null."""
    for key in keys:
        if not isinstance(stats, dict):
            return None
        stats = stats.get(key)
    good = isinstance(stats, int | float) and not isinstance(stats, bool) and math.isfinite(stats)
    return float(stats) if good else None
