"""The books: who waits, who holds a slot and which KV blocks, what is under way. Plans come from the policy; they are checked
and committed here, and so are results, cancels and failures. Deterministic: `now` is always an argument.
"""

from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count, islice
from math import inf
from typing import Any, TypeVar

from batching.blame import in_a_line, in_full, place_of
from batching.blocks import BlockPool, chain
from batching.plan import LONGEST_REASON, Plan, may_free, shareable
from batching.policies import mode_of
from batching.policies.dynamic import Dynamic
from batching.policy import Policy
from batching.request import Lane, Refused, Request, RequestError, State
from batching.step import Row, Step, StepResult
from batching.step_time import StepTime
from batching.view import Limits, PlanError, RequestView, StepTimeView, View, request_of

# With work waiting, more than this is taken for "for ever":
MAX_EMPTY_PLANS = 1000  # in a row that compute nothing new and answer nobody
LONGEST_WAIT_S = 120.0  # until something is planned

T = TypeVar("T")


class Scheduler:
    def __init__(self, policy: Policy, limits: Limits, step_times: Sequence[StepTime] = ()) -> None:
        """`step_times`: of each variant of the model, where they are known; else they are learned from nothing."""
        self.policy = policy
        self.limits = limits
        self.blocks = BlockPool(limits.num_blocks, limits.block_size)
        self.step_times = step_times or [StepTime() for _ in limits.variants]  # of this engine: they outlive the policies
        self.wake_at: float | None = None  # when to plan again though nothing comes in, after next_step gave None
        self.plan: Plan | None = None  # that the last next_step committed
        self._last_resort = Dynamic()
        self._last_good: Policy = self._last_resort  # goes on where the policy breaks a rule
        self._switches: list[Policy] = []
        self._requests: dict[str, Request] = {}  # all that are not answered, by id
        self._views: dict[Request, RequestView] = {}  # of the same, for the policy
        self._waiting: deque[Request] = deque()
        self._resident: list[Request] = []  # RESIDENT or DONE: hold a slot
        self._lingering: dict[Request, int] = {}  # ended while a step holds them: keep blocks and so many slots
        self._released: list[Request] = []  # by a plan; answered once their last token is known
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap; answered requests are skipped
        self._sequence = count()  # decides between equal deadlines
        self._under_way: dict[int, Step] = {}
        self._answered: list[Request] = []
        self._last_id = 0
        self._empty_plans = 0
        self._empty_since = 0.0
        self.guard: Callable[[Callable[[], Any]], Any] = lambda ask: ask()  # calls what asks the policy; may raise Overdue
        self.policy_changes = 0  # how often another policy has taken over, whoever asked for it
        self._last_ended = dict.fromkeys(Lane, -inf)

    # What comes in.

    def check_queue(self, ahead: int = 0) -> None:
        """Raise Refused if the queue is full, `ahead` more requests being on their way to it."""
        if len(self._waiting) + ahead >= self.limits.max_queue:
            raise Refused("queue_full", f"the queue is full: max_queue is {self.limits.max_queue}")

    def submit(self, req: Request, now: float) -> None:
        """Queue a new request. Raises Refused, or PlanError if the policy's own test of it raises."""
        self.check_queue()
        if not req.tokens or req.max_tokens < 1:
            raise Refused("invalid_request", "a request needs at least one prompt token and one token to generate")
        if req.id in self._requests:
            raise Refused("duplicate_id", f"request {req.id} is already under way")
        alone = req.max_tokens == 1  # then the prompt may fill it: the token that is drawn takes no column
        if len(req.tokens) + req.max_tokens - alone > self.limits.max_context:
            raise Refused(
                "context_length_exceeded",
                f"the prompt has {len(req.tokens)} tokens and num_tokens asks for {req.max_tokens} more: together they may "
                f"be at most {self.limits.max_context} (the model's context)",
                "num_tokens",
            )
        if refusal := self._refusal(req):
            raise refusal
        self._requests[req.id] = req
        self._views[req] = RequestView(req)
        self._waiting.append(req)
        if req.deadline is not None:
            self._keep_deadline(req.deadline, req)
        self._empty_plans = 0

    def cancel(self, request_id: str, now: float, error: RequestError) -> None:
        """End a request with `error`, whatever its state; unknown or answered ones are let be."""
        req = self._requests.get(request_id)
        if req:
            self._fail(req, error, now)

    def switch(self, policy: Policy) -> None:
        """Let `policy` take over when nothing is resident; until then what waits keeps waiting."""
        self._switches.append(policy)

    def drain(self, now: float, error: RequestError) -> None:
        """End what waits and has never run; what has begun goes on."""
        for req in [req for req in self._waiting if not req.preemptions]:
            self._fail(req, error, now)

    # One iteration.

    def next_step(self, now: float) -> Step | None:
        """Ask the policy for a plan and commit it. None if there is nothing to compute: see `wake_at`.

        Raises PlanError if the policy raises, breaks a rule or plans nothing while work waits; nothing is committed then.
        """
        self.wake_at = self.plan = None
        self._expire(now)
        self._take_over(now)
        view = self._view()
        if not (view.waiting or self._resident) or all(lane in view.busy for lane in self._ask(self._lanes)):
            return None
        plan = self._ask(lambda: self.policy.schedule(view, now))
        if type(plan) is not Plan:
            raise PlanError("a policy returns the plan that it filled", f"not {type(plan).__name__}")
        Plan.check(plan, view)  # not what a policy may have put into the instance
        self._own(plan, view)
        self._progress(plan, now)
        self.plan = plan
        return self._commit(plan, now)

    def complete(self, result: StepResult) -> list[Request]:
        """Enter a step's tokens, or its failure, which ends that step's requests only. Returns those that got a token."""
        step = self._under_way.pop(result.step_id)
        continued = []
        for row in step.rows:
            req = row.req
            req.in_flight -= 1
            req.num_pending -= row.samples
            if result.error is not None:
                self._fail(req, RequestError("step_failed", f"the step failed: {result.error}"), result.ended)
                continue
            if self.limits.prefix_caching and step.variant == 0:
                self._enter(row)
            if result.logprobs:
                req.logprobs.update(result.logprobs.get(req.id, {}))
            if self._wants_token(row):
                self._append(req, result.tokens[req.id], result.ended)
                continued.append(req)
        self._settle(result.ended)
        if result.error is None:
            seconds = result.ended - max(step.planned_at, self._last_ended[step.lane])
            self.step_times[step.variant].observe(step.load, seconds)
        self._last_ended[step.lane] = result.ended
        return continued

    def depose(self, error: PlanError, now: float) -> str:
        """The policy broke a rule: its resident requests fail, the last good policy goes on. Returns what they are told."""
        told = RequestError("policy_failed", f"policy {mode_of(self.policy)} failed: {error}")
        hopeless = self._waiting if self.policy is self._last_resort else ()
        for req in [*self._resident, *hopeless]:
            self._fail(req, told, now)
        self._drop_waiting()
        self.policy = self._last_resort if self.policy is self._last_good else self._last_good
        self.policy_changes += 1
        self._last_good = self.policy
        self._empty_plans = 0
        return told.message

    # What is to be known.

    def take_answered(self) -> list[Request]:
        """The requests answered since the last call, each once."""
        answered, self._answered = self._answered, []
        return answered

    @property
    def switching(self) -> Iterable[Policy]:
        """Policies that have not yet taken over."""
        return self._switches

    @property
    def last_step(self) -> int:
        """The number of the newest step; 0 before there is one."""
        return self._last_id

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def resident(self) -> Sequence[Request]:
        """Who holds a slot, in order of admission."""
        return self._resident

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def live(self) -> Collection[Request]:
        """All that are not answered, in order of their submission."""
        return self._requests.values()

    @property
    def num_live(self) -> int:
        return len(self._requests)

    # Helpers.

    def _view(self) -> View:
        views = self._views.__getitem__
        resident = tuple(views(req) for req in self._resident if req.state is State.RESIDENT)
        in_order = self.limits.lanes == 1  # else what is freed too early could be written in the other lane
        done = tuple(views(req) for req in self._resident if req.state is State.DONE and (in_order or not req.in_flight))
        slots = self.limits.max_batch_size - len(self._resident) - sum(self._lingering.values())
        waiting = () if self._switches else tuple(map(views, self._waiting))
        busy = () if in_order else {step.lane for step in self._under_way.values()}
        free, times = self.blocks.num_free, tuple(map(StepTimeView, self.step_times))
        lookups = self._cached_prefix, self._prefix_keys, self.blocks.references
        return View(waiting, resident, done, self.limits, free, slots, times, busy, *lookups)

    def _cached_prefix(self, seen: RequestView) -> Sequence[int] | None:
        """The blocks in which the prefix cache holds the beginning of a waiting request; None where it is not asked: the
        log probabilities of a prompt's tokens come from computing them."""
        req = request_of(seen)
        if not self.limits.prefix_caching or req.state is not State.WAITING or req.blocks or req.prompt_logprobs:
            return None
        return self.blocks.find(self._prefix_keys(seen))

    def _prefix_keys(self, seen: RequestView) -> Sequence[bytes]:
        req, block_size = request_of(seen), self.limits.block_size
        return tuple(chain(req.keys, req.tokens, block_size)[: shareable(len(req.tokens), block_size)])

    def _keep_deadline(self, deadline: float, req: Request) -> None:
        heappush(self._deadlines, (deadline, next(self._sequence), req))
        if len(self._deadlines) > 2 * len(self._requests) + 64:  # most of them are answered
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.ANSWERED]
            heapify(self._deadlines)

    def _expire(self, now: float) -> None:
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].state is State.ANSWERED):
            req = heappop(self._deadlines)[2]
            self._fail(req, RequestError("deadline_exceeded", "the request's deadline has passed", "deadline_s"), now)

    def _take_over(self, now: float) -> None:
        if self._switches:  # who waits is out of sight now, and what it holds would be out of reach
            self._drop_waiting()
        while self._switches and not self._resident:
            self._last_good = self.policy
            self.policy = self._switches.pop(0)
            self.policy_changes += 1
            self._empty_plans = 0
            self.blocks.forget()  # so that modes are compared from the same start
            for req in list(self._waiting):
                if refusal := self._refusal(req):
                    self._fail(req, refusal, now)

    def _refusal(self, req: Request) -> Refused | None:
        seen = self._views.get(req) or RequestView(req)
        reason = self._ask(lambda: self.policy.refuses(seen, self.limits))
        if reason is None:
            return None
        if type(reason) is not str:
            raise PlanError("refuses says why or None", f"not {type(reason).__name__}")
        told = f"mode {mode_of(self.policy)} can never run this request: it {reason[:LONGEST_REASON]}"
        return Refused("too_large", told, "num_tokens")

    def _lanes(self) -> tuple[Lane, ...]:
        lanes = tuple(self.policy.lanes)
        if not lanes or not all(type(lane) is Lane for lane in lanes):
            raise PlanError("a policy plans for one lane at least", f"lanes = {lanes!r:.80}")
        return lanes

    def _ask(self, ask: Callable[[], T]) -> T:
        """What the policy answers. Raises PlanError, whatever it raises."""

        def answer() -> T:
            try:
                return ask()
            except PlanError as error:
                raise PlanError(error.rule, error.detail, place_of(error), in_full(error)) from error
            except BaseException as error:
                raise PlanError("raised", in_a_line(error), place_of(error), in_full(error)) from error

        return self.guard(answer)

    def _own(self, plan: Plan, view: View) -> None:
        """Raise PlanError if it decides about a request that its view does not show: a policy may have kept one."""
        for seen in (*plan._rows, *plan.preempted, *plan.dropped, *plan.promoted, *plan.rejected):
            hidden = not view.waiting and seen.state is State.WAITING
            if hidden or self._views.get(request_of(seen)) is not seen:
                raise PlanError("a plan decides about the requests of its view", f"request {seen.id} is not one of them")

    def _progress(self, plan: Plan, now: float) -> None:
        """Raise PlanError for a plan after which nothing would ever happen, or if none of many has brought anything."""
        rows = plan._rows.values()
        if plan.released or plan.rejected or any(row.count and row.start + row.count > row.req.lost for row in rows):
            self._empty_plans = 0
            return
        if self._under_way and not rows:
            return
        self._empty_since = self._empty_since if self._empty_plans else now
        self._empty_plans += 1
        wake_at = now if plan.wake_at is None else plan.wake_at
        does, wakes = rows or plan.preempted or plan.dropped, wake_at > now
        too_late = not does and wakes and wake_at > self._empty_since + LONGEST_WAIT_S
        if not (does or wakes) or too_late or self._empty_plans > MAX_EMPTY_PLANS + self.limits.max_context:
            rule = f"work waits, so something must be planned{f' within {LONGEST_WAIT_S:g} s' if too_late else ''}"
            raise PlanError(rule, self._what_waits(plan))

    def _what_waits(self, plan: Plan) -> str:
        done = sum(req.state is State.DONE for req in self._resident)
        told = f"{len(self._waiting)} waiting, {len(self._resident) - done} running, {done} finished and not released"
        if done:
            return f"{told}: was plan.release(*view.done) forgotten?"
        return "; ".join([told, *(f"request {id} {why}" for id, why in islice(plan.reasons.items(), 1))])

    def _commit(self, plan: Plan, now: float) -> Step | None:
        for seen in plan.promoted:
            request_of(seen).promoted = True
        for seen in plan.preempted:
            self._preempt(request_of(seen), seen in plan.to_tail)
        for seen in plan.dropped:
            self._drop(request_of(seen))
        for seen, why in plan.rejected.items():
            self._fail(request_of(seen), RequestError("deadline_missed", why, "deadline_s"), now)
        for seen in plan.released:
            req = request_of(seen)
            self._resident.remove(req)
            self._released.append(req)
            self._vacate(req)
        self._settle(now)
        for row in plan._rows.values():  # before any is handed out: a block that is free can hold what another request shares
            if row.shared:
                self.blocks.share(row.shared)
        for seen, row in plan._rows.items():
            self._take_in(row, plan._blocks.get(seen, 0), plan.variant, now)
        if not plan._rows:
            deadlines = [self._deadlines[0][0]] if self._deadlines else []
            wake_at = [plan.wake_at] if plan.wake_at is not None else []
            changed = plan.released or plan.preempted or plan.dropped or plan.rejected
            self.wake_at = now if changed else min(deadlines + wake_at, default=None)
            return None
        self._last_id += 1
        lane = Lane.MAIN if self.limits.lanes == 1 else plan.lane
        step = Step(self._last_id, tuple(plan._rows.values()), now, lane, plan.variant)
        self._under_way[self._last_id] = step
        return step

    def _take_in(self, row: Row, blocks: int, variant: int, now: float) -> None:
        """Enter a row: slot and blocks are taken and its tokens count as computed from now on."""
        req = row.req
        if req.state is State.WAITING:
            self._waiting.remove(req)
            self._resident.append(req)
            req.state = State.RESIDENT
            req.admitted_at = now if req.admitted_at is None else req.admitted_at
        if row.shared is not None:
            req.blocks.extend(row.shared)
            req.num_entered = len(row.shared)
            if not req.preemptions:
                req.num_cached = len(row.shared) * self.limits.block_size
        if blocks:
            req.blocks.extend(self.blocks.allocate(blocks))
        req.variant = variant
        req.num_computed = row.start + row.count
        req.num_pending += row.samples
        req.in_flight += 1
        if row.samples and req.num_generated == req.max_tokens:
            req.state, req.finish_reason = State.DONE, "length"

    def _enter(self, row: Row) -> None:
        """A step is complete: the blocks that it filled may be shared from now on. Not those of a request that has failed,
        nor of one that has lost its blocks meanwhile."""
        req, block_size = row.req, self.limits.block_size
        if not req.blocks or req.error is not None:
            return
        keys = chain(req.keys, req.tokens, block_size)
        while (req.num_entered + 1) * block_size <= row.start + row.count:
            self.blocks.enter(keys[req.num_entered], req.blocks[req.num_entered])
            req.num_entered += 1

    def _wants_token(self, row: Row) -> bool:
        """Not a row that only prefilled, nor one of a request that has ended since its step was planned."""
        return row.samples and row.req.state is not State.ANSWERED and row.req.finish_reason != "stop"

    def _append(self, req: Request, token: int, now: float) -> None:
        req.tokens.append(token)
        req.token_times.append(now)
        if req.stop is None or not req.stop(req):
            return
        req.finish_reason = "stop"
        if req.state is State.WAITING:  # preempted while this step was under way
            self._waiting.remove(req)
            self._vacate(req, slots=0)
            self._answer(req, now)
        elif req.state is State.RESIDENT:
            req.state = State.DONE

    def _preempt(self, req: Request, to_tail: bool) -> None:
        self._resident.remove(req)
        if to_tail:
            self._waiting.append(req)
        else:
            self._waiting.appendleft(req)
        req.preemptions += 1
        req.state = State.WAITING

    def _drop(self, req: Request) -> None:
        """What is in its KV blocks is lost: it will recompute."""
        self._free(req)
        req.lost = max(req.lost, req.num_computed)
        req.num_computed = 0

    def _drop_waiting(self) -> None:
        """A policy does not answer for what its predecessor left in memory."""
        for req in self._waiting:
            if req.blocks:
                self._drop(req)

    def _fail(self, req: Request, error: RequestError, now: float) -> None:
        if req.state is State.ANSWERED:
            return
        if req.state is State.WAITING:
            self._waiting.remove(req)
            self._vacate(req, slots=0)
        elif req not in self._released:
            self._resident.remove(req)
            req.finish_reason = None
            self._vacate(req)
        req.error = error
        self._answer(req, now)

    def _answer(self, req: Request, now: float) -> None:
        del self._requests[req.id], self._views[req]
        if req in self._released:
            self._released.remove(req)
        req.state = State.ANSWERED
        req.answered_at = now
        req.mode = mode_of(self.policy)
        self._answered.append(req)

    def _vacate(self, req: Request, slots: int = 1) -> None:
        """Give up blocks and slot, now or once no step under way holds the request."""
        if may_free(req):
            self._free(req)
        else:
            self._lingering[req] = slots

    def _settle(self, now: float) -> None:
        for req in [req for req in self._released if req.finish_reason == "stop" or not req.num_pending]:
            self._answer(req, now)
        for req in [req for req in self._lingering if not req.in_flight]:
            del self._lingering[req]
            self._free(req)

    def _free(self, req: Request) -> None:
        self.blocks.free(req.blocks)
        req.blocks = array("i")
        req.num_entered = 0
