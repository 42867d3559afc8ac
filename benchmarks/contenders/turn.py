"""A contender's turn, in a process of its own: load, warm up, serve both workloads, end. So only one model at a time is in
memory, and nobody's waiting threads take time from another.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from benchmarks import workload
from benchmarks.contenders.contender import Contender, Missing, Session, Setup
from benchmarks.workload import Job


@dataclass(frozen=True)
class Done:
    """A workload served."""

    tokens: int
    seconds: float
    first_tokens: tuple[int, ...]  # of each job

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Turn:
    """`dtype`: the one that was computed in, where the contender chose it."""

    dtype: str
    w1: Done
    w2: Done


def take_turn(contender: Contender, setup: Setup) -> Turn:
    """Raises Missing, or whatever the contender raises."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_turn, contender, setup).result()


def _turn(contender: Contender, setup: Setup) -> Turn:
    try:
        session = contender.open(setup, contender.dtype)
    except ModuleNotFoundError as error:
        raise Missing(f"not installed: {error.name}") from None
    try:
        w1, w2 = workload.all_at_once(device=setup.device), workload.one_at_a_time()
        if session.limit_s == math.inf:
            for jobs in (w1, w2[:1]):  # a quarter of the way, through every size of a batch
                session.serve([(prompt, length // 4) for prompt, length in jobs])
        return Turn(session.dtype, serve(session, [w1]), serve(session, [[job] for job in w2]))
    finally:
        session.close()


def serve(session: Session, batches: Sequence[Sequence[Job]]) -> Done:
    """One batch after another. Raises RuntimeError unless each job gets its number of tokens, or the time is over."""
    started = time.perf_counter()
    outputs: list[Sequence[int]] = []
    for jobs in batches:
        if time.perf_counter() - started < session.limit_s:
            outputs += session.serve(jobs)
    seconds = time.perf_counter() - started
    lengths = [len(output) for output in outputs]
    wanted = [length for jobs in batches for _, length in jobs]
    if seconds < session.limit_s and lengths != wanted:
        raise RuntimeError(f"gave {lengths} tokens instead of {wanted}")
    return Done(sum(lengths), seconds, tuple(output[0] for output in outputs))
