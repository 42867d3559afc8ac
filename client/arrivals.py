"""When requests leave: the arrival times of a plan, in seconds from its start, sorted.

Bursts have two levels, as in Vexless and FlexiBatch: the outer distribution says how many requests fall into each of some bins
of equal length, the inner one where in its bin a request lies. The sum is exact and no time leaves its bin. Pure: it must not
know of lengths, prompts or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from client.distributions import Draws, Shape, check_positive, draw_within, gaussian, inverse_gaussian, read_shape, zipf

# Parameters with their defaults. Outer ones draw a bin's weight, inner ones a place in [0, 1) of a bin.
OUTER = {
    "uniform": {"low": 0.5, "high": 1.5},
    "poisson": {"mean": 0.0},  # counts; 0: as many as fall to a bin on average
    "gaussian": {"mean": 1.0, "std": 0.3},
    "inverse-gaussian": {"mean": 1.0, "shape": 2.0, "high": 10.0},
    "zipf": {"a": 1.4, "ranks": 50.0},
}
INNER = {
    "uniform": {"low": 0.0, "high": 1.0},
    "poisson": {},  # exponential gaps that fill the bin
    "gaussian": {"mean": 0.5, "std": 0.15},
    "inverse-gaussian": {"mean": 0.4, "shape": 0.8},
    "zipf": {"a": 1.1, "ranks": 20.0},
}
BURSTS = {"low": ("inverse-gaussian", "gaussian"), "medium": ("zipf", "uniform"), "high": ("zipf", "zipf")}
STEADY = {"gamma": {"burstiness": 1.0}, "constant": {}, "at-once": {}}


@dataclass(frozen=True)
class Bursts:
    """Bins by ``outer``, places in them by ``inner``."""

    outer: Shape
    inner: Shape

    def __str__(self) -> str:
        return f"{self.outer}/{self.inner}"


Arrivals = Bursts | Shape


def read_arrivals(text: str) -> Arrivals:
    """``low``, ``medium``, ``high``, ``OUTER/INNER``, ``gamma``, ``constant`` or ``at-once``, each with parameters where it
    has any: ``zipf:a=1.2/gaussian:std=0.1``. Raises ValueError."""
    if text in BURSTS:
        outer, inner = BURSTS[text]
    elif "/" in text:
        outer, inner = text.split("/", 1)
    elif text.partition(":")[0] in STEADY:
        return read_shape(text, STEADY)
    else:
        there_are = ", ".join([*BURSTS, *STEADY])
        raise ValueError(f"there is no {text!r}; there are {there_are}, and OUTER/INNER of {', '.join(OUTER)}")
    return Bursts(read_shape(outer, OUTER), read_shape(inner, INNER))


def draw_arrivals(arrivals: Arrivals, count: int, duration_s: float, bins: int, rng: np.random.Generator) -> Draws:
    """``count`` sorted times in [0, ``duration_s``]. Raises ValueError naming a parameter that will not do."""
    if isinstance(arrivals, Bursts):
        return _bursts(arrivals, count, duration_s, bins, rng)
    if arrivals.name == "gamma":
        return _gamma(count, duration_s, arrivals.parameters["burstiness"], rng)
    step_s = duration_s / count if arrivals.name == "constant" else 0.0
    return np.arange(count, dtype=np.float64) * step_s


def counts_by_bin(outer: Shape, count: int, bins: int, rng: np.random.Generator) -> list[int]:
    """How many of ``count`` requests each bin gets: in proportion to its draw, rounded so that the sum is exact."""
    weights = _weights(outer, count, bins, rng)
    share = weights / weights.sum() * count
    counts = np.floor(share).astype(int)
    # Largest remainder: the bins that lost most by rounding down get one more.
    for k in np.argsort(counts - share, kind="stable")[: count - counts.sum()]:
        counts[k] += 1
    return [int(n) for n in counts]


def _bursts(bursts: Bursts, count: int, duration_s: float, bins: int, rng: np.random.Generator) -> Draws:
    counts = counts_by_bin(bursts.outer, count, bins, rng)
    width_s = duration_s / bins
    times = []
    for k, n in enumerate(counts):
        last = np.nextafter((k + 1) * width_s, 0.0)  # the sum below may round up to the bin's end, which is the next one's
        times.append(np.minimum((k + np.sort(_places(bursts.inner, n, rng))) * width_s, last))
    return np.concatenate(times)


def _gamma(count: int, duration_s: float, burstiness: float, rng: np.random.Generator) -> Draws:
    """Gaps as `vllm bench serve` has them: 1 is a Poisson process, less is burstier. The last request leaves at the end."""
    check_positive("gamma", burstiness=burstiness)
    times = np.cumsum(rng.gamma(burstiness, 1.0, count))
    if not times[-1] > 0:
        raise ValueError(f"gamma: a burstiness of {burstiness:g} leaves no gaps at all; use at-once")
    return times * (duration_s / times[-1])


def _weights(outer: Shape, count: int, bins: int, rng: np.random.Generator) -> Draws:
    p = outer.parameters
    draw: dict[str, Callable[[], Draws]] = {
        "uniform": lambda: _uniform(rng, bins, p["low"], p["high"], 0.0, np.inf),
        "poisson": lambda: _counts(rng, bins, p["mean"] or count / bins),
        "gaussian": lambda: gaussian(rng, bins, p["mean"], p["std"], 0.0, np.inf),
        "inverse-gaussian": lambda: inverse_gaussian(rng, bins, p["mean"], p["shape"], 0.0, p["high"]),
        "zipf": lambda: zipf(rng, bins, p["a"], p["ranks"]).astype(float),
    }
    return draw[outer.name]()


def _places(inner: Shape, n: int, rng: np.random.Generator) -> Draws:
    p = inner.parameters
    draw: dict[str, Callable[[], Draws]] = {
        "uniform": lambda: _uniform(rng, n, p["low"], p["high"], 0.0, 1.0),
        "poisson": lambda: _exponential_gaps(rng, n),
        "gaussian": lambda: gaussian(rng, n, p["mean"], p["std"], 0.0, 1.0),
        "inverse-gaussian": lambda: inverse_gaussian(rng, n, p["mean"], p["shape"], 0.0, 1.0),
        # A rank is one of so many equal parts of the bin; within it all places are alike.
        "zipf": lambda: (zipf(rng, n, p["a"], p["ranks"]) - 1 + rng.random(n)) / p["ranks"],
    }
    return draw[inner.name]()


def _uniform(rng: np.random.Generator, size: int, low: float, high: float, lowest: float, highest: float) -> Draws:
    if not low < high:
        raise ValueError(f"uniform: low must be less than high, not {low:g} and {high:g}")
    return draw_within("uniform", lambda n: rng.uniform(low, high, n), size, lowest, highest)


def _counts(rng: np.random.Generator, bins: int, mean: float) -> Draws:
    check_positive("poisson", mean=mean)
    for _ in range(1000):
        counts = rng.poisson(mean, bins)
        if counts.any():
            return counts.astype(float)
    raise ValueError(f"poisson: with a mean of {mean:g} every bin stays empty")


def _exponential_gaps(rng: np.random.Generator, n: int) -> Draws:
    """A Poisson process that has n events in the bin: n + 1 exponential gaps, scaled to fill it."""
    gaps = np.cumsum(rng.exponential(1.0, n + 1))
    return gaps[:-1] / gaps[-1]
