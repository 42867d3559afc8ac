"""What `sarathi` promises: no decode is ever held back, and no prompt makes a step longer than the limit between tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policies.dynamic import Dynamic
from batching.policies.orca import Orca
from batching.policies.sarathi import Sarathi, SarathiParams
from batching.policy import Limits
from batching.request import Request
from batching.step_time import Load
from tests.policies.machine import a_gpt, a_millisecond_a_token, serve

EIGHT_TOKENS_MS = (
    8.7  # of a machine that takes a millisecond for each, with room for what the model adds to be on the safe side
)


def sarathi(tbt_slo_ms: float) -> Sarathi:
    return Sarathi(SarathiParams(tbt_slo_ms=tbt_slo_ms))


def limits(**changes: int) -> Limits:
    return Limits(
        **{"max_batch_size": 4, "token_budget": 64, "max_context": 64, "block_size": 1, "num_blocks": 1000, **changes}
    )


def test_decodes_come_first_then_the_unfinished_prefill_then_new_requests():
    requests = [
        Request("d", [0], 9),
        Request("P", [0] * 20, 2, arrival=0.0005),
        Request("Q", [0] * 5, 1, arrival=0.0005),
    ]
    run = serve(sarathi(EIGHT_TOKENS_MS), limits(), requests, a_millisecond_a_token)
    assert run.rows()[1:5] == [{"d": 1, "P": 7}, {"d": 1, "P": 7}, {"d": 1, "P": 6, "Q": 1}, {"d": 1, "P": 1, "Q": 4}]


workloads = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 60)), min_size=1, max_size=10)


@given(workload=workloads, num_blocks=st.integers(42, 120))
def test_with_the_same_budget_dynamic_makes_the_same_plans(workload: list[tuple[int, int, int]], num_blocks: int):
    plans = []
    for policy, budget in ((sarathi(EIGHT_TOKENS_MS), 64), (Dynamic(), 8)):
        requests = [Request(str(i), [0] * p, n, arrival=at / 1e3) for i, (p, n, at) in enumerate(workload)]
        run = serve(policy, limits(token_budget=budget, num_blocks=num_blocks), requests, a_millisecond_a_token)
        plans.append([step.values() for step in run.steps])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(("slo_s", "chunk"), [(0.05, 118), (0.1, 266)])
def test_the_budget_is_the_largest_that_ends_in_time(slo_s: float, chunk: int):
    """Beside ten decodes a step takes 13 ms, and for n prompt tokens 0.3 n + 0.0001 n^2 ms more."""
    decodes = [Request(f"d{i}", [0], 50) for i in range(10)]
    run = serve(
        sarathi(1e3 * slo_s),
        limits(max_batch_size=16, token_budget=512, max_context=2048, num_blocks=4000),
        [*decodes, Request("P", [0] * 1000, 1, arrival=0.02)],
    )
    first = next(step for step in run.steps if any(row.req.id == "P" for row in step.rows))
    assert len(first.rows) == 11
    assert 0.96 * chunk <= first.rows[-1].count <= chunk


def longest_gap_s(requests: list[Request]) -> float:
    return max(
        later - earlier for req in requests for earlier, later in zip(req.token_times, req.token_times[1:], strict=False)
    )


def test_itl_stays_flat_under_a_long_prompt_where_orca_stalls():
    """A prompt of 1000 tokens takes 0.4 s by itself. It comes while eight others are in the middle of their texts."""
    slo_s, gaps, ttft = 0.05, {}, {}
    for policy in (sarathi(1e3 * slo_s), Orca()):
        talking = [Request(f"d{i}", [0] * 20, 100) for i in range(8)]
        long = Request("long", [0] * 1000, 10, arrival=0.5)
        engine = Limits(max_batch_size=16, token_budget=512, max_context=2048, num_blocks=400)
        serve(policy, engine, [*talking, long], a_gpt)
        gaps[type(policy)] = longest_gap_s(talking)
        ttft[type(policy)] = long.token_times[0] - long.arrival
    assert gaps[Sarathi] <= slo_s
    assert gaps[Orca] > 8 * slo_s
    assert ttft[Orca] < ttft[Sarathi] < 2 * ttft[Orca], "what it costs: the prompt shares its steps"


def test_a_chunk_behind_a_cached_prefix_counts_what_it_attends_to():
    """2000 cached columns: 500 tokens behind them take 0.1 s more than they do alone."""

    def law(load: Load) -> float:
        return 0.002 + 1e-5 * load.prefill + 1e-4 * load.decodes + 1e-7 * load.kv + 1e-7 * load.products

    engine = Limits(max_batch_size=8, max_context=4096, num_blocks=2000, prefix_caching=True)
    requests = [
        Request("first", [1] * 2000, 1),
        Request("decodes", [2] * 4, 400, arrival=1.0),
        Request("behind", [1] * 2000 + [3] * 600, 1, arrival=1.2),
    ]
    run = serve(sarathi(50), engine, requests, law)
    behind = [step for step in run.steps if step.rows[-1].req.id == "behind"]
    assert behind[0].rows[-1].start == 2000
    assert max(law(step.load) for step in behind) <= 0.05


def test_a_limit_that_cannot_be_kept_stops_neither_decodes_nor_prompts():
    requests = [Request(f"{i}", [0] * 30, 20, arrival=0.01 * i) for i in range(6)]
    run = serve(sarathi(0.01), limits(), requests)
    assert [len(req.output) for req in run.answered] == [20] * 6
    for step, later in zip(run.steps, run.steps[1:], strict=False):
        decoding = {row.req.id for row in step.rows if row.samples and row.start + row.count + 1 < 50}
        assert decoding <= {row.req.id for row in later.rows}, "each gets its token in each step"


def test_without_a_limit_of_its_own_it_keeps_the_engines():
    engine = Limits(max_batch_size=4, token_budget=64, max_context=64, num_blocks=100, tbt_slo_ms=EIGHT_TOKENS_MS)
    run = serve(Sarathi(), engine, [Request("P", [0] * 20, 1)], a_millisecond_a_token)
    assert run.rows() == [{"P": 8}, {"P": 8}, {"P": 4}]


def test_a_limit_out_of_its_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"tbt_slo_ms: must lie between 0 and 3\.6e\+06, not -1"):
        Sarathi.from_arguments({"tbt_slo_ms": -1})
