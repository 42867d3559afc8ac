"""Submit, step, cancel, switch, failed step, with tiny KV memory, with and without prefix caching, on a CPU's depth, with
overlap and with two lanes: the books stay right, nobody reads what another request wrote, and replaying what came in gives the
same plans."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from batching.driver import Driver
from batching.policies import POLICIES
from batching.policy import Limits
from batching.replay import replay
from batching.request import Priority, Request, RequestError, State
from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from batching.step_time import Load, Probe
from simulator.virtual import VirtualClock
from tests.kv_contents import KVContents
from tests.told import Plans


class Machine(RuleBasedStateMachine):
    @initialize(
        mode=st.sampled_from(sorted(POLICIES)),
        seats=st.integers(1, 4),
        blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 4]),
        depth=st.sampled_from([1, 2]),
        lanes=st.sampled_from([1, 2]),
        prefix_caching=st.booleans(),
    )
    def start(self, mode: str, seats: int, blocks: int, block_size: int, depth: int, lanes: int, prefix_caching: bool) -> None:
        self.limits = Limits(
            max_batch_size=seats, token_budget=8, max_prefill_tokens=32, max_context=24, block_size=block_size,
            num_blocks=blocks, max_queue=6, lanes=lanes, prefix_caching=prefix_caching,
        )  # fmt: skip
        self.clock = VirtualClock()
        self.depth = max(depth, lanes)
        self.log: list[dict] = []
        self.answered: list[Request] = []
        self.submitted: list[Request] = []
        self.plans: list[tuple] = []
        self.under_way: list[Step] = []
        self.computing: dict[int, set[int]] = {}  # the blocks of each step under way
        self.contents = KVContents(block_size)
        self.scheduler = Scheduler(POLICIES[mode](), self.limits)
        self.told = Plans()
        self.driver = Driver(self.scheduler, self.clock, self.answered.append, self.log.append, on_plan=self.told)
        for tokens in range(1, 10):
            self.driver.learn(Probe(Load.of([(tokens, 0)]), 0.01 * tokens))

    @rule(
        prompt=st.integers(1, 14), differs=st.integers(0, 14), longest=st.integers(1, 12), stop=st.integers(1, 20),
        priority=st.sampled_from(Priority), patience=st.none() | st.integers(1, 40),
    )  # fmt: skip
    def submit(self, prompt: int, differs: int, longest: int, stop: int, priority: Priority, patience: int | None) -> None:
        now = self.clock.now
        deadline = None if patience is None else now + patience
        name = str(len(self.submitted))
        tokens = [int(place >= differs) for place in range(prompt)]  # prompts that begin alike
        req = Request(name, tokens, longest, priority, now, deadline, stop=lambda req: len(req.output) == stop)
        self.submitted.append(req)
        self.driver.submit(req)

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        if self.submitted:
            self.driver.cancel(self.submitted[which % len(self.submitted)].id, RequestError("cancelled", "gone"))

    @rule(mode=st.sampled_from(sorted(POLICIES)))
    def switch(self, mode: str) -> None:
        self.driver.switch(POLICIES[mode]())

    @rule()
    def plan(self) -> None:
        if len(self.under_way) < self.depth:
            step = self.driver.next_step()
            self.clock.now += 0.03  # so that static's time-out passes sooner or later
            if step:
                self.contents.compute(step)
                self.plans.append(step.values())
                self.under_way.append(step)
                self.computing[step.id] = {block for row in step.rows for block in row.req.blocks}

    @rule(fails=st.sampled_from([False] * 7 + [True]), which=st.integers(0, 1))
    def complete(self, fails: bool, which: int = 0) -> None:
        if self.under_way:
            step = self.under_way.pop(which % len(self.under_way) if self.limits.lanes == 2 else 0)
            del self.computing[step.id]
            self.clock.now += 1
            tokens = {} if fails else {row.req.id: row.start + row.count for row in step.rows if row.samples}
            error = RuntimeError("the step was told to fail") if fails else None
            if error:
                self.contents.fail(step)
            self.driver.complete(StepResult(step.id, self.clock.now - 1, self.clock.now, tokens, error))

    @invariant()
    def blocks_and_seats_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.blocks
        held = [block for req in self.submitted for block in req.blocks]
        assert self.limits.prefix_caching or len(held) == len(set(held)), "no block belongs to two requests"
        assert Counter(held) == Counter({block: pool.references(block) for block in set(held)})
        assert pool.num_free + len(set(held)) == self.limits.num_blocks, "allocated + free = total"
        assert self.scheduler.num_resident <= self.limits.max_batch_size
        for req in self.submitted:
            assert 0 <= req.num_computed <= req.num_tokens or req.state is State.ANSWERED
            assert req.num_generated <= req.max_tokens
            assert req.num_entered <= len(req.blocks)
            if req.state in (State.WAITING, State.RESIDENT):
                assert req.num_computed <= len(req.blocks) * self.limits.block_size, "no column is counted that is not held"
            if req.state is State.WAITING and not (req.preemptions and req.num_computed):
                assert not req.blocks, "only what has been computed is kept"
            if req.state is State.ANSWERED and not req.in_flight:
                assert not req.blocks, "nothing leaks"

    @invariant()
    def no_block_is_computed_in_two_lanes(self) -> None:
        if hasattr(self, "scheduler") and self.limits.lanes == 2:
            computing = [block for blocks in self.computing.values() for block in blocks]
            assert len(computing) == len(set(computing))

    @invariant()
    def nobody_is_answered_twice_or_wrongly(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert max(Counter(req.id for req in self.answered).values(), default=1) == 1
        for req in self.answered:
            if req.error is None:
                assert req.output == list(range(req.prompt_len, req.prompt_len + len(req.output)))
                assert len(req.output) == req.max_tokens or req.finish_reason == "stop"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            self.plan()
            self.complete(False)
            if not self.scheduler.num_live and not self.under_way:
                break
        assert len(self.answered) == len(self.submitted), "nobody is left unanswered"
        assert self.scheduler.blocks.num_free == self.limits.num_blocks
        again = Plans()
        assert replay(self.log, on_plan=again) == self.plans
        assert (again, again.others) == (self.told, self.told.others)


Machine.TestCase.settings = settings(max_examples=10 * settings.default.max_examples, stateful_step_count=40)
TestMachine = Machine.TestCase
