"""The figures of a run in the field's terms, as the client and the simulator both report them; what each means stands in
docs/glossary.md. It must not know where the times come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from client.shared.tables import with_spread

T = TypeVar("T")

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
STATISTICS = ("mean", "p50", "p90", "p99")

Distribution = dict[str, float | None]


def distribution(numbers: Any) -> Distribution:
    """Mean and percentiles of a sequence or an array, linear between the nearest ranks; None of nothing."""
    if not len(numbers):
        return dict.fromkeys(STATISTICS)
    p50, p90, p99 = np.percentile(numbers, (50, 90, 99))
    return {"mean": float(np.mean(numbers)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def summary(
    *,
    ok: int,
    errors: Mapping[str, int],
    wall_s: float,
    output_tokens: int,
    prompt_tokens: int | None,
    kept_limits: int | None,
    latencies: Mapping[str, Any],
) -> dict[str, Any]:
    """All figures, JSON-ready; None where there is nothing to count. ``prompt_tokens`` is None where they are not known, and
    ``kept_limits``, how many requests kept the limits of goodput, where there are none. ``latencies``: the times of each of
    LATENCIES in seconds."""
    total = None if prompt_tokens is None else output_tokens + prompt_tokens
    amounts = {"request": ok, "output_token": output_tokens, "total_token": total}
    rates = {f"{name}_throughput": _rate(amount, wall_s) for name, amount in amounts.items()}
    counts = {"requests": ok + sum(errors.values()), "ok": ok, "errors": dict(errors), "wall_s": wall_s}
    counts["output_tokens"] = output_tokens
    return counts | rates | {"goodput": _rate(kept_limits, wall_s)} | {n: distribution(latencies[n]) for n in LATENCIES}


REPEATED = (
    ("output", "tokens/s", ("output_token_throughput",), 1),
    ("", "requests/s", ("request_throughput",), 2),
    ("TTFT s", "p50", ("ttft", "p50"), 3),
    ("", "p99", ("ttft", "p99"), 3),
    ("E2EL s", "p50", ("e2el", "p50"), 2),
    ("", "p99", ("e2el", "p99"), 2),
)
REPEATS_SAID = (
    "Medians of the repeats, and in brackets how far these are apart: the largest minus the smallest, as a share of the mean.\n"
    "All else is of one repeat: the one with the first mode's median throughput."
)


def repeats(by_mode: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """A table with two heads: a row for each mode of the summaries of its repeats."""
    grid = [["", "", *(top for top, *_ in REPEATED)], ["mode", "repeats", *(below for _, below, *_ in REPEATED)]]
    for mode, found in by_mode.items():
        row = [mode, str(len(found))]
        for *_, keys, digits in REPEATED:
            values = [one[keys[0]] if len(keys) == 1 else one[keys[0]][keys[1]] for one in found]
            row.append(with_spread([value for value in values if value is not None], digits))
        grid.append(row)
    return grid


def middle_one(runs: Sequence[T], throughput: Callable[[T], float]) -> T:
    """The run with the median throughput; of two in the middle the slower."""
    return sorted(runs, key=throughput)[(len(runs) - 1) // 2]


def _rate(amount: int | None, wall_s: float) -> float | None:
    return amount / wall_s if wall_s and amount is not None else None
