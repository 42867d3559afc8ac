"""`deadline` against the optimum of its semi-Markov decision process, and the optimum against cases that are known."""

from functools import cache

import pytest

from simulator.tables import Table, ceng523
from teaching.examples.deadline import ACCURACIES, DEADLINE_S, PRICE, online, outcome, run
from teaching.examples.optimum import Optimum, Problem, Solution, solve

LOADS = (100, 200, 350)  # requests a second: LLM-1, LLM-2 and LLM-3 are the most accurate models that keep up
REQUESTS = 6_000


@cache
def solution(rate: int) -> Solution:
    return solve(Problem(rate, DEADLINE_S, ceng523(), ACCURACIES, PRICE, tick_s=0.001, most=56))


@pytest.mark.parametrize("rate", LOADS)
def test_deadline_earns_95_percent_of_the_optimum(rate: int):
    earned = outcome(run(online(), ceng523(), rate, REQUESTS)).reward
    assert earned >= 0.95 * solution(rate).gain
    assert earned <= 1.01 * solution(rate).gain, "or the optimum is none"


@pytest.mark.parametrize("rate", LOADS)
def test_the_optimal_policy_earns_in_virtual_time_what_the_process_says(rate: int):
    earned = outcome(run(Optimum(solution(rate)), ceng523(), rate, REQUESTS)).reward
    assert earned == pytest.approx(solution(rate).gain, rel=0.01)


def test_with_next_to_no_load_the_optimum_is_the_best_model():
    assert solve(Problem(5, 0.1, ceng523(), ACCURACIES, PRICE, most=20)).gain == pytest.approx(1, abs=0.002)


def test_the_optimum_of_one_model_without_a_queue_is_erlangs_loss_formula():
    """A service takes all the time there is, so that nobody can wait: whoever finds the device busy is lost (M/G/1/1)."""
    alone = solve(Problem(20, 0.050, [Table({1: 50.0})], (1.0,), 0.0, most=8))
    assert alone.gain == pytest.approx(1 / (1 + 20 * 0.050), rel=0.01)


def test_who_cannot_be_served_is_dropped_at_its_price():
    assert solve(Problem(20, 0.050, [Table({1: 51.0})], (1.0,), 0.5, most=8)).gain == pytest.approx(-0.5, rel=0.01)
