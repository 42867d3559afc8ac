"""The plan: what one seed decides, and what it leaves alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from client.shared.plan import PlannedRequest
from client.workload import OPENINGS, Workload, make_plan

LENGTHS = (1, 25, 50, 100)


def plan_of(
    count: int, wait_s: float, lengths: tuple[int, ...], selection: str = "random", deferred_share: float = 0.0, seed: int = 0
) -> tuple[PlannedRequest, ...]:
    workload = Workload(count, seed, wait_s, output_lengths=lengths, selection=selection, deferred_share=deferred_share)
    return make_plan(workload).requests


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan_of(50, 1.0, LENGTHS, deferred_share=0.3, seed=7) == plan_of(50, 1.0, LENGTHS, deferred_share=0.3, seed=7)


def test_another_seed_gives_another_plan() -> None:
    assert plan_of(50, 1.0, LENGTHS, seed=7) != plan_of(50, 1.0, LENGTHS, seed=8)


def test_descend_is_the_draw_of_random_longest_first() -> None:
    drawn = [request.num_tokens for request in plan_of(40, 1.0, LENGTHS, "random", seed=3)]
    sorted_plan = [request.num_tokens for request in plan_of(40, 1.0, LENGTHS, "descend", seed=3)]
    assert drawn != sorted_plan
    assert sorted_plan == sorted(drawn, reverse=True)


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (0.25, 3), (0.5, 5), (0.333, 3), (0.05, 1), (1, 10)])
def test_the_deferred_share_is_exact_by_rounding_half_up(share: float, expected: int) -> None:
    plan = plan_of(10, 0.0, LENGTHS, deferred_share=share)
    assert sum(request.priority == "deferred" for request in plan) == expected
    assert {request.priority for request in plan} <= {"immediate", "deferred"}


def test_the_first_request_leaves_at_once_and_each_gap_is_at_most_the_wait() -> None:
    times = [request.at_s for request in plan_of(200, 0.5, LENGTHS)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0.0
    assert max(gaps) <= 0.5
    assert math.isclose(sum(gaps) / len(gaps), 0.25, rel_tol=0.2)


def test_changing_the_lengths_or_the_share_moves_no_send_time_prompt_or_seed() -> None:
    plain = plan_of(30, 1.0, LENGTHS)
    other = plan_of(30, 1.0, (5,), "descend", deferred_share=0.5)
    assert [(r.at_s, r.prompt, r.seed) for r in plain] == [(r.at_s, r.prompt, r.seed) for r in other]


def test_lengths_and_prompts_come_from_the_lists_given() -> None:
    plan = plan_of(200, 0.0, LENGTHS)
    assert {request.num_tokens for request in plan} == set(LENGTHS)
    assert {request.prompt for request in plan} == set(OPENINGS)


def test_a_body_leaves_the_sampling_to_the_server() -> None:
    assert plan_of(1, 0.0, [25])[0].body().keys() == {"prompt", "num_tokens", "priority", "seed"}
