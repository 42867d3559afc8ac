"""Runs a step on the model: flattens its rows into one ragged batch, computes, samples. It keeps the KV cache; which block
belongs to whom it is told by the scheduler.

Padding is really computed: a static batch's padding columns and the finished rows that keep their seats go through every
layer, their K and V to slots of the same row that real tokens will overwrite.
"""

from collections.abc import Callable

import torch

from batching.step import Row, Step, StepResult
from kernels.ragged_attention import RaggedBatch, make_row
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
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []  # the place of each row's last real token
        ragged = []
        block_size = self._cache.block_size
        last_position = self._model.config.block_size - 1
        for row in rows:
            columns = range(row.start, row.start + row.count + row.pad)
            table = self._tensor(row.req.blocks)
            ragged.append(make_row(len(tokens), row.start, len(columns), table, block_size, row.span))
            ends.append(len(tokens) + max(row.count, 1) - 1)
            tokens += row.req.tokens[row.start : row.start + row.count] + [0] * row.pad
            positions += [min(column, last_position) for column in columns]
            slots += [row.req.blocks[column // block_size] * block_size + column % block_size for column in columns]
        drawn = [(row, end) for row, end in zip(rows, ends, strict=True) if row.samples or row.count == 0]
        logits = self._model(
            self._tensor(tokens),
            self._tensor(positions),
            self._cache,
            RaggedBatch(ragged, self._tensor(slots)),
            self._tensor([end for _, end in drawn]),
        )[:, : self._vocab_size]
        indices = [len(row.req.tokens) - row.req.prompt_len for row, _ in drawn]
        sampled = sample(logits, [row.req.sampling for row, _ in drawn], indices)
        return {row.req.id: token for (row, _), token in zip(drawn, sampled, strict=True) if row.samples}

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._cache.device)
