"""What has happened since the server started: counts and histograms that only ever grow, so that whoever looks now and then (as
Prometheus does) learns from the difference what happened in between.

Kept by `Stats`, under its lock. Must not know who reads them, nor under which names.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, fields

from batching.request import Choices, Priority, Request

CLASSES = (*(priority.value for priority in Priority), "promoted")

# Upper bounds of the histograms' buckets. A quantile that is estimated from buckets, as Prometheus does by a straight line
# through the bucket, is off by no more than the bucket's width: each bound of a time is at most a tenth above the one before,
# so that no estimate is further off than QUANTILE_ERROR, whatever the distribution.
QUANTILE_ERROR = 0.1
DECADE = (
    1, 1.1, 1.2, 1.3, 1.42, 1.55, 1.7, 1.85, 2, 2.19, 2.4, 2.63, 2.88, 3.16, 3.46, 3.79, 4.16, 4.56,
    5, 5.45, 5.95, 6.5, 7.1, 7.7, 8.4, 9.2,
)  # fmt: skip


def _ladder(lowest: float, highest: float) -> tuple[float, ...]:
    """Bounds from `lowest` to `highest`, both of which are in it if they are a DECADE's number times a power of ten."""
    bounds = (float(f"{step}e{power}") for power in range(-4, 4) for step in DECADE)
    return tuple(bound for bound in bounds if lowest <= bound <= highest)


TOKEN_S = (*_ladder(0.0002, 20), 40, 80)  # between two tokens; beyond 20 s roughly
REQUEST_S = (*_ladder(0.001, 1000), 2000, 4000, 8000)  # of a request or a part of it; beyond 1,000 s roughly
CHOICES = (1, 2, 5, 10, 20)
REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def share(padding: int, computed: int) -> float:
    """The share of padding in all that was computed; 0 of nothing."""
    return padding / (padding + computed) if padding else 0.0


def class_of(req: Request) -> str:
    """One of CLASSES: its priority, or promoted."""
    return "promoted" if req.promoted else req.priority.value


@dataclass
class Counts:
    """Counts of one kind of thing each. Two of them can be subtracted, what came in between, and added, of two engines."""

    steps: int = 0
    computed_tokens: int = 0  # padding left out, recomputed ones included
    padding_tokens: int = 0  # in the plans: the rectangle of a static batch
    graph_padding_rows: int = 0  # added by the executor
    recomputed_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens of requests that were admitted after a look into the prefix cache
    prefix_cache_hits: int = 0  # and of these, those that it held
    preemptions: int = 0
    promotions: int = 0
    prompt_tokens: int = 0  # of the requests that have got their first token
    output_tokens: int = 0
    busy_s: float = 0.0  # while a step was computed
    batch_sizes: Counter[int] = field(default_factory=Counter)  # steps, by the number of rows that computed something
    finished: Counter[tuple[str, str]] = field(default_factory=Counter)  # requests, by class and finish reason
    variants: Counter[int] = field(default_factory=Counter)  # the same, by the variant of the model that served them
    errors: Counter[str] = field(default_factory=Counter)  # requests that were not served, by code

    @property
    def padding_share(self) -> float:
        """Of all tokens that were computed, padding included, the share that was padding."""
        return share(self.padding_tokens, self.computed_tokens)

    @property
    def mean_batch_size(self) -> float | None:
        """Requests computed together in a step, on average over the steps; None before the first."""
        return sum(size * steps for size, steps in self.batch_sizes.items()) / self.steps if self.steps else None

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class Histogram:
    """How many values lie at or under each of `bounds` and above the one before: one count a bucket, the last for all above."""

    __slots__ = ("bounds", "buckets", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.buckets[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def __deepcopy__(self, memo: object) -> "Histogram":
        """Quicker than what the library does: readers copy while the batching thread waits for the lock."""
        copied = Histogram(self.bounds)
        copied.buckets, copied.sum = self.buckets.copy(), self.sum
        return copied


def _by_class(bounds: tuple[float, ...]) -> dict[str, Histogram]:
    return {kind: Histogram(bounds) for kind in CLASSES}


class Histograms:
    """By class, but for the step's. Entered when known: the step's with its plan, the next two at a token, the others when a
    request has finished, so that their counts are the requests that did."""

    def __init__(self) -> None:
        self.step_tokens = Histogram(STEP_TOKENS)  # padding left out
        self.first_token = _by_class(REQUEST_S)  # server TTFT
        self.between_tokens = _by_class(TOKEN_S)  # ITL
        self.per_output_token = _by_class(TOKEN_S)  # TPOT: a value a request, none for one with a single token
        self.latency = _by_class(REQUEST_S)  # E2EL
        self.queue = _by_class(REQUEST_S)  # from arrival to the first step
        self.prefill = _by_class(REQUEST_S)  # from there to the first token
        self.decode = _by_class(REQUEST_S)  # from there to the last one
        self.prompt_tokens = _by_class(REQUEST_TOKENS)
        self.output_tokens = _by_class(REQUEST_TOKENS)
        self.max_tokens = _by_class(REQUEST_TOKENS)
        self.inference = _by_class(REQUEST_S)  # from the first step to the last token
        self.longest = _by_class(REQUEST_TOKENS)  # tokens generated for the longest of a prompt's choices
        self.choices = _by_class(CHOICES)  # of a prompt

    def token(self, req: Request) -> None:
        """`req` has just got a token."""
        times = req.token_times
        if len(times) > 1:
            self.between_tokens[class_of(req)].observe(times[-1] - times[-2])
        else:
            self.first_token[class_of(req)].observe(req.server_ttft)

    def answer(self, req: Request) -> None:
        """`req` has finished, and not with an error."""
        kind, times = class_of(req), req.token_times
        assert req.admitted_at is not None  # it has run
        if (tpot := req.tpot) is not None:
            self.per_output_token[kind].observe(tpot)
        self.latency[kind].observe(req.e2el)
        self.queue[kind].observe(req.admitted_at - req.arrival)
        self.prefill[kind].observe(times[0] - req.admitted_at)
        self.decode[kind].observe(times[-1] - times[0])
        self.prompt_tokens[kind].observe(req.prompt_len)
        self.output_tokens[kind].observe(len(times))
        self.max_tokens[kind].observe(req.max_tokens)
        self.inference[kind].observe(times[-1] - req.admitted_at)
        group = req.choices or Choices(1)
        group.answered, group.longest = group.answered + 1, max(group.longest, len(times))
        if group.answered == group.n:
            self.longest[kind].observe(group.longest)
            self.choices[kind].observe(group.n)


@dataclass
class Totals:
    """Both, as they were at one moment."""

    counts: Counts = field(default_factory=Counts)
    histograms: Histograms = field(default_factory=Histograms)
