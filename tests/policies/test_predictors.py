"""What each predictor says, and what it learns."""

from statistics import fmean, pstdev

import pytest

from batching.policies.support.predictors import PREDICTORS, NoisyOracle, Oracle, RunningMean
from batching.request import Request


def request(name: str = "a", most: int = 100, length: int | None = None) -> Request:
    return Request(name, [0], most, output_len=length)


def test_an_oracle_knows_the_true_length_where_the_workload_does():
    assert Oracle().predict(request(length=30)) == 30
    assert Oracle().predict(request()) == 100, "what is asked for is what it gets, unless a stop is met"
    assert Oracle().predict(request(length=300)) == 100


def test_a_noisy_oracle_is_off_by_its_relative_error_and_always_by_the_same():
    noisy = NoisyOracle(0.2)
    guesses = [noisy.predict(request(str(i), most=10**6, length=1000)) for i in range(2000)]
    assert fmean(guesses) == pytest.approx(1000, rel=0.02)
    assert pstdev(guesses) == pytest.approx(200, rel=0.1)
    assert guesses[:50] == [NoisyOracle(0.2).predict(request(str(i), most=10**6, length=1000)) for i in range(50)]
    assert NoisyOracle(0.0).predict(request(length=30)) == 30


def test_a_running_mean_knows_nothing_at_first_and_then_the_mean_of_the_lengths_it_was_told():
    mean = RunningMean()
    assert mean.predict(request()) == 100
    for length in (10, 20, 60):
        finished = request()
        finished.tokens += [0] * length
        mean.learn(finished)
    assert mean.predict(request()) == 30
    assert mean.predict(request(most=5)) == 5


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_prediction_is_never_less_than_one_nor_more_than_was_asked_for(name: str):
    predictor = PREDICTORS[name](5.0)
    for i in range(200):
        assert 1 <= predictor.predict(request(str(i), most=20, length=1 + i % 20)) <= 20
