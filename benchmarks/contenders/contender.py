"""What the benchmark asks of a contender: to load the checkpoint, and then to serve requests whenever it is told to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import Job


@dataclass(frozen=True)
class Setup:
    """What is the same for all. `checkpoint`: the folder all of them load or convert."""

    checkpoint: Path
    device: str  # cpu or cuda
    llama_server: str | None  # the program
    limit_s: float  # for those that would take minutes


UNKNOWN = -1  # a token that was generated, whichever it is


class Missing(Exception):
    """A contender that cannot take part here; the message says why."""


class Session:
    """A contender that has loaded its model. `dtype`: of its weights, in the contender's own words."""

    dtype = ""
    limit_s = math.inf  # it may give up after so long, with fewer tokens

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        """The generated token ids of each job, all of which are there at once. Greedy, and none ends early."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it has started."""


@dataclass(frozen=True)
class Contender:
    """`open` loads the model in the dtype; it raises Missing, or ModuleNotFoundError for a package that is not installed."""

    name: str
    dtype: str
    open: Callable[[Setup, str], Session]

    @property
    def title(self) -> str:
        return f"{self.name} {self.dtype}"
