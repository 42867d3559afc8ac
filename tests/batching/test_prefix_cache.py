"""Prefix caching: the example of vLLM's design note, the bugs that other engines had, and the planner's arithmetic of blocks
that several requests hold."""

import pytest

from batching.blocks import BlockPool, chain
from batching.driver import Driver
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed
from batching.policies.orca import Orca
from batching.policy import Limits, Plan, PlanError, Policy, RequestView, View
from batching.replay import replay
from batching.request import Priority, Request, RequestError, State
from batching.scheduler import Scheduler
from batching.step import Row, Step
from batching.step_time import StepTime
from simulator.virtual import VirtualClock, VirtualExecutor, simulate
from tests.kv_contents import KVContents
from tests.told import Plans

A, B = (1,) * 8, (2,) * 8


def limits(**changes: int) -> Limits:
    given = {"max_batch_size": 4, "token_budget": 64, "max_prefill_tokens": 64, "max_context": 64, "block_size": 4}
    return Limits(**given | {"num_blocks": 64, "prefix_caching": True} | changes)


class Run:
    """Serves what is submitted, and keeps each step's rows with the blocks that they had."""

    def __init__(self, policy: Policy | None = None, depth: int = 1, failing: tuple[int, ...] = (), **changes: int) -> None:
        self.limits = limits(**changes)
        self.log: list[dict] = []
        clock = VirtualClock()
        self.plans = Plans()
        scheduler = Scheduler(policy or Dynamic(), self.limits)
        self.driver = Driver(scheduler, clock, lambda req: None, self.log.append, on_plan=self.plans)
        self.contents = KVContents(self.limits.block_size)
        self.steps: list[Step] = []
        self.blocks: list[dict[str, list[int]]] = []
        self.executor = VirtualExecutor(clock, self._step, depth, failing)

    def _step(self, step: Step) -> float:
        self.contents.compute(step)
        self.steps.append(step)
        self.blocks.append({row.req.id: list(row.req.blocks) for row in step.rows})
        return 1.0

    def serve(self, *requests: Request) -> "Run":
        for req in requests:
            self.driver.submit(req)
        while self.driver.iterate(self.executor) is not None:
            pass
        return self

    def rows(self, name: str) -> list[Row]:
        return [row for step in self.steps for row in step.rows if row.req.id == name]

    def admitted(self, name: str) -> Row:
        """The row with which a request was seated last."""
        return [row for row in self.rows(name) if row.cached is not None][-1]


# The blocks.


def test_a_key_stands_for_its_block_and_all_before_it():
    assert chain([], [1, 2, 3], 4) == [], "full blocks only"
    one, two = chain([], [1, 2, 3, 4, 5, 6], 3)
    assert chain([], [1, 2, 3, 9, 5, 6], 3) == [one, chain([], [1, 2, 3, 9, 5, 6], 3)[1]]
    assert chain([], [9, 2, 3, 4, 5, 6], 3)[1] != two, "the same tokens behind others"
    assert chain([one], [1, 2, 3, 4, 5, 6], 3) == [one, two], "as far as they are known they are not computed again"


def test_blocks_are_handed_out_least_recently_used_first_and_the_end_of_a_sequence_before_its_beginning():
    """vLLM's design note: block 4, ten blocks."""
    pool = BlockPool(10, 4)
    req0 = pool.allocate(4)
    keys = chain([], list(range(12)), 4)
    for key, block in zip(keys, req0, strict=False):
        pool.enter(key, block)
    req0 += pool.allocate(1)
    pool.share(hit := pool.find(keys[:2]))
    req1 = hit + pool.allocate(2)
    assert (req0, req1) == ([0, 1, 2, 3, 4], [0, 1, 5, 6])
    pool.free(req0)
    assert pool.num_free == 10 - len(req1), "what req1 holds is not free"
    pool.free(req1)
    assert pool.find(keys) == [0, 1, 2], "free blocks can still be found"
    assert pool.allocate(10) == [7, 8, 9, 4, 3, 2, 6, 5, 1, 0]
    assert pool.find(keys) == [], "until they are handed out"


def test_the_first_block_with_a_key_keeps_it():
    pool = BlockPool(4, 4)
    first, second = pool.allocate(2)
    pool.enter(b"key", first)
    pool.enter(b"key", second)
    assert pool.find([b"key"]) == [first]
    pool.free([second])
    pool.allocate(3)
    assert pool.find([b"key"]) == [first]


