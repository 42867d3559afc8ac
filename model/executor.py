"""Runs a step on the model: flattens its rows into one ragged batch, computes, samples. It keeps the KV cache; which block
belongs to whom it is told by the scheduler.

Padding is really computed: a static batch's padding columns and the finished rows that keep their seats go through every
layer, their K and V to slots of the same row that real tokens will overwrite.
"""

from collections.abc import Callable

import numpy as np
import torch

from batching.request import Request
from batching.step import Row, Step, StepResult
from kernels.ragged_attention import RaggedBatch
from model.gpt import GPT
from model.kv_cache import KVCache
from model.sampling import sample


class GPTExecutor:
    """Computes in `collect`, on the caller's thread: on a CPU there is nothing to overlap with."""

    depth = 1

    def __init__(self, model: GPT, cache: KVCache, vocab_size: int, clock: Callable[[], float]) -> None:
        """`vocab_size`: the tokenizer's; ids beyond it are never drawn."""
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._clock = clock
        self._step: Step | None = None

    def warm_up(self) -> None:
        """Compute a token, and two at once, into block 0, so that the kernels of both are compiled before the first request.
        Raises what goes wrong."""
        req = Request("warm-up", [0, 0], 1)
        req.blocks.append(0)
        for count in (1, 2):
            self._compute((Row(req, 0, count, 0, 0, True),))

    def submit(self, step: Step) -> None:
        self._step = step

    def collect(self) -> StepResult:
        step = self._step
        if step is None:
            raise RuntimeError("collect without a step under way")
        started = self._clock()
        try:
            tokens, error = self._compute(step.rows), None
        except Exception as failure:  # the requests of this step are told; the server goes on
            tokens, error = {}, failure
        self._step = None
        return StepResult(step.id, started, self._clock(), tokens, error)

    @torch.inference_mode()
    def _compute(self, rows: tuple[Row, ...]) -> dict[str, int]:
        """The token drawn for each row that samples, by request id."""
        tokens: list[int] = []
        drawn = []
        for row in rows:
            if row.samples or row.count == 0:
                drawn.append((row, len(tokens) + max(row.count, 1) - 1))  # and the place of its last real token
            tokens += row.req.tokens[row.start : row.start + row.count] + [0] * row.pad
        batch, positions = self._describe(rows, len(tokens))
        logits = self._model(
            torch.tensor(tokens, device=self._cache.device),
            positions,
            self._cache,
            batch,
            torch.tensor([place for _, place in drawn], dtype=torch.int64, device=self._cache.device),
        )[:, : self._vocab_size]
        indices = [len(row.req.tokens) - row.req.prompt_len for row, _ in drawn]
        sampled = sample(logits, [row.req.sampling for row, _ in drawn], indices)
        return {row.req.id: token for (row, _), token in zip(drawn, sampled, strict=True) if row.samples}

    def _describe(self, rows: tuple[Row, ...], num_tokens: int) -> tuple[RaggedBatch, torch.Tensor]:
        """The batch as attention reads it, and each token's position (T,). In NumPy, so that no Python work grows with the
        context."""
        block_size = self._cache.block_size
        starts = np.array([row.start for row in rows], np.int32)
        begins = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([row.count + row.pad for row in rows], out=begins[1:])
        tables = np.zeros((len(rows), max(len(row.req.blocks) for row in rows)), np.int32)
        for row, table in zip(rows, tables, strict=True):
            table[: len(row.req.blocks)] = row.req.blocks
        owner = np.repeat(np.arange(len(rows)), np.diff(begins))  # the row of each token
        columns = np.arange(num_tokens) - begins[owner] + starts[owner]
        slots = tables[owner, columns // block_size].astype(np.int64) * block_size + columns % block_size
        positions = np.minimum(columns, self._model.config.block_size - 1)
        spans = np.array([row.span for row in rows], np.int32)
        batch = RaggedBatch(*(torch.from_numpy(a).to(self._cache.device) for a in (begins, starts, spans, tables, slots)))
        return batch, torch.from_numpy(positions).to(self._cache.device)
