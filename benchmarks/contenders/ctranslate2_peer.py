"""CTranslate2's Generator, with the checkpoint converted by its own classes."""

import os
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from ctranslate2.converters.transformers import GPT2Loader
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.contenders.checkpoint import made_once
from benchmarks.contenders.contender import Missing, Session, Setup
from benchmarks.workload import VOCAB_SIZE, Job

COMPUTE_TYPES = {"int8": "int8", "bf16": "bfloat16", "fp32": "float32"}
CROWD = 2  # batches at a time, each on its share of the cores and with its share of 64 requests: the fastest of those tried
TOKENS = [f"<{i}>" for i in range(VOCAB_SIZE)]  # it takes and gives texts of tokens; only their ids matter


class CTranslate2(Session):
    def __init__(self, setup: Setup, dtype: str) -> None:
        if setup.device != "cpu":
            raise Missing("measured on a CPU only")
        if COMPUTE_TYPES[dtype] not in ctranslate2.get_supported_compute_types("cpu"):
            raise Missing(f"CTranslate2 has no {COMPUTE_TYPES[dtype]} on this CPU")
        path = setup.checkpoint.with_name(f"{setup.checkpoint.name}.ctranslate2")
        folder = made_once(path, lambda part: convert(setup.checkpoint, part))
        cores = len(os.sched_getaffinity(0))
        self._alone, self._crowd = (
            ctranslate2.Generator(
                str(folder),
                compute_type=COMPUTE_TYPES[dtype],
                inter_threads=at_a_time,
                intra_threads=max(1, cores // at_a_time),
            )
            for at_a_time in (1, CROWD)
        )
        self.dtype = dtype

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        """One call: CTranslate2 sorts the prompts by length and cuts them into batches, which it serves side by side.
        Of a batch's prompts it computes as many tokens at once as the shortest has, and the rest one by one."""
        longest = max(length for _, length in jobs)
        generated = [0] * len(jobs)

        def has_all(result: ctranslate2.GenerationStepResult) -> bool:
            generated[result.batch_id] += 1
            return generated[result.batch_id] == jobs[result.batch_id][1]

        results = (self._alone if len(jobs) == 1 else self._crowd).generate_batch(
            [[TOKENS[token] for token in prompt] for prompt, _ in jobs],
            max_batch_size=-(-len(jobs) // CROWD),
            max_length=longest,
            min_length=longest,
            include_prompt_in_result=False,
            callback=has_all,
        )
        return [result.sequences_ids[0] for result in results]


def convert(checkpoint: Path, folder: Path) -> None:
    """In float32; CTranslate2 converts to other types as it loads."""
    disable_progress_bar()
    spec = GPT2Loader().get_model_spec(GPT2LMHeadModel.from_pretrained(checkpoint))
    spec.register_vocabulary(TOKENS)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = TOKENS[-1]
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(str(folder))
