"""What plans decided beside their steps' rows, in request ids that can be compared."""

from typing import NamedTuple

from batching.plan import Plan


class Told(NamedTuple):
    released: tuple[str, ...]
    preempted: tuple[str, ...]
    dropped: tuple[str, ...]
    promoted: tuple[str, ...]
    reasons: dict[str, str]


def told(plan: Plan) -> Told:
    lists = plan.released, plan.preempted, plan.dropped, plan.promoted
    return Told(*(tuple(req.id for req in requests) for requests in lists), plan.reasons)


class Plans(list[Told]):
    """Is told of each plan: the nth that computes something made the nth step. `others` compute nothing."""

    def __init__(self) -> None:
        self.others: list[Told] = []

    def __call__(self, plan: Plan) -> None:
        (self if plan._rows else self.others).append(told(plan))