def test_a_shared_block_is_not_freed_more_often_than_it_is_held():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    pool.free(blocks)
    with pytest.raises(ValueError, match="block 0 freed twice"):
        pool.free(blocks)


# The whole engine, in virtual time.


def test_the_example_of_the_design_note_on_the_scheduler():
    shared = list(range(100, 112))
    req0 = Request("req0", [*shared, 1, 2, 3], 4)  # decodes on into a fifth block
    req1 = Request("req1", [*shared[:10], 7, 7, 7, 7], 2)
    req2 = Request("req2", [*shared, *range(17)], 1)
    run = Run(num_blocks=10)
    run.driver.submit(req0)
    for _ in range(3):
        run.driver.iterate(run.executor)
    run.serve(req1).serve(req2)
    assert run.blocks[2]["req0"] == [0, 1, 2, 3, 4]
    assert run.blocks[3]["req1"] == [0, 1, 5, 6]
    assert run.admitted("req1").cached == 8
    assert run.blocks[-1]["req2"] == [0, 1, 2, 7, 8, 9, 4, 3]
    assert (run.rows("req2")[0].start, run.rows("req2")[0].count) == (12, 17)


@pytest.mark.parametrize("policy", [Dynamic, Mixed, POLICIES["batchllm"]])
def test_a_full_hit_computes_its_last_full_block_again(policy: type[Policy]):
    run = Run(policy()).serve(Request("a", [*A], 3)).serve(Request("b", [*A], 3))
    first = run.rows("b")[0]
    assert (first.start, first.count, first.cached, first.samples) == (4, 4, 4, True)
    assert first.req.output == [8, 9, 10]


def test_a_block_that_is_being_computed_is_not_hit():
    run = Run().serve(Request("a", [*A] * 2, 1), Request("b", [*A] * 2, 1))
    assert [row.cached for row in run.steps[0].rows] == [0, 0], "both in one step"
    run = Run(token_budget=8)
    run.driver.submit(Request("a", [*A] * 2, 1))
    run.driver.iterate(run.executor)
    run.serve(Request("b", [*A] * 2, 1))
    assert [(row.start, row.count) for row in run.rows("a")] == [(0, 8), (8, 8)]
    assert run.admitted("b").cached == 12, "after the second chunk; one token is left to compute"


def test_with_overlap_a_block_can_be_hit_once_its_step_is_complete_and_not_when_it_is_planned():
    run = Run(depth=2, token_budget=12)
    run.serve(Request("a", [*A], 9), Request("b", [*B], 1), Request("c", [*A], 1))
    second = run.steps[1].rows
    assert {row.req.id: row.cached for row in second} == {"a": None, "b": None, "c": 0}
    run.serve(Request("d", [*A], 1))
    assert run.admitted("d").cached == 4


def test_what_a_failed_step_has_written_is_never_hit():
    for depth in (1, 2):
        run = Run(depth=depth, failing=(1,)).serve(Request("a", [*A], 3)).serve(Request("b", [*A], 3))
        assert run.rows("a")[0].req.error is not None
        assert run.admitted("b").cached == 0


def test_a_preempted_request_hits_its_own_blocks_and_computes_the_rest_again():
    """Block 4, four blocks: A takes the second of B's, and leaves it the first."""
    run = Run(num_blocks=4).serve(Request("A", [1] * 7, 5), Request("B", [2] * 7, 5))
    assert run.plans[2].preempted == ("B",)
    again = run.admitted("B")
    assert (again.start, again.count, again.cached) == (4, 5, 4)
    assert again.req.output == [7, 8, 9, 10, 11]
    stats = run.driver.stats.summary(0, live=False)
    assert stats["recomputed_tokens"] == 4
    assert stats["prefix_cache_queries"] == 14, "of new requests, as vLLM counts"
    assert stats["prefix_cache_hits"] == 0


@pytest.mark.parametrize("prompt", range(1, 13))
def test_a_preempted_request_that_finds_all_its_blocks_stays_within_them(prompt: int):
    """Preempted by an immediate one for its seat: memory is not short, so all that it had computed is still there."""
    deferred = Request("later", [1] * prompt, 12, Priority.DEFERRED)
    for steps in range(1, 9):
        run = Run(Mixed(), max_batch_size=1)
        deferred = Request("later", [1] * prompt, 12, Priority.DEFERRED)
        run.driver.submit(deferred)
        for _ in range(steps):
            run.driver.iterate(run.executor)
        computed = prompt + steps - 1
        run.serve(Request("now", [2], 1))
        again = run.admitted("later")
        assert deferred.preemptions == 1
        assert again.start == again.cached == computed // 4 * 4
        assert again.start + again.count == computed + 1
        assert deferred.output == list(range(prompt, prompt + 12))


