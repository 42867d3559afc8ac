"""What every policy must keep, whatever its scheme. Run it on a policy of your own:

pytest tests/policies --policy mine.py
"""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policy import Limits, Policy
from batching.request import Priority, Request
from batching.step import Step
from simulator.virtual import PolicyFailed, simulate
from tests.broken_policies import Overreaches, PlansNothing, WritesBooks
from tests.kv_contents import KVContents

workloads = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt tokens
        st.integers(1, 12),  # tokens to generate
        st.integers(1, 12),  # tokens after which it stops
        st.integers(0, 30),  # arrival
        st.sampled_from(Priority),
    ),
    min_size=1,
    max_size=12,
)
engines = st.builds(
    Limits,
    max_batch_size=st.integers(1, 5),
    token_budget=st.integers(5, 40),
    max_prefill_tokens=st.just(64),
    max_context=st.just(40),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(3, 60),
    tbt_slo_ms=st.sampled_from([0.1, 1500, 1e6]),  # a step takes a second: never kept, sometimes, always
    lanes=st.sampled_from([1, 2]),
    prefix_caching=st.booleans(),
)


@pytest.mark.parametrize("broken", [Policy, PlansNothing, Overreaches, WritesBooks])
def test_the_contract_is_not_kept_for_a_broken_policy_by_the_one_that_takes_over(broken: type[Policy]):
    with pytest.raises(PolicyFailed, match=broken.__name__):
        simulate(broken(), Limits(), [Request("a", [0], 1)])


def requests_of(workload) -> list[Request]:
    return [
        Request(
            str(i),
            [0] * prompt,
            longest,
            priority,
            float(arrival),
            stop=None if stop >= longest else lambda req, stop=stop: len(req.output) == stop,
        )
        for i, (prompt, longest, stop, arrival, priority) in enumerate(workload)
    ]


def expected_output(prompt: int, longest: int, stop: int) -> list[int]:
    """Of what was asked for, whatever the request's books say by now."""
    return list(range(prompt, prompt + min(longest, stop)))


@given(workload=workloads, limits=engines, depth=st.sampled_from([1, 2]))
def test_every_request_is_answered_once_with_its_own_tokens(policy_class: type[Policy], workload, limits: Limits, depth: int):
    requests = requests_of(workload)
    steps: list[Step] = []
    answered = simulate(policy_class(), limits, requests, depth=depth, on_step=steps.append)
    assert Counter(req.id for req in answered) == Counter(req.id for req in requests)
    for req, (prompt, longest, stop, _, _) in zip(requests, workload, strict=True):
        if req.error is not None:
            assert req.error.code in ("too_large", "context_length_exceeded", "deadline_missed"), "refused with its reason"
        else:
            assert req.output == expected_output(prompt, longest, stop)
    most_tokens = sum(prompt + longest for prompt, longest, _, _, _ in workload)
    assert len(steps) <= len(requests) * (1 + most_tokens), "liveness"


@given(workload=workloads, limits=engines)
def test_no_step_exceeds_the_engine(policy_class: type[Policy], workload, limits: Limits):
    def check(step: Step) -> None:
        assert len(step.rows) <= limits.max_batch_size
        assert len({row.req for row in step.rows}) == len(step.rows)
        assert step.num_tokens + step.num_padding <= max(limits.token_budget, limits.max_prefill_tokens)
        contents.compute(step)
        for row in step.rows:
            assert max(row.start + row.count + row.pad, row.span) <= len(row.req.blocks) * limits.block_size
            assert row.samples == (row.count > 0 and row.start + row.count == len(row.req.tokens))

    contents = KVContents(limits.block_size)
    simulate(policy_class(), limits, requests_of(workload), on_step=check)


@given(workload=workloads, limits=engines)
def test_overlap_changes_no_plan_where_lengths_alone_end_requests(policy_class: type[Policy], workload, limits: Limits):
    """All there long before the start, no limit on a step's time, steps too short to use up a quantum, no prefix caching:
    overlap plans a step earlier, when an arrival, a time-out, a measured time or a block's becoming complete may still be to
    come."""
    limits = replace(limits, tbt_slo_ms=1e6, lanes=1, prefix_caching=False)
    at_once = [(prompt, longest, longest, -100, priority) for prompt, longest, _, _, priority in workload]
    plans: dict[int, list] = {1: [], 2: []}
    for depth, made in plans.items():
        requests, note = requests_of(at_once), lambda step, made=made: made.append(step.values())
        simulate(policy_class(), limits, requests, lambda step: 1e-6, depth=depth, on_step=note)
    assert plans[1] == plans[2]
