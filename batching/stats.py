"""What happened, in the field's terms: a record a step, a record a request, and the summary that /stats shows.

Written by the batching thread, read by HTTP threads under one lock. Times in seconds on the driver's clock. What each measure
means stands in docs/glossary.md; padding and recomputed tokens are left out of all rates and reported beside them.

Everything is counted once, since the start (`totals.py`). A reset only remembers how far the counts had come.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from batching.plan import Plan
from batching.request import Request
from batching.step import Step, StepResult
from batching.totals import CLASSES, Totals, class_of, share

MAX_RECORDS = 5_000  # the newest are kept
MAX_DECISIONS = 20


class RequestRecord(NamedTuple):
    """One answered request: the times of `Request`. `kind`: its priority, or promoted."""

    kind: str
    server_ttft: float
    tpot: float | None
    itl: list[float]
    e2el: float
    output_tokens: int


class Stats:
    def __init__(self, now: float) -> None:
        self._lock = threading.Lock()
        self._totals = Totals()
        self._live = 0  # requests that were submitted and are not yet answered
        self.reset(now, live=False)

    def reset(self, now: float, live: bool) -> None:
        """Begin the summary anew. With `live` requests under way its clock starts now, else at the next arrival."""
        with self._lock:
            self._at_reset = deepcopy(self._totals.counts)
            self._requests: deque[RequestRecord] = deque(maxlen=MAX_RECORDS)
            self._busy = self._peak_blocks = 0.0
            self._decisions: deque[tuple[int, float, str, str]] = deque(maxlen=MAX_DECISIONS)
            self._started_at: float | None = now if live else None
            self._last_at = now
            self._work_s = 0.0  # during which some request was live; and since when one is
            self._work_since = now

    # What the driver reports.

    def on_submit(self, now: float) -> None:
        with self._lock:
            self._started_at = now if self._started_at is None else self._started_at
            if not self._live:
                self._work_since = now
            self._live += 1

    def on_plan(self, plan: Plan, step: int, now: float) -> None:
        """A plan was committed: for the step of this number, or before it where nothing is computed."""
        if not (plan.preempted or plan.promoted or plan.reasons):
            return
        with self._lock:
            self._totals.counts.preemptions += len(plan.preempted)
            self._totals.counts.promotions += len(plan.promoted)
            latest = {(request, why) for _, _, request, why in self._decisions}
            new = ((request, why) for request, why in plan.reasons.items() if (request, why) not in latest)
            self._decisions.extend((step, now, request, why) for request, why in new)

    def on_step(self, step: Step, blocks_in_use: int) -> None:
        with self._lock:
            self._started_at = step.planned_at if self._started_at is None else self._started_at
            counts = self._totals.counts
            computed = rows = again = 0
            for row in step.rows:
                computed += row.count
                rows += row.count > 0
                if row.start < row.req.lost:
                    again += min(row.start + row.count, row.req.lost) - row.start
                if row.cached is not None and not row.req.preemptions:  # as vLLM counts
                    counts.prefix_cache_queries += len(row.req.tokens)
                    counts.prefix_cache_hits += row.cached
            counts.steps += 1
            counts.computed_tokens += computed
            counts.padding_tokens += step.num_padding
            counts.batch_sizes[rows] += 1
            counts.recomputed_tokens += again
            self._totals.histograms.step_tokens.observe(computed)
            self._peak_blocks = max(self._peak_blocks, blocks_in_use)

    def on_result(self, result: StepResult, continued: Sequence[Request]) -> None:
        """`continued`: the requests that got a token; one drawn for a request that had ended meanwhile does not count."""
        with self._lock:
            counts, histograms = self._totals.counts, self._totals.histograms
            self._busy += max(0.0, result.ended - max(result.started, self._started_at or result.started))
            counts.busy_s += result.ended - result.started
            counts.graph_padding_rows += result.graph_padding
            counts.output_tokens += len(continued)
            for req in continued:
                histograms.token(req)
                if len(req.token_times) == 1:
                    counts.prompt_tokens += req.prompt_len
            self._last_at = result.ended

    def on_error(self, code: str) -> None:
        with self._lock:
            self._totals.counts.errors[code] += 1

    def on_answer(self, req: Request) -> None:
        with self._lock:
            self._live -= 1
            if not self._live and req.answered_at is not None:  # one that was refused took no time
                self._work_s += max(0.0, req.answered_at - self._work_since)
        if req.error is not None:
            self.on_error(req.error.code)
            return
        with self._lock:
            kind, times = class_of(req), req.token_times
            self._totals.counts.finished[kind, req.finish_reason or ""] += 1
            self._totals.counts.variants[req.variant] += 1
            self._totals.histograms.answer(req)
            assert req.answered_at is not None
            self._last_at = max(self._last_at, req.answered_at)
            self._requests.append(RequestRecord(kind, req.server_ttft, req.tpot, req.itl, req.e2el, len(times)))

    # What readers see.

    def totals(self) -> Totals:
        """All since the start, at one moment: a copy that nobody goes on writing to."""
        with self._lock:
            return deepcopy(self._totals)

    def since_reset(self) -> dict[str, Any]:
        """What a step's record tells of `summary`: the id of the first step that counts in it, and the padding share."""
        with self._lock:
            counts, before = self._totals.counts, self._at_reset
            padding, computed = counts.padding_tokens - before.padding_tokens, counts.computed_tokens - before.computed_tokens
            return {"first_step": before.steps + 1, "padding_share": share(padding, computed)}

    def summary(self, now: float, live: bool) -> dict[str, Any]:
        """The totals since the last reset, JSON-ready. `wall_s` runs from the first arrival while requests are live, else to
        the last event; `total-elapsed-time` only while some request is live, so that pauses are not in it."""
        with self._lock:
            elapsed = 0.0 if self._started_at is None else max((now if live else self._last_at) - self._started_at, 1e-9)
            work = self._work_s + (max(0.0, now - self._work_since) if self._live else 0.0)
            records = list(self._requests)
            per_token = [record.e2el / record.output_tokens for record in records]
            since = self._totals.counts - self._at_reset
            output, finished, steps = since.output_tokens, since.finished.total(), since.steps
            totals = {
                "latency-per-token": _mean(per_token),
                "throughput": output / work if work else 0.0,
                "total-tokens-handled": output,
                "total-elapsed-time": work,
                "wall_s": elapsed,
                "request_throughput": finished / elapsed if elapsed else 0.0,
                "output_token_throughput": output / elapsed if elapsed else 0.0,
                "total_token_throughput": (output + since.prompt_tokens) / elapsed if elapsed else 0.0,
                "requests_finished": finished,
                "requests_by_variant": {str(variant): since.variants[variant] for variant in sorted(since.variants)},
                "errors": dict(since.errors),
                "steps": steps,
                "busy_share": self._busy / elapsed if elapsed else 0.0,
                "mean_batch_size": since.mean_batch_size,
                "batch_size_histogram": {str(size): since.batch_sizes[size] for size in sorted(since.batch_sizes)},
                "tokens_computed": since.computed_tokens,
                "padding_tokens": since.padding_tokens,
                "padding_share": since.padding_share,
                "graph_padding_rows": since.graph_padding_rows,
                "recomputed_tokens": since.recomputed_tokens,
                "prefix_cache_queries": since.prefix_cache_queries,
                "prefix_cache_hits": since.prefix_cache_hits,
                "prefix_cache_hit_rate": since.prefix_cache_hits / since.prefix_cache_queries
                if since.prefix_cache_queries
                else None,
                "preemptions": since.preemptions,
                "promotions": since.promotions,
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
        "itl": distribution(gap for record in records for gap in record.itl),
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
