"""What has happened since the server started: counts and histograms that only ever grow, so that whoever looks now and then (as
Prometheus does) learns from the difference what happened in between.

Kept by `Stats`, under its lock. Must not know who reads them, nor under which names.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, fields

from batching.request import Choices, Priority, Request

CLASSES = (*(priority.value for priority in Priority), "promoted")

# Upper bounds of the histograms' buckets. Those of vLLM are among them; the finer ones below are for small models.
FIRST_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
    2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240,
    480, 960, 1920, 7680,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def class_of(req: Request) -> str:
    """One of CLASSES: its priority, or promoted."""
    return "promoted" if req.promoted else req.priority.value


@dataclass
class Counts:
    """Counts of one kind of thing each. Two of them can be subtracted: what came in between."""

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
        self.first_token = _by_class(FIRST_TOKEN_S)  # from arrival
        self.between_tokens = _by_class(BETWEEN_TOKENS_S)
        self.per_output_token = _by_class(BETWEEN_TOKENS_S)  # a request's mean; none for one with a single token
        self.latency = _by_class(REQUEST_S)  # from arrival to the answer
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
            self.first_token[class_of(req)].observe(times[0] - req.arrival)

    def answer(self, req: Request) -> None:
        """`req` has finished, and not with an error."""
        kind, times = class_of(req), req.token_times
        assert req.admitted_at is not None  # it has run
        assert req.answered_at is not None
        if len(times) > 1:
            self.per_output_token[kind].observe((times[-1] - times[0]) / (len(times) - 1))
        self.latency[kind].observe(req.answered_at - req.arrival)
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
