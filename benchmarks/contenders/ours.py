"""This repository's engine, in the process: the same driver, scheduler and executor as the server's, with its limits."""

import time
from collections.abc import Sequence

from batching.policies import POLICIES
from batching.scheduler import Scheduler
from benchmarks.contenders.contender import Missing, Session, Setup
from benchmarks.workload import Job, serve
from config import CPU_BATCH_SIZE, GPU_BATCH_SIZE, Settings
from model.engine import load_model, make_executor


class Engine(Session):
    """Mode dynamic for a crowd, nobatch for a request alone."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        if dtype == "int8" and setup.device != "cpu":
            raise Missing("int8 runs on a CPU")
        loaded = load_model("gpt2-medium", str(setup.checkpoint), dtype, setup.device, fall_back=False)
        usual = Settings()
        seats = CPU_BATCH_SIZE if loaded.device.type == "cpu" else GPU_BATCH_SIZE
        limits = (seats, usual.token_budget, usual.max_queue, usual.kv_memory_gb)
        self._executor, self._limits = make_executor(loaded, time.perf_counter, *limits)
        self.dtype = loaded.dtype

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        policy = POLICIES["dynamic" if len(jobs) > 1 else "nobatch"]()
        requests, _ = serve(Scheduler(policy, self._limits), self._executor, jobs, time.perf_counter)
        for req in requests:
            if req.error:
                raise req.error
        return [req.tokens[req.prompt_len :] for req in requests]
