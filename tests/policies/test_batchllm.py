"""What `batchllm` promises, in virtual time: the prefill that shared prefixes allow to save is saved, whatever the memory."""

import pytest

from batching.blocks import chain
from batching.plan import shareable
from batching.policies.batchllm import BatchLLM
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed
from batching.policy import Limits, Policy
from batching.request import Priority, Request
from batching.step import Step
from simulator.virtual import simulate
from tests.told import Plans

BLOCK = 16


def limits(**changes: int) -> Limits:
    return Limits(**{"block_size": BLOCK, "num_blocks": 2000, "token_budget": 256, "prefix_caching": True} | changes)


def families(count: int = 12, members: int = 8, prefix: int = 128, own: int = 24) -> list[Request]:
    """All there at the start, in turn one of each family: the next of the same comes when all others have had their turn."""
    return [
        Request(
            f"{family}-{member}",
            [family] * prefix + [1000 + member] * own,
            8 + 4 * (family % 3) + member,
            Priority.DEFERRED,
        )
        for member in range(members)
        for family in range(count)
    ]


def run(policy: Policy, requests: list[Request], engine: Limits, plans: Plans | None = None) -> list[Step]:
    steps: list[Step] = []
    answered = simulate(policy, engine, requests, on_step=steps.append, on_plan=Plans() if plans is None else plans)
    assert [req for req in answered if req.error] == []
    return steps


def prefilled(steps: list[Step]) -> int:
    """Prompt tokens computed, those computed again included."""
    return sum(max(0, min(row.start + row.count, row.req.prompt_len) - row.start) for step in steps for row in step.rows)


def fewest(requests: list[Request]) -> int:
    """Prompt tokens that have to be computed if no full block is computed twice."""
    keys = [chain([], req.tokens, BLOCK)[: shareable(len(req.tokens), BLOCK)] for req in requests]
    saved = sum(map(len, keys)) - len({key for path in keys for key in path})
    return sum(len(req.tokens) for req in requests) - saved * BLOCK


@pytest.mark.parametrize("blocks", [2000, 64], ids=["memory for all", "memory for four families"])
def test_the_prefill_that_shared_prefixes_allow_to_save_is_saved(blocks: int):
    logical, least = 96 * 152, fewest(families())
    assert 1 - least / logical == pytest.approx(0.737, abs=1e-3), "12 * 128 + 96 * 24 of 96 * 152"
    plans = Plans()
    steps = run(BatchLLM(), families(), limits(num_blocks=blocks), plans)
    assert prefilled(steps) == least
    assert sum(len(plan.preempted) for plan in plans) == 0


def test_first_come_first_served_loses_prefixes_before_their_next_request_comes():
    logical = 96 * 152
    steps = run(Dynamic(), families(), limits(num_blocks=64))
    assert prefilled(steps) > 0.9 * logical, "evicted each time"
    steps = run(Dynamic(), families(), limits())
    assert prefilled(steps) == pytest.approx(fewest(families()), rel=0.1), "the cache alone will do where memory is plenty"


def test_mixed_profits_where_requests_that_begin_alike_are_due_together():
    together = [Request(req.id, req.tokens, req.max_tokens, Priority.DEFERRED, due=900.0) for req in families()]
    steps = run(Mixed(), together, limits(num_blocks=64))
    assert prefilled(steps) < 1.2 * fewest(families())


def test_a_group_runs_together_and_its_first_alone_computes_the_prefix():
    plans = Plans()
    steps = run(BatchLLM(), families(count=2, members=3), limits(max_batch_size=64), plans)
    assert [(row.req.id, row.start) for row in steps[0].rows] == [("1-0", 0), ("0-0", 0)]
    second = {row.req.id: (row.start, row.cached) for row in steps[1].rows}
    assert second["1-1"] == second["1-2"] == (128, 128)
    assert plans[0].reasons["1-1"] == "waits: a request that runs computes its prefix"


def test_groups_with_the_most_decoding_for_their_prefill_come_first():
    """Decode to prefill: 30 / 182, 90 / 182 and, since a prompt of its own is a group too, 20 / 40."""

    def of(name: str, output: int) -> list[Request]:
        tokens = [ord(name)] * 128
        return [Request(f"{name}{i}", [*tokens, *[i] * 27], output) for i in range(2)]

    requests = [*of("a", 15), *of("b", 45), Request("c", [9] * 40, 20)]
    steps = run(BatchLLM(), requests, limits(max_batch_size=1, token_budget=512))
    order = list(dict.fromkeys(row.req.id for step in steps for row in step.rows))
    assert order == ["c", "b0", "b1", "a0", "a1"]


def test_a_request_joins_only_where_all_the_memory_it_may_come_to_need_is_free():
    """Each needs 3 blocks at its longest and 1 to begin with: 7 blocks hold two of them."""
    requests = [Request(str(i), [i] * 10, 33) for i in range(3)]
    plans, preempting = Plans(), Plans()
    steps = run(BatchLLM(), requests, limits(num_blocks=7), plans)
    assert [row.req.id for row in steps[0].rows] == ["0", "1"]
    assert plans[0].reasons["2"] == "waits: too few KV blocks are free"
    assert not any(plan.preempted for plan in plans)
    run(Dynamic(), [Request(str(i), [i] * 10, 33) for i in range(3)], limits(num_blocks=7), preempting)
    assert any(plan.preempted for plan in preempting)


def test_a_request_that_comes_later_joins_the_rest_of_its_group():
    requests = [*families(count=2, members=2), Request("late", [1] * 128 + [5] * 8, 4, arrival=0.5)]
    steps = run(BatchLLM(), requests, limits(max_batch_size=1))
    order = list(dict.fromkeys(row.req.id for step in steps for row in step.rows))
    assert order == ["1-0", "1-1", "late", "0-0", "0-1"]


def test_without_the_cache_it_still_answers_all():
    steps = run(BatchLLM(), families(), limits(prefix_caching=False))
    assert prefilled(steps) == 96 * 152
