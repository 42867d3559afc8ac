"""Ragged batches over a poisoned paged cache, and causal attention written plainly in float64 to check them against."""

import math
from dataclasses import dataclass

import torch

from kernels.batch import RaggedBatch

BLOCK_SIZE = 16
HEADS = 5
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

    def __init__(
        self, shares: list[Share], seed: int, dtype: torch.dtype = torch.float32, cached_as: torch.dtype = torch.float32
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.shares = shares
        sizes = [-(-max(share.columns, share.span) // BLOCK_SIZE) for share in shares]
        order = torch.randperm(sum(sizes) + 2, generator=self._generator)  # two blocks belong to nobody
        self.tables = list(order[: sum(sizes)].split(sizes))
        self.k_cache = torch.full((len(order), HEADS, BLOCK_SIZE, HEAD_SIZE), math.nan)
        self.v_cache = torch.full_like(self.k_cache, math.nan)
        begins, slots = [0], []
        tables = torch.full((len(shares), max(sizes)), 2**30, dtype=torch.int32)  # beyond a row's blocks: no block at all
        for i, (share, table) in enumerate(zip(shares, self.tables, strict=True)):
            if share.span:
                self.k_cache[table], self.v_cache[table] = 1e4, 1e4
            cached = self.slots_of(table, 0, share.context)
            self.put(self.k_cache, cached, self._random(share.context))
            self.put(self.v_cache, cached, self._random(share.context))
            slots.append(self.slots_of(table, share.context, share.columns))
            begins.append(begins[-1] + share.count + share.pad)
            tables[i, : len(table)] = table
        starts, spans = [share.context for share in shares], [share.span for share in shares]
        numbers = (torch.tensor(n, dtype=torch.int32) for n in (begins, starts, spans))
        self.batch = RaggedBatch(*numbers, tables, torch.cat(slots))
        self.k_cache, self.v_cache = self.k_cache.to(cached_as), self.v_cache.to(cached_as)
        qkv = self._random(3 * begins[-1]).to(dtype)  # interleaved, as the layer before gives them
        self.q, self.k, self.v = qkv.view(begins[-1], 3, HEADS, HEAD_SIZE).unbind(1)

    def reference(self) -> list[torch.Tensor]:
        """For each share the outputs (count, heads, head size) of its real tokens; to be asked before the caches change."""
        outputs = []
        for share, table, begin in zip(self.shares, self.tables, self.batch.begins, strict=False):
            own = slice(begin, begin + share.count)
            cached = self.slots_of(table, 0, share.context)
            keys = torch.cat([self.at(self.k_cache, cached).double(), self.k[own].double()])
            values = torch.cat([self.at(self.v_cache, cached).double(), self.v[own].double()])
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
        pairs = zip(self.shares, self.batch.begins, strict=False)
        return [out[begin : begin + share.count].double() for share, begin in pairs]

    @staticmethod
    def at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """What lies in `slots`: (n, heads, head size)."""
        return cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE]

    @staticmethod
    def put(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = values.to(cache.dtype)

    @staticmethod
    def slots_of(table: torch.Tensor, first: int, end: int) -> torch.Tensor:
        columns = torch.arange(first, end)
        return table[columns // BLOCK_SIZE] * BLOCK_SIZE + columns % BLOCK_SIZE

    def _random(self, tokens: int) -> torch.Tensor:
        """Twice the usual spread, so that attention is peaked and a wrong column shows."""
        return 2 * torch.randn(tokens, HEADS, HEAD_SIZE, generator=self._generator)
