"""Ragged batches over a poisoned paged cache, and causal attention written plainly in float64 to check them against."""

import math
from dataclasses import dataclass

import torch

from kernels.ragged_attention import RaggedBatch, make_row

BLOCK_SIZE = 16
HEADS = 3
HEAD_SIZE = 32


@dataclass(frozen=True)
class Share:
    """What one request has in a step: `count` new tokens after `context` cached ones, then `pad` columns of padding."""

    context: int
    count: int
    pad: int = 0
    span: int = 0

    @property
    def columns(self) -> int:
        return self.context + self.count + self.pad


class Case:
    """Fresh random inputs for `shares`: q, k, v, the caches and the batch. Block tables are in random order.

    Slots that hold nothing yet are NaN, which any read turns into NaN; in the tables of rows with a span they are 1e4,
    since masked columns are read there.
    """

    def __init__(self, shares: list[Share], seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.shares = shares
        sizes = [-(-max(share.columns, share.span) // BLOCK_SIZE) for share in shares]
        order = torch.randperm(sum(sizes) + 2, generator=self._generator)  # two blocks belong to nobody
        self.tables = list(order[: sum(sizes)].split(sizes))
        self.k_cache = torch.full((len(order), BLOCK_SIZE, HEADS, HEAD_SIZE), math.nan)
        self.v_cache = torch.full_like(self.k_cache, math.nan)
        rows, slots, begin = [], [], 0
        for share, table in zip(shares, self.tables, strict=True):
            if share.span:
                self.k_cache[table], self.v_cache[table] = 1e4, 1e4
            cached = self.slots_of(table, 0, share.context)
            self.flat(self.k_cache)[cached] = self._random(share.context)
            self.flat(self.v_cache)[cached] = self._random(share.context)
            rows.append(make_row(begin, share.context, share.count + share.pad, table, BLOCK_SIZE, share.span))
            slots.append(self.slots_of(table, share.context, share.columns))
            begin += share.count + share.pad
        self.batch = RaggedBatch(rows, torch.cat(slots))
        self.q, self.k, self.v = (self._random(begin).to(dtype) for _ in range(3))

    def reference(self) -> list[torch.Tensor]:
        """For each share the outputs (count, heads, head size) of its real tokens; to be asked before the caches change."""
        outputs = []
        for share, table, row in zip(self.shares, self.tables, self.batch.rows, strict=True):
            own = slice(row.begin, row.begin + share.count)
            cached = self.slots_of(table, 0, share.context)
            keys = torch.cat([self.flat(self.k_cache)[cached].double(), self.k[own].double()])
            values = torch.cat([self.flat(self.v_cache)[cached].double(), self.v[own].double()])
            out = torch.zeros(share.count, HEADS, HEAD_SIZE, dtype=torch.float64)
            for i, query in enumerate(self.q[own].double()):
                seen = share.context + i + 1
                for head in range(HEADS):
                    scores = keys[:seen, head] @ query[head] / math.sqrt(HEAD_SIZE)
                    weights = (scores - scores.max()).exp()
                    out[i, head] = (weights / weights.sum()) @ values[:seen, head]
            outputs.append(out)
        return outputs

    def real(self, out: torch.Tensor) -> list[torch.Tensor]:
        """The part of an output that belongs to each share's real tokens."""
        pairs = zip(self.shares, self.batch.rows, strict=True)
        return [out[row.begin : row.begin + share.count].double() for share, row in pairs]

    @staticmethod
    def flat(cache: torch.Tensor) -> torch.Tensor:
        return cache.view(-1, HEADS, HEAD_SIZE)

    @staticmethod
    def slots_of(table: torch.Tensor, first: int, end: int) -> torch.Tensor:
        columns = torch.arange(first, end)
        return table[columns // BLOCK_SIZE] * BLOCK_SIZE + columns % BLOCK_SIZE

    def _random(self, tokens: int) -> torch.Tensor:
        """Twice the usual spread, so that attention is peaked and a wrong column shows."""
        return 2 * torch.randn(tokens, HEADS, HEAD_SIZE, generator=self._generator)
