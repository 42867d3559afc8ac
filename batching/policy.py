"""What a policy is, and the transaction in which it makes one plan.

A policy sees a `View`, fills a `Planner` and returns it. The planner grants or refuses, so that a plan can never
overcommit blocks, seats or tokens; what it cannot express breaks a rule and raises `PlanError`.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, ClassVar, NamedTuple

from batching.blocks import References, blocks_for
from batching.params import Params
from batching.request import Lane, Request, State
from batching.step_time import Load, StepTime


@dataclass(frozen=True)
class Limits:
    """What the engine can hold. Policies that chunk prompts are bound by `token_budget` a step, those that run whole
    prompts by `max_prefill_tokens` (padding included)."""

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


class View(NamedTuple):
    """What a policy may look at. `resident` and `done` in order of admission, `waiting` in order of arrival (preempted
    requests in front, or at the tail where the policy said so; some may still hold KV blocks)."""

    waiting: Sequence[Request]
    resident: Sequence[Request]  # hold a slot and still generate
    done: Sequence[Request]  # hold a slot, have finished, not yet released
    limits: Limits
    free_blocks: int
    free_seats: int
    step_times: Sequence[StepTime]  # what a step will take on each variant of the model, learned from the steps so far
    busy: Collection[Lane] = ()  # lanes with a step under way; never any where lanes take turns
    # The blocks that hold the beginning of a waiting request, all but its last token at most; None where nobody looks.
    cached_prefix: Callable[[Request], Sequence[int] | None] = lambda req: None
    references: Callable[[int], int] = lambda block: 1  # how many requests hold a block

    @property
    def step_time(self) -> StepTime:
        """On the first variant, which runs what a policy does not choose another for."""
        return self.step_times[0]


class PlanError(Exception):
    """A policy raised or broke a rule; the message names both."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of `req` in this step, followed by `pad` columns of padding; attention over at least `span` columns.
    `shared`: the blocks with which a request is admitted, found in the prefix cache; None where nobody looked."""

    req: Request
    count: int
    pad: int = 0
    span: int = 0
    shared: Sequence[int] | None = None


class Plan(NamedTuple):
    work: tuple[Work, ...]
    blocks: dict[Request, int]  # KV blocks to allocate first
    release: tuple[Request, ...]
    preempt: tuple[Request, ...]  # lose their seat
    to_tail: tuple[Request, ...]  # of these, who waits behind all others
    drop: tuple[Request, ...]  # lose their KV blocks
    promote: tuple[Request, ...]
    reject: dict[Request, str]  # and why
    variant: int
    wake_at: float | None
    reasons: dict[str, str]  # by request id
    lane: Lane


REFUSALS = {
    "tokens": "waits: the step's token budget is spent",
    "time": "waits: the step has no time left under the limit between tokens",
    "seats": "waits: all sequence slots are taken",
    "blocks": "waits: too few KV blocks are free",
    "in flight": "waits: a step that computes it is still under way",
    "prefix": "waits: a request that runs computes its prefix",
}


class Planner:
    """One transaction over blocks, seats, the token budget and, with a `time_limit_s`, the step's predicted time; the scheduler
    commits all of it or nothing."""

    time_limit_s: float | None = None  # for what `run` chooses from here on; what is asked for exactly is not held to it
    keep_blocks, keep_seats = 0, 0  # that `run` leaves free from here on
    refusal: str | None = None  # what the last `run` lacked, one of REFUSALS; None if it granted
    lane = Lane.MAIN  # in which the whole step is computed
    variant = 0  # of the model, on which the whole step runs: its place in Limits.variants

    def __init__(self, view: View, budget: int | None = None) -> None:
        """`budget` in tokens, padding included; by default the view's `token_budget`."""
        self._view = view
        self.budget = view.limits.token_budget if budget is None else budget
        self.free_blocks = view.free_blocks
        self.free_seats = view.free_seats
        self._block_size = view.limits.block_size
        self._work: dict[Request, Work] = {}
        self._blocks: dict[Request, int] = {}
        self._release: list[Request] = []
        self._preempt: list[Request] = []
        self._to_tail: list[Request] = []
        self._drop: list[Request] = []
        self._promote: list[Request] = []
        self._reject: dict[Request, str] = {}
        self._wake_at: float | None = None
        self._references = References(view.references)
        self._coming: set[bytes] | None = None  # keys of the blocks that running requests are to compute, once asked for
        self._refused: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self.load = Load()  # what the step computes so far

    def run(self, req: Request, want: int | None = None, *, pad: int = 0, span: int = 0, reserve: int = 0) -> int:
        """Compute the next tokens of `req`, admitting it if it waits. Returns the tokens granted, 0 if refused.

        Without `want` as many as the budget leaves, behind what the prefix cache holds of it; with it exactly so many.
        `reserve`: KV columns to hold for it from now on, however many it uses (Orca, static).
        """
        self._rule(req.state in (State.WAITING, State.RESIDENT), "only live requests run", req)
        self._rule(req not in self._work and req not in self._preempt, "one decision a request", req)
        self._rule(req not in self._drop and req not in self._reject, "one decision a request", req)
        whole = want is None or (isinstance(want, int) and 1 <= want <= req.remaining)
        self._rule(whole, "a whole number of tokens, no more than what remains to be computed", req)
        self._rule(pad >= 0 and reserve >= 0, "padding and reservations are not negative", req)
        admits = req.state is State.WAITING
        looks = admits and want is None and self.variant == 0  # the cache is the first variant's
        shared = self._view.cached_prefix(req) if looks else None
        start = self._start(req, shared)
        count = self._chunk(req, start) if want is None else want
        columns = max(start + count + pad, span, reserve)
        blocks = max(0, blocks_for(columns, self._block_size) - len(req.blocks))
        if shared:
            blocks -= len(shared)
        unheld = sum(not self._references.of(block) for block in shared) if shared else 0  # free, but not to be overwritten
        self.refusal = self._lacks(req, count, pad, blocks + unheld)
        if self.refusal:
            self._refused[req.id] = REFUSALS[self.refusal]
            return 0
        self._refused.pop(req.id, None)
        self.budget -= count + pad
        self.free_blocks -= blocks + (self._references.take(shared) if shared else 0)
        self.free_seats -= admits
        self._work[req] = Work(req, count, pad, span, shared)
        self._blocks[req] = blocks
        self.load = self.load.plus(count, start)
        if self._coming is not None:
            self._coming.update(req.keys[len(shared or ()) :])
        return count

    def _start(self, req: Request, shared: Sequence[int] | None) -> int:
        """The first column that is not computed."""
        return req.num_computed + len(shared) * self._block_size if shared else req.num_computed

    def _chunk(self, req: Request, start: int) -> int:
        """As many tokens as budget and time leave. A step that would else be empty takes a block's worth, whatever its time."""
        count = min(req.num_tokens - start, self.budget)
        if self.time_limit_s is None or self._in_time(count, start):
            return count
        least = 0 if self._work else min(count, self._block_size)
        return max(least, bisect_left(range(count), True, key=lambda n: not self._in_time(n + 1, start)))

    def _in_time(self, count: int, start: int) -> bool:
        limit = self.time_limit_s
        step_time = self._view.step_times[self.variant]
        return limit is None or step_time.bound(self.load.plus(count, start)) <= limit

    def _lacks(self, req: Request, count: int, pad: int, blocks: int) -> str | None:
        if self.budget < max(1, count + pad):
            return "tokens"
        if count < 1:
            return "time"
        if req.in_flight and (req.state is State.WAITING or self._view.limits.lanes > 1):
            return "in flight"  # preempted, it waits for its token; or the other lane computes it
        if req.state is State.WAITING and self.free_seats <= self.keep_seats:
            return "seats"
        return "blocks" if blocks and blocks > self.free_blocks - self.keep_blocks else None

    def keep(self, req: Request, *, span: int = 0) -> bool:
        """A finished row keeps its seat: it computes one column of padding. False if the budget is spent."""
        self._rule(req.state is State.DONE, "only finished requests are kept", req)
        self._rule(req not in self._work and req not in self._release, "one decision a request", req)
        self._rule(max(span, req.num_computed + 1) <= len(req.blocks) * self._block_size, "padding needs a block", req)
        if not self.budget:
            return False
        self.budget -= 1
        self._work[req] = Work(req, 0, 1, span)
        return True

    def preempt(self, req: Request, *, keep_kv: bool = False, to_tail: bool = False) -> None:
        """Take back what this plan granted to `req`, its seat and its KV blocks: it waits, and will recompute.

        With `keep_kv` it keeps the blocks and what is computed in them, and goes on from there; they are taken from it by
        preempting it again, now or while it waits. It waits in front of all others, or behind them with `to_tail`.
        """
        self._rule(req.state in (State.WAITING, State.RESIDENT), "only live requests are preempted", req)
        work = self._work.pop(req, None)
        self._rule(not req.in_flight or self._view.limits.lanes == 1, "what the other lane computes is not preempted", req)
        leaves = req.state is State.RESIDENT and req not in self._preempt
        drops = bool(req.blocks) and not keep_kv and req not in self._drop
        self._rule(work is not None or leaves or drops, "only what holds a seat or KV blocks is preempted", req)
        if work:
            self.budget += work.count + work.pad
            self.load = Load.of((other.count, self._start(other.req, other.shared)) for other in self._work.values())
            self.free_blocks += self._blocks.pop(req) + self._references.give(work.shared or ())
        if work or leaves:
            self.free_seats += 1
        if leaves:
            self._preempt.append(req)
            if to_tail:
                self._to_tail.append(req)
        if drops:
            self._drop.append(req)
            self.free_blocks += self._references.give(req.blocks)

    def release(self, *reqs: Request) -> None:
        """Answer finished requests and give their seats and blocks back."""
        for req in reqs:
            self._rule(req.state is State.DONE, "only finished requests are released", req)
            self._rule(req not in self._work and req not in self._release, "one decision a request", req)
            self._release.append(req)
            if may_free(req):
                self.free_blocks += self._references.give(req.blocks)
                self.free_seats += 1

    def reject(self, req: Request, why: str) -> None:
        """Answer a waiting request with an error, `deadline_missed`: it could only be served too late to be of use."""
        self._rule(req.state is State.WAITING, "only waiting requests are rejected", req)
        self._rule(req not in self._work and req not in self._reject, "one decision a request", req)
        self._reject[req] = why
        self.because(req, why)

    def promote(self, req: Request, why: str) -> None:
        """Treat a deferred request as immediate from now on."""
        self._rule(req.state in (State.WAITING, State.RESIDENT) and not self.urgent(req), "only deferred requests rise", req)
        self._promote.append(req)
        self.because(req, why)

    def because(self, req: Request, why: str) -> None:
        """Note why this was decided about `req`, for /stats and whoever watches the steps."""
        self._reasons[req.id] = why

    def wait_until(self, time: float) -> None:
        """Ask again at `time` (seconds, as `now`) even if nothing comes in; a time-out without polling."""
        if not isfinite(time):
            raise PlanError("time-outs end", f"wait_until({time})")
        self._wake_at = time if self._wake_at is None else min(time, self._wake_at)

    def prefix_coming(self, req: Request) -> bool:
        """Whether a request that runs computes the block that `req` lacks first: soon it can share it instead."""
        shared = self._view.cached_prefix(req)
        lacks = () if shared is None else req.keys[len(shared) : shareable(req, self._block_size)]
        if self._coming is None:
            running = {*self._view.resident, *self._work}.difference(self._preempt)
            self._coming = {key for other in running for key in other.keys[other.num_entered :]}
        if not lacks or lacks[0] not in self._coming:
            return False
        self._refused[req.id] = REFUSALS["prefix"]
        return True

    @property
    def preempted(self) -> Sequence[Request]:
        """Who loses its seat by this plan."""
        return self._preempt

    @property
    def dropped(self) -> Sequence[Request]:
        """Who loses its KV blocks by this plan."""
        return self._drop

    def urgent(self, req: Request) -> bool:
        """Whether `req` is immediate, or promoted by this plan or an earlier one."""
        return req.urgent or req in self._promote

    def __contains__(self, req: Request) -> bool:
        """Whether this plan computes tokens of `req`."""
        return req in self._work

    def plan(self, view: View) -> Plan:
        """What was decided, for the scheduler. Raises PlanError unless it was decided on `view` and keeps to its limits."""
        moved = tuple(self._preempt), tuple(self._to_tail), tuple(self._drop)
        lists = tuple(self._release), *moved, tuple(self._promote)
        work, reasons = tuple(self._work.values()), self._refused | self._reasons
        plan = Plan(work, self._blocks, *lists, self._reject, self.variant, self._wake_at, reasons, self.lane)
        released = [*filter(may_free, plan.release)]
        references = References(view.references)
        blocks = view.free_blocks + sum(references.give(req.blocks) for req in (*plan.drop, *released))
        blocks -= sum(references.take(work.shared) for work in plan.work if work.shared)
        joining = sum(work.req.state is State.WAITING for work in plan.work)
        tokens = sum(work.count + work.pad for work in plan.work)
        for kept, rule in (
            (view is self._view, "a plan is made on the view of its own step"),
            (sum(plan.blocks.values()) <= blocks, "no more blocks than are free"),
            (joining <= view.free_seats + len(plan.preempt) + len(released), "no more requests than there are seats"),
            (tokens <= max(view.limits.token_budget, view.limits.max_prefill_tokens), "no more tokens than a step may have"),
            (not plan.work or plan.lane not in view.busy, "a lane computes one step at a time"),
            (plan.variant in range(len(view.limits.variants)), "a step runs on a variant that there is"),
            (all(map(self._fits_variant, plan.work)), "a request goes on with the variant that computed its KV"),
        ):
            if not kept:
                raise PlanError(rule, f"{tokens} tokens, {joining} joining, {sum(plan.blocks.values())} of {blocks} blocks")
        return plan

    def _fits_variant(self, work: Work) -> bool:
        if work.req.num_computed == 0:
            return not work.shared or self.variant == 0  # the prefix cache holds the first variant's KV
        return work.req.variant == self.variant

    def _rule(self, kept: bool, rule: str, req: Request) -> None:
        if not kept:
            raise PlanError(rule, f"request {req.id} ({req.state.value}, {req.remaining} tokens to compute)")