def test_a_free_block_that_one_request_shares_is_not_handed_out_to_another_of_the_same_plan():
    """Four blocks, and b's prefix is in the second to be handed out."""
    run = Run(num_blocks=4, max_batch_size=2)
    run.serve(Request("s", [1] * 5, 1)).serve(Request("t", [2] * 7, 1))
    run.serve(Request("a", [3] * 5, 1), Request("b", [1] * 5, 1))
    assert run.blocks[-1] == {"a": [1, 3], "b": [0, 2]}


def test_shared_blocks_leave_room_for_more_requests():
    """Each needs three blocks of six; with the prefix shared, four of them do."""
    requests = [Request(str(i), [*A, i], 3) for i in range(5)]
    run = Run(num_blocks=6).serve(requests[0])
    run.serve(*requests[1:])
    assert [row.req.id for row in run.steps[3].rows] == ["1", "2", "3", "4"]
    assert not any(req.preemptions for req in requests)


def test_modes_that_run_whole_prompts_do_not_look():
    run = Run(Orca()).serve(Request("a", [*A], 2)).serve(Request("b", [*A], 2))
    assert [row.cached for step in run.steps for row in step.rows] == [None] * 4
    assert run.driver.stats.summary(0, live=False)["prefix_cache_hit_rate"] is None


def test_without_the_setting_nothing_is_looked_up_or_shared():
    run = Run(prefix_caching=False).serve(Request("a", [*A], 2)).serve(Request("b", [*A], 2))
    assert [row.start for row in run.rows("b")] == [0, 8]
    assert run.driver.stats.summary(0, live=False)["prefix_cache_queries"] == 0


def test_a_mode_begins_with_an_empty_cache():
    run = Run().serve(Request("a", [*A], 2))
    run.driver.switch(Dynamic())
    run.serve(Request("b", [*A], 2))
    assert run.admitted("b").cached == 0


def test_the_log_probabilities_of_a_prompt_are_computed_and_the_replay_knows_it():
    run = Run().serve(Request("a", [*A], 2)).serve(Request("b", [*A], 2, prompt_logprobs=True), Request("c", [*A], 2))
    assert run.rows("b")[0].start == 0
    assert run.rows("c")[0].start == 4
    assert replay(run.log) == [step.values() for step in run.steps]


def test_generated_tokens_are_a_prefix_too():
    """A dialogue: the second prompt is the first, its answer, and more."""
    run = Run().serve(first := Request("first", [*A], 9))
    run.serve(Request("second", [*first.tokens, 5, 5, 5], 2))
    assert run.admitted("second").cached == 16, "17 tokens, the last of which was never fed back"
    assert (list(first.blocks), first.num_entered) == ([], 0), "what it held is the cache's"


def test_a_cancelled_request_leaves_the_blocks_that_were_complete():
    run = Run(token_budget=8)
    run.driver.submit(Request("a", [*A] * 3, 5))
    run.driver.iterate(run.executor)
    run.driver.cancel("a", RequestError("cancelled", "gone"))
    run.serve(Request("b", [*A] * 3, 1))
    assert run.admitted("b").cached == 8


def test_stats_and_step_records_tell_the_hits():
    run = Run().serve(Request("a", [*A], 1)).serve(Request("b", [*A, 5, 5], 1))
    stats = run.driver.stats.summary(0, live=False)
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (18, 8)
    assert stats["prefix_cache_hit_rate"] == pytest.approx(8 / 18)
    assert stats["tokens_computed"] == 10
    run.driver.steps.publish()
    assert '"cached":8' in run.driver.steps.read(0, 10)[1][1]


# Who waits for a prefix.


def test_under_mixed_a_deferred_request_waits_for_the_prefix_that_another_computes():
    later = [Request(str(i), [*A, *A, i], 2, Priority.DEFERRED) for i in range(3)]
    run = Run(Mixed(), token_budget=8).serve(*later)
    assert [[row.req.id for row in step.rows] for step in run.steps[:2]] == [["0"], ["0"]]
    assert run.plans[0].reasons == dict.fromkeys("12", "waits: a request that runs computes its prefix")
    assert [run.admitted(name).cached for name in "012"] == [0, 16, 16]
    assert run.driver.stats.summary(0, live=False)["tokens_computed"] == 17 + 2 * 1 + 3


