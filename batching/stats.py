"""What happened, in the field's terms: a record a step, a record a request, and the summary that /stats shows.

Written by the batching thread, read by HTTP threads under one lock. Times in seconds on the driver's clock; rates are per
wall-clock second, padding and recomputed tokens left out of them and reported beside them.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from batching.request import Priority, Request
from batching.step import Step, StepResult

MAX_RECORDS = 5_000  # the newest are kept
MAX_DECISIONS = 20
CLASSES = (*(priority.value for priority in Priority), "promoted")


class RequestRecord(NamedTuple):
    """One answered request. `kind`: its priority, or promoted. `gaps`: the time between each token and the one before (ITL)."""

    kind: str
    server_ttft: float
    e2el: float
    output_tokens: int
    gaps: tuple[float, ...]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; undefined for a single one."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None


class Stats:
    def __init__(self, now: float) -> None:
        self._lock = threading.Lock()
        self.reset(now, live=False)

    def reset(self, now: float, live: bool) -> None:
        """Forget everything. With `live` requests under way the clock starts now, else at the next arrival."""
        with self._lock:
            self._requests: deque[RequestRecord] = deque(maxlen=MAX_RECORDS)
            self._errors: Counter[str] = Counter()
            self._batch_sizes: Counter[int] = Counter()
            self._steps = self._computed = self._padding = self._recomputed = self._output = self._prompt = 0
            self._finished = self._preemptions = self._graph_padding = 0
            self._busy = self._peak_blocks = 0.0
            self._promotions = 0
            self._decisions: deque[tuple[int, float, str, str]] = deque(maxlen=MAX_DECISIONS)
            self._started_at: float | None = now if live else None
            self._last_at = now

    # What the driver reports.

    def on_submit(self, now: float) -> None:
        with self._lock:
            self._started_at = now if self._started_at is None else self._started_at

    def on_step(self, step: Step, blocks_in_use: int) -> None:
        with self._lock:
            self._started_at = step.planned_at if self._started_at is None else self._started_at
            self._steps += 1
            self._computed += step.num_tokens
            self._padding += step.num_padding
            self._batch_sizes[sum(row.count > 0 for row in step.rows)] += 1
            self._preemptions += len(step.preempted)
            self._promotions += len(step.promoted)
            latest = {(request, why) for _, _, request, why in self._decisions}
            new = ((request, why) for request, why in step.reasons.items() if (request, why) not in latest)
            self._decisions.extend((step.id, step.planned_at, request, why) for request, why in new)
            self._peak_blocks = max(self._peak_blocks, blocks_in_use)
            self._recomputed += sum(max(0, min(r.start + r.count, r.req.lost) - r.start) for r in step.rows)

    def on_result(self, result: StepResult, tokens: int) -> None:
        """`tokens` of the result counted; those of requests that had ended meanwhile did not."""
        with self._lock:
            self._busy += max(0.0, result.ended - max(result.started, self._started_at or result.started))
            self._output += tokens
            self._graph_padding += result.graph_padding
            self._last_at = result.ended

    def on_error(self, code: str) -> None:
        with self._lock:
            self._errors[code] += 1

    def on_answer(self, req: Request) -> None:
        if req.error is not None:
            self.on_error(req.error.code)
            return
        with self._lock:
            self._finished += 1
            self._prompt += req.prompt_len
            times = req.token_times
            gaps = tuple(later - earlier for earlier, later in pairwise(times))
            answered = req.answered_at if req.answered_at is not None else times[-1]
            self._last_at = max(self._last_at, answered)
            kind = "promoted" if req.promoted else req.priority.value
            record = RequestRecord(kind, times[0] - req.arrival, answered - req.arrival, len(times), gaps)
            self._requests.append(record)

    # What readers see.

    def summary(self, now: float, live: bool) -> dict[str, Any]:
        """The totals since the last reset, JSON-ready. The clock runs while requests are live, else to the last event."""
        with self._lock:
            elapsed = 0.0 if self._started_at is None else max((now if live else self._last_at) - self._started_at, 1e-9)
            records = list(self._requests)
            per_token = [record.e2el / record.output_tokens for record in records]
            rows = sum(size * steps for size, steps in self._batch_sizes.items())
            work = self._computed + self._padding
            totals = {
                "latency-per-token": _mean(per_token),
                "throughput": self._output / elapsed if elapsed else 0.0,
                "total-tokens-handled": self._output,
                "total-elapsed-time": elapsed,
                "request_throughput": self._finished / elapsed if elapsed else 0.0,
                "output_token_throughput": self._output / elapsed if elapsed else 0.0,
                "total_token_throughput": (self._output + self._prompt) / elapsed if elapsed else 0.0,
                "requests_finished": self._finished,
                "errors": dict(self._errors),
                "steps": self._steps,
                "busy_share": self._busy / elapsed if elapsed else 0.0,
                "mean_batch_size": rows / self._steps if self._steps else None,
                "batch_size_histogram": {str(size): self._batch_sizes[size] for size in sorted(self._batch_sizes)},
                "tokens_computed": self._computed,
                "padding_tokens": self._padding,
                "padding_share": self._padding / work if work else 0.0,
                "graph_padding_rows": self._graph_padding,
                "recomputed_tokens": self._recomputed,
                "preemptions": self._preemptions,
                "promotions": self._promotions,
                "peak_blocks_in_use": int(self._peak_blocks),
            }
            fields = "step", "seconds_ago", "request", "why"
            decisions = [
                dict(zip(fields, (step, now - at, request, why), strict=True)) for step, at, request, why in self._decisions
            ]
        classes = {"all": records} | {kind: [r for r in records if r.kind == kind] for kind in CLASSES}
        return totals | {"latency": {name: _latencies(of) for name, of in classes.items()}, "decisions": decisions}


def _latencies(records: list[RequestRecord]) -> dict[str, Any]:
    return {
        "requests": len(records),
        "server_ttft": distribution(record.server_ttft for record in records),
        "tpot": distribution(record.tpot for record in records if record.tpot is not None),
        "itl": distribution(gap for record in records for gap in record.gaps),
        "e2el": distribution(record.e2el for record in records),
    }


def distribution(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles (linear between the nearest ranks), in the values' unit; None where there are no values."""
    ordered = sorted(values)
    return {"mean": _mean(ordered), **{f"p{percent}": _percentile(ordered, percent) for percent in (50, 90, 99)}}


def _percentile(ordered: list[float], percent: float) -> float | None:
    if not ordered:
        return None
    below, part = divmod((len(ordered) - 1) * percent / 100, 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + (high - low) * part


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
