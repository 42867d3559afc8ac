"""What `splitfuse` promises: forwards of one size under a backlog, prompts begun only where they fit, victims at the tail."""

import random

from batching.policies.dynamic import Dynamic
from batching.policies.splitfuse import SplitFuse
from batching.policy import Limits, Policy
from batching.request import Request
from batching.step import Step
from simulator.virtual import simulate
from tests.told import Plans


def limits(**changes: int) -> Limits:
    return Limits(**{"max_batch_size": 4, "token_budget": 8, "max_context": 64, "block_size": 1, "num_blocks": 1000, **changes})


def run(policy: Policy, limits: Limits, requests: list[Request], *plans: Plans) -> tuple[list[Request], list[Step]]:
    steps: list[Step] = []
    return simulate(policy, limits, requests, on_step=steps.append, on_plan=plans[0] if plans else Plans()), steps


def rows(steps: list[Step]) -> list[dict[str, int]]:
    return [{row.req.id: row.count for row in step.rows} for step in steps]


def test_on_simple_input_it_chooses_the_tokens_that_sarathi_and_dynamic_choose():
    requests = [Request("d", [0], 9), Request("P", [0] * 20, 2, arrival=0.5), Request("Q", [0] * 5, 1, arrival=0.5)]
    _, steps = run(SplitFuse(), limits(), requests)
    assert rows(steps)[1:5] == [{"d": 1, "P": 7}, {"d": 1, "P": 7}, {"d": 1, "P": 6, "Q": 1}, {"d": 1, "P": 1, "Q": 4}]


def test_while_there_is_a_backlog_every_forward_has_exactly_the_budget():
    rng = random.Random(3)
    requests = [Request(f"{i}", [0] * rng.randint(1, 40), rng.randint(1, 24)) for i in range(200)]
    _, steps = run(SplitFuse(), limits(max_batch_size=16, token_budget=16), requests)
    admitted: set[str] = set()
    for step in steps:
        admitted |= {row.req.id for row in step.rows}
        if len(admitted) == len(requests):
            break
        assert step.num_tokens == 16
    assert len(steps) > 200


def test_a_prompt_is_begun_only_if_the_kv_of_all_of_it_is_free():
    """12 KV columns. After two steps d holds 5; P has 9 tokens. Dynamic begins P with what there is, has to give it up when d
    grows, and computes 6 of its tokens again."""
    shape = limits(token_budget=4, num_blocks=12)
    lost = {}
    for policy in (SplitFuse(), Dynamic()):
        d, p = Request("d", [0] * 4, 6), Request("P", [0] * 9, 1, arrival=0.5)
        _, steps = run(policy, shape, [d, p])
        lost[type(policy)] = p.lost, "P" in rows(steps)[1]
        assert p.output == [9]
    assert lost == {SplitFuse: (0, False), Dynamic: (6, True)}


def test_a_victim_goes_to_the_tail_and_comes_back_as_a_prompt_with_what_it_had_generated():
    """Four blocks of four. B gives way to A in the third step, and waits behind C, where `dynamic` puts it in front."""
    orders = {}
    for policy in (SplitFuse(), Dynamic()):
        requests = [Request(name, [0] * 7, 5) for name in "ABC"]
        engine, plans = limits(max_batch_size=3, token_budget=16, block_size=4, num_blocks=4), Plans()
        answered, steps = run(policy, engine, requests, plans)
        assert plans[2].preempted == ("B",)
        orders[type(policy)] = [req.id for req in answered]
        assert all(req.output == [7, 8, 9, 10, 11] for req in answered)
        again = [count["B"] for count in rows(steps)[3:] if "B" in count]
        assert again == [9, 1, 1]
    assert orders == {SplitFuse: ["A", "C", "B"], Dynamic: ["A", "B", "C"]}
