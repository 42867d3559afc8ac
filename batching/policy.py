"""What a policy is: it sees a `View`, fills a `Plan` and returns it. All that a policy file needs can be imported from here."""

from typing import Any, ClassVar

from batching.blocks import blocks_for
from batching.params import Params
from batching.plan import Plan
from batching.request import Lane
from batching.view import Limits, PlanError, RequestView, View

__all__ = ["Limits", "Plan", "PlanError", "Policy", "RequestView", "View", "too_large"]


class Policy:
    """A scheme: which requests get how many tokens in the next step. One instance serves one scheduler."""

    Params: ClassVar[type[Params]] = Params
    lanes: ClassVar[tuple[Lane, ...]] = (Lane.MAIN,)  # for which it plans steps; asked when one of them is not busy

    params: Any = Params()  # of a class whose `__init__` forgets this one's

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params

    def refuses(self, req: RequestView, limits: Limits) -> str | None:
        """Why `req` could never run even in an empty engine, or None. Asked at submission."""
        return too_large(req.kv_peak, limits)

    def schedule(self, view: View, now: float) -> Plan:
        """The plan of the next step. `now` in seconds, on the engine's clock."""
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Policy":
        """Build the policy from `k=v` strings or JSON values. Raises ValueError naming the parameter."""
        return cls(cls.Params.read(arguments))


def too_large(columns: int, limits: Limits) -> str | None:
    if blocks_for(columns, limits.block_size) <= limits.num_blocks:
        return None
    capacity = limits.num_blocks * limits.block_size
    return f"needs {columns} columns of KV memory, the engine has {capacity}"
