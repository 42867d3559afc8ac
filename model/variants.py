"""Several models behind one executor: each step is computed by the variant that it names. A block of KV memory is one of each
variant's cache, so that the scheduler's numbers hold whichever is chosen.
"""

from collections import deque
from collections.abc import Sequence

from batching.step import Executor, Step, StepResult


class VariantExecutor:
    def __init__(self, executors: Sequence[Executor]) -> None:
        """By variant; those of a GPU launch into one stream, so that steps are computed in the order of their submission."""
        self.depth = executors[0].depth
        self._executors = executors
        self._under_way: deque[Executor] = deque()

    def submit(self, step: Step) -> None:
        executor = self._executors[step.variant]
        executor.submit(step)
        self._under_way.append(executor)

    def collect(self) -> StepResult:
        return self._under_way.popleft().collect()
