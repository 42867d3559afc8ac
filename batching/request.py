"""A request and its books. The scheduler alone writes the books; policies and executors only read them.

One measure of work: a request has `num_tokens` (prompt + generated) and `num_computed` (in the KV cache). Prefill, chunked
prefill, decode and recompute after preemption are all "compute the next n of the difference".
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple


class Priority(str, Enum):
    IMMEDIATE = "immediate"
    DEFERRED = "deferred"


class Lane(Enum):
    """Where a step is computed. Lanes compute side by side where the engine can (`Limits.lanes`); else they take turns."""

    MAIN = "main"
    PREFILL = "prefill"  # a second lane for prompts (Flover)


class State(Enum):
    """Finished, answered and released are three events: a static batch holds its finished rows, answers and seats."""

    WAITING = "waiting"
    RESIDENT = "resident"  # holds a sequence slot
    DONE = "done"  # its last token is computed, or planned where only the length ends it; still holds its slot
    ANSWERED = "answered"  # its outcome is final and has been handed out


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; keyed by (stream, token index), so that batching never changes a text."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stream: int = 0  # of random numbers, 64 bits: batching/random_streams.py
    min_p: float = 0.0  # 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to a token's logit
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0  # 0: off
    presence_penalty: float = 0.0  # 0: off
    min_tokens: int = 0  # before so many are generated, none of `stop_token_ids` is drawn
    stop_token_ids: tuple[int, ...] = ()

    @property
    def penalised(self) -> bool:
        """Whether the tokens that came before count."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @cached_property
    def adjusts_logits(self) -> bool:
        return bool(self.logit_bias or self.penalised or (self.min_tokens and self.stop_token_ids))


class Logprob(NamedTuple):
    """A token's log probability, and those of the likeliest at its place: (token, log probability), best first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True)
class Choices:
    """The `n` requests that continue one prompt of a call: vLLM's metrics count them as one."""

    n: int
    answered: int = 0
    longest: int = 0  # generated tokens, of those answered


class RequestError(Exception):
    """Why a request was not served. `code` is the short machine-readable reason, `param` the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class Refused(RequestError):
    """The request was not taken in: it can never fit, or the queue is full."""


@dataclass(eq=False, slots=True)
class Request:
    """One prompt to be continued by exactly `max_tokens` tokens, unless `stop` says earlier that it is enough.

    Times are seconds on the driver's clock; `deadline` is a point on it, not a span. `due` is when it should have finished, for
    a policy to go by: the deadline, or earlier where the request is one of many with the same deadline.
    """

    id: str
    tokens: list[int]  # prompt + generated, as far as the host knows them
    max_tokens: int
    priority: Priority = Priority.IMMEDIATE
    arrival: float = 0.0
    deadline: float | None = None
    due: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: "Callable[[Request], bool] | None" = None  # asked after each generated token
    num_logprobs: int | None = None  # of how many alternatives; None: no log probabilities at all
    prompt_logprobs: bool = False  # those of the prompt's tokens too
    choices: Choices | None = None  # None: it is the only one
    output_len: int | None = None  # tokens after which it will stop, where a workload knows; only oracles look at it

    # The books.
    prompt_len: int = field(init=False)
    num_computed: int = field(init=False, default=0)  # advanced at submission; trusted once in_flight == 0
    num_pending: int = field(init=False, default=0)  # tokens being sampled by steps under way
    variant: int = field(init=False, default=0)  # of the model, that computes it: its KV is no other's
    in_flight: int = field(init=False, default=0)  # steps under way that contain this request
    blocks: array = field(init=False, default_factory=lambda: array("i"))  # its KV block table, int32
    keys: list[bytes] = field(init=False, default_factory=list)  # of its full blocks, as far as they were asked for
    num_cached: int = field(init=False, default=0)  # tokens that the prefix cache held when it was first admitted
    num_entered: int = field(init=False, default=0)  # blocks that are complete, and known to the prefix cache
    state: State = field(init=False, default=State.WAITING)
    finish_reason: str | None = field(init=False, default=None)  # "length" or "stop"
    error: RequestError | None = field(init=False, default=None)
    logprobs: dict[int, Logprob] = field(init=False, default_factory=dict)  # by place in `tokens`
    token_times: list[float] = field(init=False, default_factory=list)  # when each generated token was known
    admitted_at: float | None = field(init=False, default=None)  # when it was first given a seat
    answered_at: float | None = field(init=False, default=None)
    mode: str | None = field(init=False, default=None)  # in force when it was answered
    preemptions: int = field(init=False, default=0)
    promoted: bool = field(init=False, default=False)  # deferred, but now treated as immediate
    lost: int = field(init=False, default=0)  # columns computed before a preemption: below it, work is done again

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        self.due = self.deadline if self.due is None else self.due

    @property
    def urgent(self) -> bool:
        return self.promoted or self.priority is Priority.IMMEDIATE

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those being sampled in steps under way included."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens to compute until the next one can be sampled: 1 is a decode, more is a prefill (or what is left of it)."""
        return self.num_tokens - self.num_computed

    @property
    def to_generate(self) -> int:
        """Tokens that it may still generate."""
        return self.max_tokens - self.num_generated

    @property
    def kv_peak(self) -> int:
        """The most KV columns it can come to hold: its last generated token is never fed back."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_len :]

    # The measures of docs/glossary.md, in seconds, once it has been answered with at least one token.

    @property
    def server_ttft(self) -> float:
        """Time to first token, as the engine sees it: from arrival to the first token computed."""
        return self.token_times[0] - self.arrival

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the time between each token and the one before."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, up to the last one; undefined for a single token."""
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps > 0 else None

    @property
    def e2el(self) -> float:
        """End-to-end latency: from arrival to the answer."""
        assert self.answered_at is not None
        return self.answered_at - self.arrival
