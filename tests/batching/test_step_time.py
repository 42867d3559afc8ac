"""The learned step time, against a machine whose law is known and against numpy's least squares."""

import random

import numpy as np
import pytest

from batching.step_time import FEWEST, LARGEST_MARGIN, Load, StepTime

LAW = [0.004, 0.0003, 0.0009, 2e-6, 5e-7]


def seconds(load: Load, law: list[float] = LAW) -> float:
    return law[0] + sum(b * x for b, x in zip(law[1:], load, strict=True))


def loads(count: int, seed: int = 0) -> list[Load]:
    """Steps as an engine has them: decodes with or without a chunk."""
    rng = random.Random(seed)
    steps = []
    for _ in range(count):
        rows = [(1, rng.randint(1, 900)) for _ in range(rng.randint(0, 60))]
        rows += [(rng.randint(2, 300), rng.randint(0, 500)) for _ in range(rng.randint(0, 2))]
        steps.append(Load.of(rows))
    return steps


def learned(steps: list[Load], law: list[float] = LAW, noise: float = 0.0) -> StepTime:
    model, rng = StepTime(), random.Random(1)
    for load in steps:
        model.observe(load, seconds(load, law) * (1 + rng.uniform(-noise, noise)))
    return model


def test_the_load_of_a_step_counts_decodes_and_chunks_apart():
    load = Load.of([(1, 9), (1, 99), (20, 0), (10, 30)])
    assert load == Load(prefill=30, decodes=2, kv=10 + 100, products=20 * 20 + 10 * 40)
    assert Load.of([(1, 9)]).plus(20, 0) == Load.of([(1, 9), (20, 0)])


def test_it_finds_the_law_of_a_machine():
    model = learned(loads(400))
    for load in loads(50, seed=7):
        assert model.predict(load) == pytest.approx(seconds(load), rel=0.02)


def test_with_noise_it_stays_near_numpys_weighted_least_squares():
    steps = loads(300)
    model = learned(steps, noise=0.2)
    rng = random.Random(1)
    times = np.array([seconds(load) * (1 + rng.uniform(-0.2, 0.2)) for load in steps])
    weights = np.sqrt(0.995 ** np.arange(len(steps) - 1, -1, -1))
    columns = np.array([[1.0, *load] for load in steps])
    oracle = np.linalg.lstsq(columns * weights[:, None], times * weights, rcond=None)[0]
    for load in loads(50, seed=7):
        assert model.predict(load) == pytest.approx(float(np.dot([1.0, *load], oracle)), rel=0.1)


def test_no_term_is_negative_though_the_data_ask_for_it():
    falling = [0.05, 0.0, -0.0005, 0.0, 0.0]  # a machine that is faster with more decodes
    model = learned(loads(200), falling)
    assert min(model.coefficients) >= 0


def test_it_says_nothing_before_it_has_seen_enough():
    model = learned(loads(FEWEST - 1))
    assert model.predict(Load(decodes=5)) == 0
    assert learned(loads(FEWEST)).predict(Load(decodes=5)) > 0


def test_it_follows_a_machine_that_becomes_slower_but_not_a_single_hiccup():
    model = learned(loads(200))
    load = Load.of([(1, 100)] * 30)
    before = model.predict(load)
    model.observe(load, 50 * before)
    assert model.predict(load) < 1.2 * before
    for again in loads(500, seed=3):
        model.observe(again, 3 * seconds(again))
    assert model.predict(load) == pytest.approx(3 * seconds(load), rel=0.1)


def test_its_bound_holds_for_about_99_of_100_steps():
    rng, model = random.Random(5), learned(loads(300))
    over = 0
    steps = loads(4000, seed=9)
    for load in steps:
        taken = seconds(load) * (1 + 0.08 * abs(rng.gauss(0, 1)))
        over += taken > model.bound(load)
        model.observe(load, taken)
    assert 0.002 < over / len(steps) < 0.03
    assert 1 <= model.margin <= LARGEST_MARGIN
