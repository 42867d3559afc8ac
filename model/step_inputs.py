"""What the model needs to know of a step, in one piece of memory: on a GPU one copy takes it there, and a captured graph, which
always reads the same addresses, finds it there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.batch import RaggedBatch


class Shape(NamedTuple):
    """The numbers that decide where in the memory what lies."""

    tokens: int
    rows: int
    width: int  # of the block tables
    drawn: int  # tokens after which the next is drawn

    def fields(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """In their order. Those of 8 bytes come first."""
        long, word = np.dtype(np.int64), np.dtype(np.int32)
        return {
            "tokens": (long, (self.tokens,)),
            "positions": (long, (self.tokens,)),
            "slots": (long, (self.tokens,)),
            "places": (long, (self.tokens,)),
            "sampled": (long, (self.drawn,)),
            "begins": (word, (self.rows + 1,)),
            "starts": (word, (self.rows,)),
            "spans": (word, (self.rows,)),
            "tables": (word, (self.rows, self.width)),
        }

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.fields().values())


@dataclass(frozen=True)
class StepInputs:
    """`memory`, and its parts by name: filled on the host, read on the device."""

    memory: torch.Tensor  # (bytes,) uint8
    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    places: torch.Tensor  # (T,) int64: where among those drawn in the step before a token is that is not known yet; else -1
    sampled: torch.Tensor  # (drawn,) int64: places in the batch
    batch: RaggedBatch

    @classmethod
    def within(cls, memory: torch.Tensor, shape: Shape) -> "StepInputs":
        """The parts of `memory`, which has at least `shape.nbytes` bytes."""
        parts, first = {}, 0
        for name, (dtype, size) in shape.fields().items():
            last = first + dtype.itemsize * int(np.prod(size))
            kind = torch.int64 if dtype.itemsize == 8 else torch.int32
            parts[name] = memory[first:last].view(kind).view(size)
            first = last
        batch = RaggedBatch(*(parts.pop(name) for name in ("begins", "starts", "spans", "tables", "slots")))
        return cls(memory[:first], batch=batch, **parts)
