"""Queueing theory as an oracle that nobody here wrote: policies that are textbook queues give the textbook's waiting times.

Each simulated mean comes with its standard error, estimated from batch means (consecutive requests are not independent); it has
to be small, and theory within four of them.
"""

import math
import random

import numpy as np
import pytest

from batching.policies.nobatch import NoBatch
from batching.policies.static import Static, StaticParams
from batching.policy import Limits, Policy
from batching.request import Request
from batching.step import Step
from simulator.results import Results
from simulator.virtual import OpenLoop, Replica, StepTimeOf, serve

REQUESTS, BATCHES = 40_000, 40
TOLERATED = 0.05  # standard error, as a share of the mean


def times_in_system(policy: Policy, limits: Limits, rate: float, step_time: StepTimeOf, seed: int) -> np.ndarray:
    """From arrival to answer, by arrival, of requests of one token each that come as a Poisson process."""
    rng, at = random.Random(seed), 0.0
    requests = []
    for index in range(REQUESTS):
        at += rng.expovariate(rate)
        requests.append(Request(str(index), [0], 1, arrival=at))
    results = Results()
    serve([Replica(policy, limits, step_time, results.add)], OpenLoop(requests))
    assert not results.errors
    columns = results.columns()
    return (columns.answered - columns.arrival)[np.argsort(columns.index)]


def assert_mean(values: np.ndarray, theory: float) -> None:
    means = values.reshape(BATCHES, -1).mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(BATCHES)
    assert error < TOLERATED * theory
    assert abs(values.mean() - theory) < 4 * error


def engine(slots: int = 1) -> Limits:
    return Limits(max_batch_size=slots, max_queue=REQUESTS, num_blocks=64)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_nobatch_with_exponential_service_is_an_m_m_1_queue(load: float):
    rng = random.Random(7)
    times = times_in_system(NoBatch(), engine(), load, lambda step: rng.expovariate(1.0), seed=1)
    assert_mean(times, 1 / (1 - load))
    # The time in the system is exponential itself, and an arrival finds the engine idle with probability 1 - load.
    assert np.percentile(times, 90) == pytest.approx(math.log(10) / (1 - load), rel=0.1)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_nobatch_with_constant_service_is_an_m_d_1_queue(load: float):
    """Pollaczek and Khinchine: half the waiting time of M/M/1."""
    times = times_in_system(NoBatch(), engine(), load, lambda step: 1.0, seed=2)
    assert_mean(times, 1 + load / (2 * (1 - load)))
    assert np.mean(times < 1 + 1e-9) == pytest.approx(1 - load, abs=0.02)


@pytest.mark.parametrize(("slots", "rate"), [(1, 0.6), (4, 1.5), (8, 4.0)])
def test_static_without_a_time_out_is_a_bulk_service_queue(slots: int, rate: float):
    """Whoever waits when the engine is free is served together, up to `slots` of them (Bailey 1954); a batch of k takes
    0.6 + 0.1 k seconds."""
    sizes: list[int] = []

    def seconds(size: int) -> float:
        return 0.6 + 0.1 * size

    def step_time(step: Step) -> float:
        sizes.append(len(step.rows))
        return seconds(len(step.rows))

    times = times_in_system(Static(StaticParams(batch_timeout_ms=0)), engine(slots), rate, step_time, seed=3)
    mean_time, mean_size = bulk_queue(rate, slots, seconds)
    assert_mean(times, mean_time)
    assert np.mean(sizes) == pytest.approx(mean_size, rel=0.02)


def bulk_queue(rate: float, most: int, seconds, states: int = 400) -> tuple[float, float]:
    """Mean time in the system and mean batch, from the Markov chain of the numbers left behind by the batches: n becomes
    max(n - most, 0) plus who comes during the next service, which begins with the next arrival where n is 0."""
    chain = np.zeros((states, states))
    service = [seconds(min(max(n, 1), most)) for n in range(states)]
    left = [max(n - most, 0) for n in range(states)]
    for n in range(states):
        chances = poisson(rate * service[n], states - left[n])
        chain[n, left[n] :] = chances
        chain[n, -1] += 1 - chances.sum()
    equations = np.vstack([chain.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]
    assert share[-1] < 1e-9, "enough states"
    # Little's law: the mean queue over time, and who is being served.
    cycle = sum(p * (service[n] + (n == 0) / rate) for n, p in enumerate(share))
    queue = sum(p * (left[n] * service[n] + rate * service[n] ** 2 / 2) for n, p in enumerate(share)) / cycle
    served = sum(p * service[n] * min(max(n, 1), most) for n, p in enumerate(share)) / cycle
    return (queue + served) / rate, rate * cycle


def poisson(mean: float, count: int) -> np.ndarray:
    logs = -mean + np.arange(count) * math.log(mean) - np.array([math.lgamma(k + 1) for k in range(count)])
    return np.exp(logs)
