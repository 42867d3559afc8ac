"""The requests that the benchmarks serve: seeded, so that every contender and every run gets the same ones; and how the engine
serves them."""

import random
from collections.abc import Callable, Sequence

from batching.driver import Driver
from batching.request import Request
from batching.scheduler import Scheduler
from batching.step import Executor

VOCAB_SIZE = 50257
LENGTHS = (16, 128)  # tokens of a prompt, and of an output: both uniform
AT_ONCE, AT_ONCE_GPU = 64, 512
ONE_AT_A_TIME = 8

Job = tuple[list[int], int]  # a prompt's token ids, and how many tokens have to come back


def all_at_once(seed: int = 0, device: str = "cpu") -> list[Job]:
    """W1: 64 requests that are all there at the start; 512 for a GPU, which would hardly notice 64."""
    rng = random.Random(seed)
    count = AT_ONCE if device == "cpu" else AT_ONCE_GPU
    return [([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(*LENGTHS))], rng.randint(*LENGTHS)) for _ in range(count)]


def one_at_a_time(seed: int = 0) -> list[Job]:
    """W2: the first 8 of those, each to be sent when the one before it is answered."""
    return all_at_once(seed)[:ONE_AT_A_TIME]


def serve(
    scheduler: Scheduler, executor: Executor, jobs: Sequence[Job], clock: Callable[[], float]
) -> tuple[list[Request], float]:
    """The requests, all there at the start and all answered, and the seconds that took on `clock`."""
    driver = Driver(scheduler, clock, lambda req: None)
    requests = [Request(str(i), list(prompt), length) for i, (prompt, length) in enumerate(jobs)]
    for req in requests:
        driver.submit(req)
    started = clock()
    while driver.iterate(executor) is not None:
        pass
    return requests, clock() - started
