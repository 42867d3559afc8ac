"""Guesses of how many tokens a request will generate, for policies that go by length. A policy asks one of them by name, as one
of its parameters, and tells it of the requests that have finished.

What they know is what a request brings and which lengths they were told: never the texts. A predictor that reads the prompt, as
the papers' do, would be one more class here.
"""

from collections.abc import Callable
from random import Random
from typing import Protocol

from batching.view import RequestView


class Predictor(Protocol):
    """Every prediction lies between 1 and the request's `max_tokens`."""

    def predict(self, req: RequestView) -> int:
        """Tokens that `req` generates from its first to its last."""
        ...

    def learn(self, req: RequestView) -> None:
        """Take in the length of a request that has finished."""
        ...


class Oracle:
    """Knows: the true length where the workload says it, else the most that was asked for, which is the length unless a stop is
    met."""

    def predict(self, req: RequestView) -> int:
        return req.max_tokens if req.output_len is None else min(req.output_len, req.max_tokens)

    def learn(self, req: RequestView) -> None:
        pass


class NoisyOracle(Oracle):
    """An oracle whose predictions are off by a normally distributed part of the length, of standard deviation `error`. The
    noise is a function of the request's id, so that a request is guessed alike whenever it is asked about."""

    def __init__(self, error: float) -> None:
        self._error = error

    def predict(self, req: RequestView) -> int:
        off = self._error * Random(req.id).gauss(0.0, 1.0)
        return min(req.max_tokens, max(1, round(super().predict(req) * (1 + off))))


class RunningMean:
    """The mean length of the requests that have finished; before there are any, the most that was asked for."""

    def __init__(self) -> None:
        self._mean, self._count = 0.0, 0

    def predict(self, req: RequestView) -> int:
        return min(req.max_tokens, max(1, round(self._mean))) if self._count else req.max_tokens

    def learn(self, req: RequestView) -> None:
        self._count += 1
        self._mean += (req.num_generated - self._mean) / self._count


# By name; each is made of a policy's `error` parameter.
PREDICTORS: dict[str, Callable[[float], Predictor]] = {
    "oracle": lambda error: Oracle(),
    "noisy": NoisyOracle,
    "mean": lambda error: RunningMean(),
}
