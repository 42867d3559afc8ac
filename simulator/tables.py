"""Step times from tables, whatever the lengths: by batch size, for each variant of a model. Those of the CENG523 project are
shipped in `data`.

In that project's world a request is one prompt token and one token to generate, so that a batch is one step and its service
time a line of the table. It must not know of policies.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from batching.step import Step
from batching.step_time import Load, StepTime

CENG523 = Path(__file__).parent / "data" / "ceng523.csv"
CENG523_VARIANTS = ("LLM-1", "LLM-2", "LLM-3")  # the most accurate first
CENG523_COLUMNS = ("llm_1_ms", "llm_2_ms", "llm_3_ms")  # of the file, in the same order
PREPROCESSING_MS, POSTPROCESSING_MS = 2.0, 1.0  # of a batch, whatever its size


@dataclass(frozen=True)
class Table:
    """Milliseconds by batch size. A batch between two sizes takes what the next larger one does, to which it
    is padded; none is larger than the largest."""

    ms: Mapping[int, float]

    @property
    def largest(self) -> int:
        return max(self.ms)

    def seconds(self, rows: int) -> float:
        """Raises ValueError for more rows than there are in the table."""
        if rows > self.largest:
            raise ValueError(f"a batch of {rows}: the table ends at {self.largest}")
        return self.ms[min(size for size in self.ms if size >= rows)] / 1e3


def ceng523() -> list[Table]:
    """A table for each of CENG523_VARIANTS: inference, communication of that batch size, pre- and postprocessing."""
    with CENG523.open(encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    fixed = PREPROCESSING_MS + POSTPROCESSING_MS
    return [
        Table({int(row["batch_size"]): row[name] + row["communication_ms"] + fixed for row in rows}) for name in CENG523_COLUMNS
    ]


class StepTimeTable:
    """What a step takes, by its variant and the number of its rows: for the virtual executor."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    def __call__(self, step: Step) -> float:
        return self.tables[step.variant].seconds(len(step.rows))


class KnownStepTime(StepTime):
    """The same as a policy sees it: known from the first step on, and exact."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table
        self.margin = 1.0

    def observe(self, load: Load, seconds: float) -> None:
        self.steps += 1

    def predict(self, load: Load) -> float:
        return self._table.seconds(load.decodes) if load.decodes <= self._table.largest else inf
