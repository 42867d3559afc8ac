"""What a policy sees before it plans a step: the engine's limits, what is free, and its requests, none of which it can change.

The scheduler alone writes a request's books. A policy that could would win any comparison, and leak memory by accident.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, overload

from batching.request import Lane, Priority, Request, SamplingParams, State
from batching.step_time import Load, StepTime

T = TypeVar("T")


class PlanError(Exception):
    """A policy raised or broke a rule: which one, in whose file and line (where that is known), with the traceback."""

    def __init__(self, rule: str, detail: str, place: str | None = None, trace: str = "") -> None:
        super().__init__(f"{rule}: {detail}" + (f" ({place})" if place else ""))
        self.rule = rule
        self.detail = detail
        self.trace = trace


class Overdue(PlanError):
    """It took too long: this depends on the machine, so it is in the input log."""


@dataclass(frozen=True)
class Limits:
    """What the engine can hold. `Plan.run` is bound by `token_budget` a step, `Plan.run_exactly` by `max_prefill_tokens`
    (padding included)."""

    max_batch_size: int = 64  # sequence slots
    token_budget: int = 512
    max_prefill_tokens: int = 8192
    max_context: int = 1024
    block_size: int = 16
    num_blocks: int = 1024
    max_queue: int = 1024
    tbt_slo_ms: float = 200.0  # time between tokens to keep where a policy's own parameters name none
    lanes: int = 1  # that compute side by side, each one step at a time; with 1 all steps take turns
    prefix_caching: bool = False  # full KV blocks are shared by requests whose tokens begin alike
    variants: Sequence[str] = ("default",)  # of the model, by name, the most accurate first; a step runs on one of them

    def __post_init__(self) -> None:
        """Raises ValueError naming the field: every slot must be able to decode in one step, every prompt to run whole."""
        object.__setattr__(self, "variants", tuple(self.variants))  # JSON has lists only
        for limit in fields(self):
            if limit.type is int and getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name}: must be at least 1, not {getattr(self, limit.name)}")
        if not self.tbt_slo_ms > 0:
            raise ValueError(f"tbt_slo_ms: must be more than 0, not {self.tbt_slo_ms}")
        if self.token_budget < self.max_batch_size:
            raise ValueError(f"token_budget: must be at least max_batch_size ({self.max_batch_size}), not {self.token_budget}")
        if self.lanes > len(Lane):
            raise ValueError(f"lanes: must be at most {len(Lane)}, not {self.lanes}")
        least = max(self.max_context, self.max_batch_size)
        if self.max_prefill_tokens < least:
            raise ValueError(f"max_prefill_tokens: must be at least {least}, not {self.max_prefill_tokens}")


class ReadOnly(Sequence[T]):
    """A list that can be looked at, and that goes on growing; slices are copies."""

    __slots__ = ("_items",)

    def __init__(self, items: Sequence[T]) -> None:
        self._items = items

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        return self._items[place]

    def __len__(self) -> int:
        return len(self._items)


def _shown(name: str) -> Any:
    return property(attrgetter(f"_request.{name}"))


class _Seen:
    """Setting or deleting anything raises PlanError."""

    __slots__ = ()
    _kind = "?"

    def __setattr__(self, name: str, value: object) -> None:
        raise PlanError(f"a policy only reads {self._kind}", f"{name} of {self} was to be set")

    def __delattr__(self, name: str) -> None:
        raise PlanError(f"a policy only reads {self._kind}", f"{name} of {self} was to be deleted")


class StepTimeView(_Seen):
    """What a step will take on one variant of the model, learned from the steps so far (`batching/step_time.py`)."""

    __slots__ = ("_learned",)
    _kind = "step times"
    _learned: StepTime

    def __init__(self, learned: StepTime) -> None:
        object.__setattr__(self, "_learned", learned)

    def __str__(self) -> str:
        return "the step-time model"

    @property
    def recent_s(self) -> float:
        """A step's mean duration of late, seconds."""
        return self._learned.recent_s

    def predict(self, load: Load) -> float:
        """Seconds; 0 before there is something to go by."""
        return self._learned.predict(load)

    def bound(self, load: Load) -> float:
        """Seconds within which 99 of 100 such steps should end."""
        return self._learned.bound(load)


