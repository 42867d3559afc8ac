"""A model with its paged cache, driven chunk by chunk, as the tests need it: block tables in random order, caches poisoned."""

import random

import torch

from kernels.batch import RaggedBatch
from model.gpt import GPT
from model.kv_cache import KVCache


class PagedRun:
    def __init__(
        self, model: GPT, sequences: int, block_size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        config = model.config
        per_sequence = -(-config.block_size // block_size)
        order = list(range(sequences * per_sequence))
        random.Random(seed).shuffle(order)
        self.model = model
        self.tables = [order[i * per_sequence : (i + 1) * per_sequence] for i in range(sequences)]
        self.computed = [0] * sequences
        self.cache = KVCache(
            config.n_layer, len(order), block_size, config.n_head, config.head_size, dtype, torch.device("cpu")
        )
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(1e4)  # whoever reads a column that was never written will show

    @torch.inference_mode()
    def step(self, chunks: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """One forward over the next tokens of several sequences; the logits (n, vocab) of each chunk's n tokens."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        begins, starts = [0], []
        size = self.cache.block_size
        for sequence, chunk in chunks:
            start, table = self.computed[sequence], self.tables[sequence]
            tokens += chunk
            begins.append(len(tokens))
            starts.append(start)
            positions += range(start, start + len(chunk))
            slots += [table[c // size] * size + c % size for c in range(start, start + len(chunk))]
            self.computed[sequence] += len(chunk)
        tables = torch.tensor([self.tables[sequence] for sequence, _ in chunks], dtype=torch.int32)
        numbers = (torch.tensor(n, dtype=torch.int32) for n in (begins, starts, [0] * len(chunks)))
        batch = RaggedBatch(*numbers, tables, torch.tensor(slots))
        everything = torch.arange(len(tokens))
        logits = self.model(torch.tensor(tokens), torch.tensor(positions), self.cache, batch, everything)
        return list(logits.split([len(chunk) for _, chunk in chunks]))
