"""The line of deferred requests: by when each is due, who goes first, and who may wait no longer. For `mixed`."""

from collections.abc import Sequence
from math import ceil

from batching.policy import Plan, RequestView, View

PREFIX = 64  # tokens by which requests due together are ordered
TOGETHER_S = 10.0  # those that came within so long are due together, if they do not say when


class DeferredLine:
    def __init__(self, patience_s: float, safety: float, max_passes: int) -> None:
        self._patience_s = patience_s  # who does not say when it is due is so long after its arrival
        self._safety = safety  # on the predicted remaining time, before it is compared with the time left
        self._max_passes = max_passes  # requests that may join in front of the first in line
        self._first: RequestView | None = None  # in the last step, if all of the line was passed over
        self._passes = 0  # how many have joined in front of it since

    def place(self, req: RequestView) -> tuple[float, Sequence[int]]:
        """In the line: by when it is due, then by how its prompt begins."""
        return self._due(req), req.tokens[: min(req.prompt_len, PREFIX)]

    def rank(self, req: RequestView) -> tuple[float, int]:
        """Of those that run: by when it is due, then by what would have to be computed again."""
        return self._due(req), -req.num_computed

    def overdue(self, req: RequestView, view: View, now: float) -> str | None:
        """Why `req` may wait no longer, or None."""
        if req is self._first and self._passes >= self._max_passes:
            return f"passed by {self._passes} requests"
        steps = req.to_generate + req.remaining // view.limits.token_budget
        needs = self._safety * steps * view.step_time.recent_s
        left = self._due(req) - now
        return f"due in {left:.1f} s, may need {needs:.1f} s" if needs >= left else None

    def count_passes(self, plan: Plan, line: list[RequestView], arriving: list[RequestView]) -> None:
        """Enter a step's plan: whether it passes all of the line over, and how many of `arriving` join."""
        first = min(line, key=self.place) if line and not any(req in plan for req in line) else None
        joined = sum(req in plan for req in arriving)
        self._passes = joined + (self._passes if first is self._first else 0)
        self._first = first

    def _due(self, req: RequestView) -> float:
        if req.due is not None:
            return req.due
        return TOGETHER_S * ceil((req.arrival + self._patience_s) / TOGETHER_S)