def shareable(req: Request, block_size: int) -> int:
    """How many of a waiting request's blocks may be others': full ones, and at least its last token is left to compute."""
    return (len(req.tokens) - 1) // block_size


def may_free(req: Request) -> bool:
    """Whether an ended request's blocks may go to the next plan.

    A finish by length is known when its step is planned, so its blocks follow in plan order. An end learned later (a stop
    token, a cancel, a failure) waits until no step under way holds the request.
    """
    return req.in_flight == 0 or req.finish_reason == "length"


class Policy:
    """A scheme: which requests get how many tokens in the next step. One instance serves one scheduler."""

    Params: ClassVar[type[Params]] = Params
    lanes: ClassVar[tuple[Lane, ...]] = (Lane.MAIN,)  # for which it plans steps; asked when one of them is not busy

    def __init__(self, params: Any = None) -> None:
        self.params: Any = self.Params() if params is None else params

    def refuses(self, req: Request, limits: Limits) -> str | None:
        """Why `req` could never run even in an empty engine, or None. Asked at submission."""
        return too_large(req.kv_peak, limits)

    def schedule(self, view: View, now: float) -> Planner:
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Policy":
        """Build the policy from `k=v` strings or JSON values. Raises ValueError naming the parameter."""
        return cls(cls.Params.read(arguments))


def too_large(columns: int, limits: Limits) -> str | None:
    if blocks_for(columns, limits.block_size) <= limits.num_blocks:
        return None
    capacity = limits.num_blocks * limits.block_size
    return f"needs {columns} columns of KV memory, the engine has {capacity}"