def test_immediate_requests_wait_for_nobodys_prefix():
    run = Run(Mixed()).serve(Request("a", [*A], 2), Request("b", [*A], 2))
    assert [row.req.id for row in run.steps[0].rows] == ["a", "b"]


# A plan's arithmetic.


def resident(name: str, *blocks: int) -> RequestView:
    req = Request(name, [0] * 4 * len(blocks), 5)
    req.blocks.extend(blocks)
    req.num_computed, req.state = 4 * len(blocks) - 1, State.RESIDENT
    return RequestView(req)


def view_of(pool: BlockPool, residents: list[RequestView], waiting: list[RequestView], hits: list[int]) -> View:
    found = {"cached_prefix": lambda req: hits, "references": pool.references}
    return View(waiting, residents, (), limits(), pool.num_free, 2, [StepTime()], **found)


def two_that_share() -> tuple[BlockPool, list[RequestView]]:
    pool = BlockPool(8, 4)
    first, second = pool.allocate(2), pool.allocate(1)
    pool.share(first[:1])
    return pool, [resident("a", *first), resident("b", first[0], *second)]


def test_preempting_frees_what_nobody_else_holds():
    pool, (a, b) = two_that_share()
    plan = Plan(view_of(pool, [a, b], [], []))
    assert plan.free_blocks == 5
    plan.preempt(a)
    assert plan.free_blocks == 6, "the other of its two is b's as well"
    plan.preempt(b)
    assert plan.free_blocks == 8


def test_a_hit_takes_a_free_block_off_the_list_and_preempting_gives_it_back():
    pool, (a, _) = two_that_share()
    waiting = RequestView(Request("c", [0] * 10, 1))
    hits = [5, 6]  # both free
    view = view_of(pool, [a], [waiting], hits)
    plan = Plan(view)
    assert plan.run(waiting) == 2, "behind the two blocks"
    assert plan.free_blocks == 5 - 2 - 1
    assert plan.load.prefill == 2
    plan.preempt(waiting)
    assert (plan.free_blocks, plan.free_slots, plan.budget) == (5, 2, 64)
    plan.preempt(a)
    assert plan.free_blocks == 6
    plan.check(view)
    assert plan.preempted == (a,)


def test_a_hit_on_the_blocks_of_a_request_that_this_plan_preempts_keeps_them():
    pool, (a, b) = two_that_share()
    waiting = RequestView(Request("c", [0] * 9, 1))
    view = view_of(pool, [a, b], [waiting], list(a.blocks))
    plan = Plan(view)
    plan.preempt(a)
    plan.preempt(b)
    assert plan.run(waiting) == 1
    assert plan.free_blocks == 8 - 2 - 1
    plan.check(view)
    assert plan._rows[waiting].shared == list(a.blocks)


def test_a_request_with_a_hit_is_refused_if_free_blocks_that_it_would_hold_leave_too_few():
    pool = BlockPool(3, 4)
    pool.allocate(1)
    view = view_of(pool, [], [waiting := RequestView(Request("c", [0] * 12, 1))], [1])
    plan = Plan(view)
    assert plan.run(waiting) == 0, "one block shared, two more to fill, two free of which one is the shared one"
    assert plan.refusal == "blocks"


def test_a_policy_that_reaches_past_the_plan_cannot_have_a_shared_block_overwritten():
    pool = BlockPool(3, 4)
    pool.allocate(1)
    view = view_of(pool, [], [waiting := RequestView(Request("c", [0] * 12, 1))], [1])
    plan = Plan(view)
    plan.free_blocks = 10**9
    plan.run(waiting)
    with pytest.raises(PlanError, match="no more blocks than are free"):
        plan.check(view)


def test_random_workloads_read_only_what_is_theirs():
    """Prompts of a few families, memory for a fifth of them."""
    for seed in range(30):
        contents = KVContents(4)
        requests = [
            Request(f"{i}", [(i * seed) % 3] * (3 + i % 7) + [i % 2] * (i % 9), 1 + i % 6, arrival=float(i // 3))
            for i in range(30)
        ]
        answered = simulate(Dynamic(), limits(num_blocks=8), requests, depth=1 + seed % 2, on_step=contents.compute)
        assert len(answered) == 30
