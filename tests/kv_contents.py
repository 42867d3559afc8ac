"""What the KV cache would hold: a stand-in for its tensors that notices when a row reads what is not its own.

Takes generated tokens to be those of `simulator.virtual`: the one at column n is n.
"""

from collections import Counter

from batching.request import Request
from batching.step import Step


class KVContents:
    """A column of KV depends on the token there and on all before it: what stands in a place is that history."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._written: dict[tuple[int, int], tuple[int, tuple[int, ...] | None]] = {}  # (step, history), by block and column

    def compute(self, step: Step) -> None:
        """Read and write what the step does, when it is submitted. Raises AssertionError for a row that finds in its blocks
        anything but its own tokens, and for a block that is written while another request holds it."""
        holders = Counter(block for row in step.rows for block in row.req.blocks)
        for row in step.rows:
            for column in range(row.start, row.start + row.count + row.pad):
                place = self._place(row.req, column)
                assert holders[place[0]] == 1, "shared blocks are only read"
                real = column < row.start + row.count
                self._written[place] = step.id, history(row.req, column) if real else None
        for row in step.rows:
            for column in range(row.start + row.count):
                assert self._written[self._place(row.req, column)][1] == history(row.req, column)

    def fail(self, step: Step) -> None:
        """Nobody knows what a failed step wrote."""
        self._written = {place: (by, None if by == step.id else what) for place, (by, what) in self._written.items()}

    def _place(self, req: Request, column: int) -> tuple[int, int]:
        return req.blocks[column // self._block_size], column % self._block_size


def history(req: Request, column: int) -> tuple[int, ...]:
    """The tokens up to that of `column`, known to the host or not."""
    return (*req.tokens[: req.prompt_len], *range(req.prompt_len, column + 1))[: column + 1]
