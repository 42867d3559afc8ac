"""What passes between the scheduler and an executor: a step to compute, and its result.

An executor runs the steps of a lane in the order of their submission, each seeing the KV writes of the ones before. That order
is what allows the next plan to hand out the blocks of a request whose last token is still under way. Between lanes that compute
side by side there is no order, so there a request belongs to one step at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from batching.request import Lane, Logprob, Request
from batching.step_time import Load


@dataclass(frozen=True, slots=True)
class Row:
    """One request's share of a step, as committed: KV columns [start, start + count) are computed and written.

    `pad` columns of padding follow them (a static batch's rectangle); count 0 with pad 1 is a finished row that keeps its
    slot. Attention reads at least `span` columns, those beyond the row's own context masked. `shared`: the blocks before
    `start` that the prefix cache held, in the step that admits the request; None in others, and where nobody looked.
    """

    req: Request
    start: int
    count: int
    pad: int
    span: int
    samples: bool  # the chunk reaches num_tokens, so the next token is drawn
    shared: Sequence[int] | None = None

    @property
    def cached(self) -> int | None:
        """The columns that were found in the prefix cache: all before `start`."""
        return None if self.shared is None else self.start


@dataclass(frozen=True)
class Step:
    """One iteration of the engine, on one `variant` of its model."""

    id: int
    rows: tuple[Row, ...]
    planned_at: float
    lane: Lane = Lane.MAIN
    variant: int = 0  # its place in Limits.variants

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding left out."""
        return sum(row.count for row in self.rows)

    @property
    def num_cached(self) -> int:
        """Tokens that were found in the prefix cache instead."""
        return sum(row.cached or 0 for row in self.rows)

    @property
    def num_padding(self) -> int:
        return sum(row.pad for row in self.rows)

    @cached_property
    def load(self) -> Load:
        """The work in it, padding included, as the models of step times have it."""
        return Load.of([(row.count + row.pad, row.start) for row in self.rows])

    def values(self) -> tuple:
        """All of it in plain values, which can be compared and written down."""
        rows = tuple((row.req.id, row.start, row.count, row.pad, row.span) for row in self.rows)
        return rows, self.lane, self.variant


@dataclass(frozen=True)
class StepResult:
    """`tokens`: the token drawn for each row that samples, by request id. Times in seconds on the driver's clock.
    `logprobs`: for requests that want them, by id and place in their tokens. `graph_padding`: rows that the executor added by
    itself, to fill a captured graph."""

    step_id: int
    started: float
    ended: float
    tokens: Mapping[str, int] = field(default_factory=dict)
    error: Exception | None = None
    graph_padding: int = 0
    logprobs: Mapping[str, Mapping[int, Logprob]] = field(default_factory=dict)


class Executor(Protocol):
    """Computes steps. Up to `depth` of them may be under way: 1 on a CPU, 2 where a device overlaps with the host."""

    depth: int

    def submit(self, step: Step) -> None: ...

    def collect(self) -> StepResult:
        """The result of the oldest step under way, of one of the lanes, waiting for it. Failures come as `StepResult.error`."""
        ...
