"""How long a step will take, learned from the steps that were: a linear model of the work in it, fitted online.

    t = b0 + b1 * prefill tokens + b2 * decodes + b3 * sum(KV columns of the decodes) + b4 * sum(chunk * context)

The terms are those of a transformer's step: what any step costs, the linear layers over prompt tokens and over decodes, reading
the cache, and the attention of chunks. None of them can be negative, so the fit is a non-negative least squares. Older steps
count less and less, since a machine's speed changes with what else it does. Pure arithmetic on what it is shown: the same
observations give the same predictions, on the server and in virtual time.
"""

from collections.abc import Iterable
from typing import NamedTuple

FORGET = 0.995  # a step's weight shrinks so with each later one: to a half in 140 steps
FEWEST = 8  # steps before it predicts
SWEEPS = 4  # of coordinate descent after each step, from where it stood
OUTLIER = 2.0  # a step that took longer than so many times its prediction counts as if it had taken that long
QUANTILE, QUANTILE_STEP = 0.99, 0.02
LARGEST_MARGIN = 1.5
RECENT = 0.05  # weight of the newest step in the mean of recent ones


class Load(NamedTuple):
    """The work of a step, in the model's terms."""

    prefill: int = 0
    decodes: int = 0
    kv: int = 0
    products: int = 0  # sum(chunk * context)

    def plus(self, count: int, start: int) -> "Load":
        """With `count` tokens more, of a request whose first `start` columns are in the cache."""
        prefill, decodes, kv, products = self
        if count == 1:
            return Load(prefill, decodes + 1, kv + start + 1, products)
        return Load(prefill + count, decodes, kv, products + count * (start + count))

    def times(self, rows: int) -> "Load":
        """As many such steps' work in one."""
        return Load(*(rows * work for work in self))

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]]) -> "Load":
        """Of (count, start) pairs."""
        prefill = decodes = kv = products = 0
        for count, start in rows:
            if count == 1:
                decodes += 1
                kv += start + 1
            else:
                prefill += count
                products += count * (start + count)
        return cls(prefill, decodes, kv, products)


class Probe(NamedTuple):
    """A step that was measured, on a variant of the model."""

    load: Load
    seconds: float
    variant: int = 0


class StepTime:
    """`margin`: the factor under which 99 of 100 steps stayed, measured to predicted, as far as LARGEST_MARGIN. `recent_s`: a
    step's mean duration."""

    def __init__(self) -> None:
        self.steps = 0
        self.coefficients = [0.0] * 5
        self.margin = 1.1
        self.recent_s = 0.0
        self._products = [[0.0] * 5 for _ in range(5)]  # weighted sums of x_i * x_j
        self._targets = [0.0] * 5  # and of x_i * t

    def observe(self, load: Load, seconds: float) -> None:
        """Take in a step: its work, and how long it took."""
        predicted = self.predict(load)
        if predicted:
            over = seconds > predicted * self.margin
            self.margin += QUANTILE_STEP * (QUANTILE if over else QUANTILE - 1)
            self.margin = min(max(self.margin, 1.0), LARGEST_MARGIN)
            seconds = min(seconds, predicted * OUTLIER)
        self.recent_s += (seconds - self.recent_s) * (RECENT if self.steps else 1.0)
        x = (1.0, *map(float, load))
        for i in range(5):
            row, xi = self._products[i], x[i]
            for j in range(5):
                row[j] = FORGET * row[j] + xi * x[j]
            self._targets[i] = FORGET * self._targets[i] + xi * seconds
        self.steps += 1
        for _ in range(SWEEPS):
            self._descend()

    def predict(self, load: Load) -> float:
        """Seconds; 0 before there is something to go by."""
        if self.steps < FEWEST:
            return 0.0
        b = self.coefficients
        return b[0] + b[1] * load.prefill + b[2] * load.decodes + b[3] * load.kv + b[4] * load.products

    def bound(self, load: Load) -> float:
        """Seconds within which 99 of 100 such steps should end."""
        return self.predict(load) * self.margin

    def _descend(self) -> None:
        """Each coefficient in turn to its best value, given the others, that is not negative."""
        b = self.coefficients
        for i in range(5):
            row = self._products[i]
            if row[i] > 0:
                others = sum(row[j] * b[j] for j in range(5)) - row[i] * b[i]
                b[i] = max(0.0, (self._targets[i] - others) / row[i])
