"""The plan of one step: a policy fills it, the scheduler checks it and commits all of it or nothing.

It grants or refuses, so that it can never overcommit blocks, sequence slots or tokens; what it cannot express breaks a rule and
raises `PlanError`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import isfinite

from batching.blocks import References, blocks_for
from batching.request import Lane, Request, State
from batching.step import Row
from batching.step_time import Load
from batching.view import PlanError, RequestView, View, request_of

REFUSALS = {
    "tokens": "waits: the step's token budget is spent",
    "time": "waits: the step has no time left under the limit between tokens",
    "slots": "waits: all sequence slots are taken",
    "blocks": "waits: too few KV blocks are free",
    "in flight": "waits: a step that computes it is still under way",
    "prefix": "waits: a request that runs computes its prefix",
}
LONGEST_REASON = 200  # characters


class Plan:
    """One transaction over blocks, sequence slots, tokens and, with a `time_limit_s`, the step's predicted time.

    Requests go in one of two ways: `run` (chunked prefill: as much as fits) and `run_exactly` (whole prompts, rectangles).
    """

    time_limit_s: float | None = None  # for what `run` grants from here on
    keep_blocks, keep_slots = 0, 0  # that `run` and `run_exactly` leave free from here on
    refusal: str | None = None  # what the last of them lacked, one of REFUSALS; None if it granted
    lane = Lane.MAIN  # in which the whole step is computed
    variant = 0  # of the model, on which the whole step runs: its place in Limits.variants

    def __init__(self, view: View, budget: int | None = None) -> None:
        """`budget` in tokens, padding included; by default `token_budget` for `run`, `max_prefill_tokens` for `run_exactly`."""
        self._view = view
        self.budget = view.limits.token_budget if budget is None else budget
        self.whole_budget = view.limits.max_prefill_tokens if budget is None else budget
        self.free_blocks = view.free_blocks
        self.free_slots = view.free_slots
        self.load = Load()  # what the step computes so far
        self._wake_at: float | None = None
        self._rows: dict[RequestView, Row] = {}
        self._blocks: dict[RequestView, int] = {}  # KV blocks to allocate first
        self._released: list[RequestView] = []
        self._preempted: list[RequestView] = []
        self._to_tail: list[RequestView] = []
        self._dropped: list[RequestView] = []
        self._promoted: list[RequestView] = []
        self._rejected: dict[RequestView, str] = {}
        self._block_size = view.limits.block_size
        self._references = References(view.references)
        self._coming: set[bytes] | None = None  # keys of the blocks that running requests are to compute, once asked for
        self._refused: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def run(self, req: RequestView, *, reserve: int = 0) -> int:
        """Compute as many of its next tokens as budget and time limit leave, behind what the prefix cache holds of it.

        Admits `req` if it waits. Returns the tokens granted, 0 if refused: `refusal` says what was lacking. `reserve`: KV
        columns to hold for it from now on, however many it uses.
        """
        request = self._undecided(req)
        looks = request.state is State.WAITING and self.variant == 0  # the cache is the first variant's
        shared = self._view.cached_prefix(req) if looks else None
        start = request.num_computed + len(shared or ()) * self._block_size
        count = self._chunk(request.num_tokens - start, start)
        return self._grant(
            req, Row(request, start, count, 0, 0, start + count == request.num_tokens, shared), self.budget, reserve
        )

    def run_exactly(self, req: RequestView, count: int, *, pad: int = 0, span: int = 0, reserve: int = 0) -> int:
        """Compute exactly the next `count` tokens or none, whatever the prefix cache holds and however long the step takes.

        Admits `req` if it waits. Returns `count`, or 0 if refused. `pad` columns of padding follow, and attention reads `span`
        columns at least (static's rectangle); `reserve`: KV columns to hold for it from now on, however many it uses (Orca).
        """
        request = self._undecided(req)
        whole = type(count) is int and 1 <= count <= request.remaining
        self._rule(whole, "a whole number of tokens, no more than what remains to be computed", req)
        self._columns(req, pad, span)
        start = request.num_computed
        row = Row(request, start, count, pad, span, start + count == request.num_tokens)
        return self._grant(req, row, self.whole_budget, reserve)

    def _undecided(self, req: RequestView) -> Request:
        request = request_of(req)
        self._rule(request.state in (State.WAITING, State.RESIDENT), "only live requests run", req)
        decided = req in self._rows or req in self._preempted or req in self._dropped or req in self._rejected
        self._rule(not decided, "one decision a request", req)
        return request

    def _grant(self, req: RequestView, row: Row, budget: int, reserve: int) -> int:
        """Take what `row` needs, or nothing. Returns its tokens."""
        self._columns(req, reserve)
        self._rule(type(row.count) is int, "a token budget is a whole number", req)
        request, shared = row.req, row.shared or ()
        columns = max(row.start + row.count + row.pad, row.span, reserve)
        blocks = max(0, blocks_for(columns, self._block_size) - len(request.blocks)) - len(shared)
        unheld = sum(not self._references.of(block) for block in shared)  # free, but not to be overwritten
        self.refusal = self._lacks(row, budget, blocks + unheld)
        if self.refusal:
            self._refused[request.id] = REFUSALS[self.refusal]
            return 0
        self._refused.pop(request.id, None)
        self._spend(row.count + row.pad)
        self.free_blocks -= blocks + self._references.take(shared)
        self.free_slots -= request.state is State.WAITING
        self._rows[req] = row
        self._blocks[req] = blocks
        self.load = self.load.plus(row.count, row.start)
        if self._coming is not None:
            self._coming.update(request.keys[len(shared) :])
        return row.count

    def _spend(self, tokens: int) -> None:
        self.budget -= tokens
        self.whole_budget -= tokens

    def _chunk(self, most: int, start: int) -> int:
        """As many tokens as budget and time leave. A step that would else be empty takes a block's worth, whatever its time."""
        count = min(most, self.budget)
        if self.time_limit_s is None or self._in_time(count, start):
            return count
        least = 0 if self._rows else min(count, self._block_size)
        return max(least, bisect_left(range(count), True, key=lambda n: not self._in_time(n + 1, start)))

    def _in_time(self, count: int, start: int) -> bool:
        limit = self.time_limit_s
        step_time = self._view.step_times[self.variant]
        return limit is None or step_time.bound(self.load.plus(count, start)) <= limit

    def _lacks(self, row: Row, budget: int, blocks: int) -> str | None:
        waits = row.req.state is State.WAITING
        if budget < max(1, row.count + row.pad):
            return "tokens"
        if row.count < 1:
            return "time"
        if row.req.in_flight and (waits or self._view.limits.lanes > 1):
            return "in flight"  # preempted, it waits for its token; or the other lane computes it
        if waits and self.free_slots <= self.keep_slots:
            return "slots"
        return "blocks" if blocks and blocks > self.free_blocks - self.keep_blocks else None

    def keep(self, req: RequestView, *, span: int = 0) -> bool:
        """A finished row keeps its slot: it computes one column of padding. False if `max_prefill_tokens` are spent."""
        request = self._finished(req)
        self._columns(req, span)
        held = len(request.blocks) * self._block_size
        self._rule(max(span, request.num_computed + 1) <= held, "padding needs a block", req)
        if self.whole_budget < 1:
            return False
        self._spend(1)
        self._rows[req] = Row(request, request.num_computed, 0, 1, span, False)
        return True

    def preempt(self, req: RequestView, *, keep_kv: bool = False, to_tail: bool = False) -> None:
        """Take back what this plan granted to `req`, its slot and its KV blocks: it waits, and will recompute.

        With `keep_kv` it keeps the blocks and what is computed in them, and goes on from there; they are taken from it by
        preempting it again, now or while it waits. It waits in front of all others, or behind them with `to_tail`.
        """
        request = request_of(req)
        self._rule(request.state in (State.WAITING, State.RESIDENT), "only live requests are preempted", req)
        under_way = request.in_flight and self._view.limits.lanes > 1
        self._rule(not under_way, "what the other lane computes is not preempted", req)
        row = self._rows.pop(req, None)
        leaves = request.state is State.RESIDENT and req not in self._preempted
        drops = bool(request.blocks) and not keep_kv and req not in self._dropped
        self._rule(row is not None or leaves or drops, "only what holds a slot or KV blocks is preempted", req)
        if row:
            self._spend(-row.count - row.pad)
            self.load = Load.of((other.count, other.start) for other in self._rows.values())
            self.free_blocks += self._blocks.pop(req) + self._references.give(row.shared or ())
        if row or leaves:
            self.free_slots += 1
        if leaves:
            self._preempted.append(req)
            if to_tail:
                self._to_tail.append(req)
        if drops:
            self._dropped.append(req)
            self.free_blocks += self._references.give(request.blocks)

    def release(self, *reqs: RequestView) -> None:
        """Answer finished requests and give their slots and blocks back."""
        for req in reqs:
            request = self._finished(req)
            self._released.append(req)
            if may_free(request):
                self.free_blocks += self._references.give(request.blocks)
                self.free_slots += 1

    def _finished(self, req: RequestView) -> Request:
        request = request_of(req)
        self._rule(req in self._view.done, "only finished requests are released or kept", req)
        self._rule(req not in self._rows and req not in self._released, "one decision a request", req)
        return request

    def reject(self, req: RequestView, why: str) -> None:
        """Answer a waiting request with an error, `deadline_missed`: it could only be served too late to be of use."""
        self._rule(request_of(req).state is State.WAITING, "only waiting requests are rejected", req)
        self._rule(req not in self._rows and req not in self._rejected, "one decision a request", req)
        self.because(req, why)
        self._rejected[req] = self._reasons[req.id]

    def promote(self, req: RequestView, why: str) -> None:
        """Treat a deferred request as immediate from now on."""
        live = request_of(req).state in (State.WAITING, State.RESIDENT)
        self._rule(live and not self.urgent(req), "only deferred requests rise", req)
        self.because(req, why)
        self._promoted.append(req)

    def because(self, req: RequestView, why: str) -> None:
        """Note why this was decided about `req`, for /stats and whoever watches the steps."""
        self._rule(type(why) is str, f"a reason is a string, not {type(why).__name__}", req)
        self._reasons[request_of(req).id] = why[:LONGEST_REASON]

    def wait_until(self, time: float) -> None:
        """Ask again at `time` (seconds, as `now`) even if nothing comes in; a time-out without polling."""
        if not isfinite(time):
            raise PlanError("time-outs end", f"wait_until({time})")
        self._wake_at = float(time) if self._wake_at is None else min(float(time), self._wake_at)

    def prefix_coming(self, req: RequestView) -> bool:
        """Whether a request that runs computes the block that `req` lacks first: soon it can share it instead."""
        shared = self._view.cached_prefix(req)
        lacks = () if shared is None else self._view.prefix_keys(req)[len(shared) :]
        if self._coming is None:
            running = map(request_of, {*self._view.resident, *self._rows}.difference(self._preempted))
            self._coming = {key for other in running for key in other.keys[other.num_entered :]}
        if not lacks or lacks[0] not in self._coming:
            return False
        self._refused[req.id] = REFUSALS["prefix"]
        return True

    def urgent(self, req: RequestView) -> bool:
        """Whether `req` is immediate, or promoted by this plan or an earlier one."""
        return req.urgent or req in self._promoted

    # What has been decided so far.

    def __contains__(self, req: RequestView) -> bool:
        """Whether this plan computes tokens of `req`."""
        return req in self._rows

    @property
    def released(self) -> Sequence[RequestView]:
        return tuple(self._released)

    @property
    def preempted(self) -> Sequence[RequestView]:
        """Who loses its slot."""
        return tuple(self._preempted)

    @property
    def to_tail(self) -> Sequence[RequestView]:
        """Who of these waits behind all others."""
        return tuple(self._to_tail)

    @property
    def dropped(self) -> Sequence[RequestView]:
        """Who loses its KV blocks."""
        return tuple(self._dropped)

    @property
    def promoted(self) -> Sequence[RequestView]:
        return tuple(self._promoted)

    @property
    def rejected(self) -> dict[RequestView, str]:
        """Who is rejected, and why."""
        return dict(self._rejected)

    @property
    def wake_at(self) -> float | None:
        """When to ask again though nothing comes in."""
        return self._wake_at

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by request id: what was refused, and what the policy said of its decisions."""
        return self._refused | self._reasons

    # For the scheduler.

    def check(self, view: View) -> None:
        """Raises PlanError unless it was made on `view` and keeps its limits, also where a policy reached past its methods."""
        rows, freed = self._rows.values(), [req for req in self._released if may_free(request_of(req))]
        references = References(view.references)
        blocks = view.free_blocks + sum(references.give(request_of(req).blocks) for req in (*self._dropped, *freed))
        blocks -= sum(references.take(row.shared) for row in rows if row.shared)
        joining = sum(row.req.state is State.WAITING for row in rows)
        tokens, variants = sum(row.count + row.pad for row in rows), len(view.limits.variants)
        for kept, rule in (
            (view is self._view, "a plan is made on the view of its own step"),
            (sum(self._blocks.values()) <= blocks, "no more blocks than are free"),
            (joining <= view.free_slots + len(self._preempted) + len(freed), "no more requests than there are slots"),
            (tokens <= max(view.limits.token_budget, view.limits.max_prefill_tokens), "no more tokens than a step may have"),
            (type(self.lane) is Lane and not (rows and self.lane in view.busy), "a lane computes one step at a time"),
            (type(self.variant) is int and 0 <= self.variant < variants, "a step runs on a variant that there is"),
            (all(map(self._fits_variant, rows)), "a request goes on with the variant that computed its KV"),
        ):
            if not kept:
                raise PlanError(rule, f"{tokens} tokens, {joining} joining, {sum(self._blocks.values())} of {blocks} blocks")

    def _fits_variant(self, row: Row) -> bool:
        if row.req.num_computed == 0:
            return not row.shared or self.variant == 0  # the prefix cache holds the first variant's KV
        return row.req.variant == self.variant

    def _columns(self, req: RequestView, *numbers: int) -> None:
        whole = all(type(number) is int and number >= 0 for number in numbers)
        self._rule(whole, "padding and reservations are whole numbers of columns", req)

    def _rule(self, kept: bool, rule: str, req: RequestView) -> None:
        if not kept:
            raise PlanError(rule, f"request {req.id} ({req.state.value}, {req.remaining} tokens to compute)")


def shareable(num_tokens: int, block_size: int) -> int:
    """How many of a waiting request's blocks may be others': full ones, and at least its last token is left to compute."""
    return (num_tokens - 1) // block_size


def may_free(req: Request) -> bool:
    """Whether an ended request's blocks may go to the next plan.

    A finish by length is known when its step is planned, so its blocks follow in plan order. An end learned later (a stop
    token, a cancel, a failure) waits until no step under way holds the request.
    """
    return req.in_flight == 0 or req.finish_reason == "length"
