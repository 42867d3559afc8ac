"""Hugging Face's transformers, as it batches by itself: `generate` on a padded batch, and its continuous batching."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.contenders.contender import Session, Setup
from benchmarks.workload import AT_ONCE, LENGTHS, VOCAB_SIZE, Job

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAD = VOCAB_SIZE - 1
NEVER = -1  # an end-of-sequence token that no model draws
PAGE_SIZE = 16  # tokens; on a CPU pages of 256 are no faster
MAX_BATCH_TOKENS = 64  # on a CPU: there each token looks at all of the batch, and the default of 8192 halves the speed


def load(setup: Setup, dtype: str) -> Any:  # a GPT2LMHeadModel, whose own annotations mypy finds contradictory
    disable_progress_bar()
    model: Any = GPT2LMHeadModel.from_pretrained(setup.checkpoint, dtype=DTYPES[dtype], attn_implementation="sdpa")
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=PAD)
    return model.to(setup.device).eval()


def left_padded(sequences: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, both (B, T): each row's last token is in the last column."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences], device=device)
    return tokens, mask


class StaticBatch(Session):
    """All jobs as one rectangle, until the longest has its tokens: what the other rows hold beyond their own is waste."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        self._model = load(setup, dtype)
        self.dtype = dtype

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        tokens, mask = left_padded([prompt for prompt, _ in jobs], self._model.device)
        longest = max(length for _, length in jobs)
        rows = self._model.generate(tokens, attention_mask=mask, max_new_tokens=longest)[:, tokens.shape[1] :].tolist()
        return [row[:length] for row, (_, length) in zip(rows, jobs, strict=True)]


class ContinuousBatching(Session):
    """Its manager runs in a thread, as in `transformers serve`; each request brings its own number of tokens."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil, and need not
        model = load(setup, dtype)
        model.generation_config.eos_token_id = NEVER
        # Left to itself it takes 60 % of a machine's memory for its cache. All jobs fit into this one.
        pages = AT_ONCE * 2 * LENGTHS[1] // PAGE_SIZE
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=pages,
            max_batch_tokens=MAX_BATCH_TOKENS if setup.device == "cpu" else None,
            allow_block_sharing=False,
        )
        self._manager = model.init_continuous_batching(continuous_batching_config=config)
        self._manager.warmup()
        self._manager.start()
        self.dtype = dtype

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        ids = [self._manager.add_request(prompt, max_new_tokens=length) for prompt, length in jobs]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the thread of continuous batching has ended")
            elif result.error:
                raise RuntimeError(result.error)
            elif result.is_finished():
                outputs[result.request_id] = result.generated_tokens
        return [outputs[i] for i in ids]

    def close(self) -> None:
        self._manager.stop(block=True)