class RequestView(_Seen):
    """A request as a policy sees it. Times are seconds, as `now`."""

    __slots__ = ("_request",)
    _kind = "requests"
    _request: Request

    # As it came in.
    id: str = _shown("id")
    arrival: float = _shown("arrival")
    prompt_len: int = _shown("prompt_len")  # tokens
    max_tokens: int = _shown("max_tokens")  # that it asks for
    output_len: int | None = _shown("output_len")  # that it will generate, where a workload knows; for oracles
    priority: Priority = _shown("priority")
    deadline: float | None = _shown("deadline")  # it fails then
    due: float | None = _shown("due")  # when it should have finished: the deadline, or earlier
    sampling: SamplingParams = _shown("sampling")

    # How far it is.
    state: State = _shown("state")
    num_tokens: int = _shown("num_tokens")  # prompt and generated, those being drawn by steps under way included
    num_computed: int = _shown("num_computed")  # of them, in the KV cache
    remaining: int = _shown("remaining")  # to compute until the next token can be drawn: 1 is a decode, more a prefill
    num_generated: int = _shown("num_generated")
    to_generate: int = _shown("to_generate")  # at most, from now on
    kv_peak: int = _shown("kv_peak")  # KV columns that it can come to hold at most
    in_flight: int = _shown("in_flight")  # steps under way that compute it
    variant: int = _shown("variant")  # of the model, that computed its KV
    preemptions: int = _shown("preemptions")
    promoted: bool = _shown("promoted")  # deferred, but now treated as immediate
    urgent: bool = _shown("urgent")  # immediate or promoted
    admitted_at: float | None = _shown("admitted_at")  # when it first got a sequence slot

    def __init__(self, request: Request) -> None:
        object.__setattr__(self, "_request", request)

    def __str__(self) -> str:
        return f"request {self.id}"

    def __repr__(self) -> str:
        return f"<request {self.id}: {self.state.value}, {self.num_computed} of {self.num_tokens} tokens computed>"

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and generated tokens, as far as they are known."""
        return ReadOnly(self._request.tokens)

    @property
    def blocks(self) -> Sequence[int]:
        """The KV blocks that it holds."""
        return ReadOnly(self._request.blocks)

    @property
    def token_times(self) -> Sequence[float]:
        """When each generated token was known."""
        return ReadOnly(self._request.token_times)


def request_of(seen: RequestView) -> Request:
    """The request itself: for the scheduler and the plan. Raises PlanError for anything else than a view of one."""
    if type(seen) is not RequestView:
        raise PlanError("a plan decides about the requests of its view", f"{type(seen).__name__} is no request")
    return seen._request


class View(NamedTuple):
    """What a policy may look at. `resident` and `done` in order of admission, `waiting` in order of arrival (preempted
    requests in front, or at the tail where the policy said so; some may still hold KV blocks)."""

    waiting: Sequence[RequestView]
    resident: Sequence[RequestView]  # hold a slot and still generate
    done: Sequence[RequestView]  # hold a slot, have finished, not yet released
    limits: Limits
    free_blocks: int
    free_slots: int
    step_times: Sequence[StepTimeView]  # what a step will take on each variant of the model, learned from the steps so far
    busy: Collection[Lane] = ()  # lanes with a step under way; never any where lanes take turns
    # The blocks that hold the beginning of a waiting request, all but its last token at most; None where nobody looks.
    cached_prefix: Callable[[RequestView], Sequence[int] | None] = lambda req: None
    # Hashes of its blocks that may be others' too; equal ones hold the same tokens, from the prompt's first on.
    prefix_keys: Callable[[RequestView], Sequence[bytes]] = lambda req: ()
    references: Callable[[int], int] = lambda block: 1  # how many requests hold a block

    @property
    def step_time(self) -> StepTimeView:
        """On the first variant, which runs what a policy does not choose another for."""
        return self.step_times[0]
