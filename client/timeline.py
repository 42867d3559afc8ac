"""What was in each sequence slot over time, from the server's step records: as numbers, and as a picture of numbers.

It must not know of files, colours or HTTP. A record's ``cells`` has a character for each slot; see CODES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 1600  # of a picture
SHORT_GAP_S = 0.02  # between two steps: planning, and no idleness of slots worth drawing


CODES = (
    "empty slot",
    "decoding, immediate request: the mode's colour",
    "decoding, deferred request: lighter",
    "prompt (prefill)",
    "computed again after a preemption",
    "wasted: finished, computes padding",
    "holds its slot, gets nothing",
    "no record",
)
EMPTY, IMMEDIATE, DEFERRED, PREFILL, AGAIN, WASTED, IDLE, NO_RECORD = range(len(CODES))
CELLS = {"d": IMMEDIATE, "p": PREFILL, "r": AGAIN, "x": WASTED, "w": IDLE}
TICKS = (PREFILL, AGAIN)  # short, and drawn at least one column wide


class Timeline:
    """The steps of one mode; ``end_s`` in them is on the clock of the run. What was before ``from_s`` is not known."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], slots: int, from_s: float = 0.0) -> None:
        self._from_s = from_s
        self._ends = np.array([step["end_s"] for step in steps])
        self._seconds = np.array([step["ms"] / 1e3 for step in steps])
        self._cells = _codes(steps, slots)
        self._padding = sum(step.get("padding", 0) for step in steps)
        self._computed = sum(step.get("computed", 0) for step in steps)
        self._preempted = sum(how == "p" for step in steps for _, how in step.get("gone", ()))

    @cached_property
    def used(self) -> int:
        """How many slots, from the first, were ever taken."""
        taken = np.flatnonzero((self._cells != EMPTY).any(axis=0))
        return int(taken[-1]) + 1 if len(taken) else 0

    @cached_property
    def codes(self) -> set[int]:
        """Which of CODES occur."""
        return set(np.unique(self._cells).tolist()) | ({NO_RECORD} if self._from_s else set())

    @property
    def padding_share(self) -> float:
        """Of all tokens computed, the share that was padding, as the server counts it."""
        return self._padding / (self._padding + self._computed) if self._padding else 0.0

    @cached_property
    def mean_held(self) -> float:
        """Slots in use, on average over the time in which anything was computed."""
        whole = self._seconds.sum()
        return float(((self._cells != EMPTY) * self._seconds[:, None]).sum() / whole) if whole else 0.0

    def story(self) -> str:
        """In a line."""
        if not len(self._ends):
            return "no steps"
        times = "1 preemption" if self._preempted == 1 else f"{self._preempted} preemptions"
        preempted = f", {times}" if self._preempted else ""
        since = f"from {self._from_s:.1f} s on: " if self._from_s else ""
        return f"{since}{self.mean_held:.1f} slots held on average, padding {self.padding_share:.1%}{preempted}"

    def picture(self, last_s: float, slots: int) -> NDArray[np.uint8]:
        """[slots, COLUMNS]: what each slot held at that time, from 0 to ``last_s``; short prompts are at least a column
        wide."""
        picture = np.full((slots, COLUMNS), EMPTY, dtype=np.uint8)
        if not len(self._ends):
            return picture
        width = min(slots, self._cells.shape[1])
        starts = self._ends - self._seconds
        before = np.concatenate([[-np.inf], self._ends[:-1]])
        starts = np.where(starts - before < max(SHORT_GAP_S, last_s / COLUMNS), before, starts)
        middles = (np.arange(COLUMNS) + 0.5) * last_s / COLUMNS
        step = np.searchsorted(self._ends, middles)
        inside = step < len(self._ends)
        inside[inside] &= starts[step[inside]] <= middles[inside]
        picture[:width, inside] = self._cells[step[inside], :width].T
        picture[:, middles < self._from_s] = NO_RECORD
        places = np.clip(self._ends / last_s * COLUMNS, 0, COLUMNS - 1).astype(int)
        for code in TICKS:
            rows, cells = np.nonzero(self._cells[:, :width] == code)
            picture[cells, places[rows]] = code
        return picture


def _codes(steps: Sequence[Mapping[str, Any]], slots: int) -> NDArray[np.uint8]:
    """[steps, slots] of CODES."""
    table = np.full((len(steps), slots), EMPTY, dtype=np.uint8)
    deferred = np.zeros(slots, dtype=bool)
    for row, step in zip(table, steps, strict=True):
        for slot, _serial, kind, _id in step.get("new", ()):
            deferred[slot] = kind == "d"
        cells = step["cells"][:slots]
        row[: len(cells)] = [CELLS.get(cell, EMPTY) for cell in cells]
        row[(row == IMMEDIATE) & deferred] = DEFERRED
    return table
