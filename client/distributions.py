"""Named distributions with named parameters, and how they are drawn: within a range, by drawing again what falls outside it.

Clipping instead would pile the outliers up at the edge. A long tail is a Zipf law over a limited number of ranks, and is never
divided by its largest draw, which would squeeze all the others into the first percent. Pure: every draw comes from the
generator that is passed in. It must not know what the numbers are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ROUNDS = 200  # of drawing again
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A distribution's name and all its parameters."""

    name: str
    parameters: Mapping[str, float]

    def __str__(self) -> str:
        return self.name + "".join(
            f"{',' if i else ':'}{key}={value:g}" for i, (key, value) in enumerate(self.parameters.items())
        )


def read_shape(text: str, known: Mapping[str, Mapping[str, float]]) -> Shape:
    """``NAME`` or ``NAME:key=value,...``; what is left out has the default in ``known``. Raises ValueError."""
    name, _, rest = text.partition(":")
    if name not in known:
        raise ValueError(f"there is no {name!r}; there are {', '.join(known)}")
    parameters = dict(known[name])
    for pair in rest.split(",") if rest else ():
        key, _, value = pair.partition("=")
        if key not in parameters:
            there_are = f"there are {', '.join(parameters)}" if parameters else "it has none"
            raise ValueError(f"{name} has no parameter {key!r}; {there_are}")
        try:
            parameters[key] = float(value)
        except ValueError:
            parameters[key] = math.nan
        if not math.isfinite(parameters[key]):
            raise ValueError(f"{name}: {key} must be a number, not {value!r}")
    return Shape(name, parameters)


def draw_within(what: str, draw: Callable[[int], Draws], size: int, low: float, high: float) -> Draws:
    """``size`` draws in [``low``, ``high``): the distribution truncated. Raises ValueError where hardly any falls there."""
    kept = np.empty(0)
    for _ in range(MAX_ROUNDS):
        new = draw(2 * (size - len(kept)) + 8)
        kept = np.concatenate([kept, new[(new >= low) & (new < high)]])
        if len(kept) >= size:
            return kept[:size]
    raise ValueError(f"{what}: hardly any draw falls between {low:g} and {high:g}")


def gaussian(rng: np.random.Generator, size: int, mean: float, std: float, low: float, high: float) -> Draws:
    check_positive("gaussian", std=std)
    return draw_within("gaussian", lambda n: rng.normal(mean, std, n), size, low, high)


def inverse_gaussian(rng: np.random.Generator, size: int, mean: float, shape: float, low: float, high: float) -> Draws:
    """``shape`` is Wald's lambda: the smaller, the longer the tail (the variance is mean^3 / shape)."""
    check_positive("inverse-gaussian", mean=mean, shape=shape)
    return draw_within("inverse-gaussian", lambda n: rng.wald(mean, shape, n), size, low, high)


def zipf(rng: np.random.Generator, size: int, a: float, ranks: float) -> NDArray[np.int64]:
    """Ranks from 1 to ``ranks``, rank r with a probability proportional to r^-a: Zipf's law truncated."""
    check_positive("zipf", a=a)
    if ranks != int(ranks) or not 2 <= ranks <= 1_000_000:
        raise ValueError(f"zipf: ranks must be a whole number from 2 to 1000000, not {ranks:g}")
    weights = np.arange(1, int(ranks) + 1, dtype=float) ** -a
    return rng.choice(len(weights), size=size, p=weights / weights.sum()) + 1


def check_positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{what}: {name} must be more than 0, not {value:g}")
