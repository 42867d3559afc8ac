"""The dynamic mode of effective-batching (https://github.com/lievan/effective-batching), the teaching server this one began as.

Requests join and leave at every iteration, but nothing is kept from one to the next: each computes every sequence again,
from its first token, padded to the longest. The algorithm alone, written anew over the GPT-2 of transformers.
"""

import time
from collections.abc import Sequence

import torch

from benchmarks.contenders.contender import Session, Setup
from benchmarks.contenders.transformers_peer import left_padded, load
from benchmarks.workload import Job

MAX_BATCH_SIZE = 64


class EffectiveBatching(Session):
    """Hopeless with long outputs, and so cut off after `limit_s`: what counts is the tokens up to then."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        self._model = load(setup, dtype)
        self.dtype = dtype
        self.limit_s = setup.limit_s

    @torch.inference_mode()
    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        until = time.perf_counter() + self.limit_s
        sequences = [list(prompt) for prompt, _ in jobs]
        goals = [len(prompt) + length for prompt, length in jobs]
        while time.perf_counter() < until:
            unfinished = [i for i, sequence in enumerate(sequences) if len(sequence) < goals[i]]
            if not unfinished:
                break
            running = unfinished[:MAX_BATCH_SIZE]
            for i, token in zip(running, self._iterate([sequences[i] for i in running]), strict=True):
                sequences[i].append(token)
        return [sequence[len(prompt) :] for sequence, (prompt, _) in zip(sequences, jobs, strict=True)]

    def _iterate(self, sequences: list[list[int]]) -> list[int]:
        """The next token of each."""
        tokens, mask = left_padded(sequences, self._model.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = self._model(tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        next_tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return next_tokens
