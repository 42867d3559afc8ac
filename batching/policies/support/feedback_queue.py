"""A multi-level feedback queue with skip-join (FastServe, Wu et al. 2023, section 4.1): who runs before whom where nobody knows
how long a job will be. Queue k grants a quantum of `base_s * 2^k` seconds of running time.

Only bookkeeping: must not know what running means, nor decide who runs.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import count

from batching.view import RequestView


def first_queue(prefill_s: float, base_s: float) -> int:
    """Where a job joins: the first queue whose quantum covers its prefill, since less than that can give it no token."""
    return next(queue for queue in count() if base_s * 2**queue >= prefill_s)


@dataclass
class Job:
    queue: int
    place: int  # in the queue
    idle_since: float  # when it last ran; before that, when it joined the queue
    used_s: float = 0.0  # of the queue's quantum


class FeedbackQueue:
    def __init__(self, base_s: float, alpha_s: float) -> None:
        """`alpha_s`: who has been idle for longer returns to queue 0."""
        self._base_s = base_s
        self._alpha_s = alpha_s
        self._jobs: dict[RequestView, Job] = {}
        self._places = count()

    def update(
        self,
        live: Iterable[RequestView],
        ran: Collection[RequestView],
        seconds: float,
        now: float,
        prefill_s: Callable[[RequestView], float],
    ) -> None:
        """Those who `ran` have done so for `seconds` more. New ones join, who has used up a quantum goes one queue down, who
        has been idle for too long rises; who is not `live` any more is forgotten."""
        known, self._jobs = self._jobs, {}
        for req in live:
            job = known.get(req)
            if job and req in ran:
                job.used_s += seconds
                job.idle_since = now
            if job is None:
                job = self._join(first_queue(prefill_s(req), self._base_s), now)
            elif job.used_s >= self._quantum_s(job):
                job = self._join(job.queue + 1, now)
            elif job.queue and now - job.idle_since > self._alpha_s:
                job = self._join(0, now)
            self._jobs[req] = job

    def ranking(self) -> list[RequestView]:
        """Higher queues first, in each of them who joined it first."""
        return sorted(self._jobs, key=lambda req: (self._jobs[req].queue, self._jobs[req].place))

    def queue_of(self, req: RequestView) -> int:
        return self._jobs[req].queue

    def until_next_run(self, seats: int, now: float) -> dict[RequestView, float]:
        """The estimated next-schedule time (section 4.2), in seconds from now: after the quanta of all ahead, `seats` of which
        run at once, or when it returns to queue 0, if that is sooner."""
        wait_s, ahead_s = {}, 0.0
        for req in self.ranking():
            job = self._jobs[req]
            wait_s[req] = min(ahead_s / seats, self._alpha_s - (now - job.idle_since))
            ahead_s += self._quantum_s(job)
        return wait_s

    def _join(self, queue: int, now: float) -> Job:
        return Job(queue, next(self._places), now)

    def _quantum_s(self, job: Job) -> float:
        return self._base_s * 2**job.queue
