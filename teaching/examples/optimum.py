"""The offline optimum of the CENG523 problem: a semi-Markov decision process over the queue's length and its head's slack (here
its age), solved by value iteration. The yardstick for online policies; it knows the arrival rate, which they have to estimate.

Poisson arrivals, one device, three variants. At each epoch the device is idle and chooses: serve a batch of some size on some
variant, wait a tick, or drop the head. A batch must end before its head's deadline (to serve somebody late earns nothing and
takes time). Time runs in ticks. Of those behind the head only the number is known: they are taken to have arrived uniformly
since the head did. That is exact while whole queues are served, and nearly so else; `Optimum` runs the solution in virtual
time, which shows how nearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, log

import numpy as np

from batching.policies.static import Static
from batching.policy import Plan, View
from simulator.tables import Table

WAIT, DROP = 0, 1  # the first two actions
ENOUGH = 1e-4  # by which the values may still change, in answers


@dataclass(frozen=True)
class Problem:
    """`price`: of an answer that is late or not given, in the unit of the accuracies."""

    rate: float  # requests a second
    deadline_s: float
    tables: Sequence[Table]  # by variant
    accuracies: Sequence[float]
    price: float
    tick_s: float = 0.001
    most: int = 64  # requests in the queue; more are counted as so many


@dataclass(frozen=True)
class Serve:
    variant: int
    size: int
    ticks: int


@dataclass(frozen=True)
class Solution:
    """`gain`: reward per request. `choices` (most + 1, ages): WAIT, DROP, or 2 + the place in `actions`."""

    gain: float
    choices: np.ndarray
    actions: Sequence[Serve]
    tick_s: float


def solve(problem: Problem) -> Solution:
    """Relative value iteration from decision to decision. With the right gain (reward per tick) the values of all states end up
    changing by nothing; as long as they all rise or fall, the gain is corrected."""
    ages, most = round(problem.deadline_s / problem.tick_s) + 1, problem.most
    per_tick = problem.rate * problem.tick_s
    actions = [
        Serve(variant, size, ticks)
        for variant, table in enumerate(problem.tables)
        for size in table.ms
        if (ticks := int(np.ceil(table.seconds(size) / problem.tick_s - 1e-9))) < ages
    ]
    behind = {size: _ages_behind(size, most, ages) for size in {1, *(action.size for action in actions)}}
    arrivals = {ticks: _shifts(per_tick * ticks, most) for ticks in {1, *(action.ticks for action in actions)}}
    first = {action.ticks: _first_arrival(per_tick, action.ticks, most, ages) for action in actions}
    served = np.arange(most + 1)[:, None]
    values = np.zeros((most + 1, ages))  # by queue length and age; row 0, the empty queue, has one value
    gain = 0.0
    while True:
        worth = np.full((2 + len(actions), most + 1, ages), -np.inf)
        for place, action in enumerate(actions, 2):
            end, size = ages - action.ticks, min(action.size, most)  # it has to start at an age below `end`
            worth[place, 1 : size + 1, :end] = (first[action.ticks] * values).sum()
            if size < most:
                left = arrivals[action.ticks][1 : most + 1 - size] @ values[:, action.ticks :]
                worth[place, size + 1 :, :end] = (behind[size][size + 1 :, :end, :end] @ left[:, :, None])[:, :, 0]
            worth[place] += np.minimum(served, size) * problem.accuracies[action.variant] - gain * action.ticks
        worth[DROP, 1] = values[0] - problem.price
        worth[DROP, 2:] = (behind[1][2:] @ values[1:-1, :, None])[:, :, 0] - problem.price
        best, choices = worth.max(axis=0), worth.argmax(axis=0)
        best[0] = 0.0
        for age in range(ages - 2, -1, -1):  # from old to young: who waits grows older
            later = arrivals[1] @ best[:, age + 1] - gain
            waits = later > best[:, age]
            best[waits, age] = later[waits]
            choices[waits, age] = WAIT
        best[0] = best[1, 0] - gain / per_tick
        change = best - values
        values = best - best[0, 0]
        gain += (change.max() + change.min()) / 2 / (ages + 1 / per_tick)  # no decision lasts longer on average
        if change.max() - change.min() < ENOUGH and abs(change.max()) < ENOUGH:
            return Solution(gain / per_tick, choices, actions, problem.tick_s)


def _shifts(mean: float, most: int) -> np.ndarray:
    """[n][m]: that a queue of n grows to m by Poisson arrivals with this mean."""
    chances = [exp(k * log(mean) - mean - lgamma(k + 1)) for k in range(most + 1)]
    shifts = np.zeros((most + 1, most + 1))
    for n in range(most + 1):
        shifts[n, n:] = chances[: most + 1 - n]
        shifts[n, most] += 1 - shifts[n].sum()
    return shifts


def _first_arrival(per_tick: float, ticks: int, most: int, ages: int) -> np.ndarray:
    """[n][age]: the queue after `ticks` that began with an empty one, and its head's age; [0][0] is an empty one again."""
    edges = np.clip(np.arange(ages + 1) - 0.5, 0, ticks)  # an age is rounded to the next tick
    chances = np.exp(-per_tick * (ticks - edges[1:])) - np.exp(-per_tick * (ticks - edges[:-1]))
    queue = np.zeros((most + 1, ages))
    for age in range(ticks + 1):
        queue[1:, age] = chances[age] * _shifts(per_tick * max(age, 0.25), most)[1, 1:]
    queue[0, 0] = exp(-per_tick * ticks)
    return queue


def _ages_behind(size: int, most: int, ages: int) -> np.ndarray:
    """[n][age][y]: that y is the age of the next in line once `size` of n are gone, whose first had `age`. The others arrived
    uniformly since: it is an order statistic. It is at most x * age if at least n - size of the n - 1 others are so young."""
    age, y = np.meshgrid(np.arange(ages), np.arange(ages), indexing="ij")
    share = np.clip((y + 0.5) / np.maximum(age, 0.5), 0, 1)
    share[y >= age] = 1
    result = np.zeros((most + 1, ages, ages))
    young = np.zeros((most + 1, ages, ages))  # [k]: that k of the others are so young, for n - 1 others
    young[0] = 1
    for n in range(2, most + 1):
        young[1:n] = young[1:n] * (1 - share) + young[: n - 1] * share
        young[0] *= 1 - share
        if n > size:
            at_most = young[n - size : n].sum(axis=0)
            result[n] = np.diff(at_most, axis=1, prepend=0.0)
    return result


class Optimum(Static):
    """Follows a solution in virtual time."""

    def __init__(self, solution: Solution) -> None:
        super().__init__()
        self._solution = solution
        self._variant = 0

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.variant = self._variant
        if view.resident:
            self.go_on(plan, view)
            return plan
        plan.release(*view.done)
        queue = list(view.waiting)
        choices, tick_s = self._solution.choices, self._solution.tick_s
        while queue:
            age = int(np.ceil((now - queue[0].arrival) / tick_s - 1e-6))
            choice = DROP if age >= choices.shape[1] else int(choices[min(len(queue), len(choices) - 1), age])
            if choice == WAIT:
                plan.wait_until(now + tick_s)
                return plan
            if choice > DROP:
                action = self._solution.actions[choice - 2]
                self._variant = plan.variant = action.variant
                self.start(plan, queue[: action.size])
                return plan
            plan.reject(queue.pop(0), "dropped by the optimal policy")
        return plan
