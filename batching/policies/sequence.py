"""Sequence scheduling: request-level batching by predicted length (Zheng et al., NeurIPS 2023, arXiv 2305.13144, section 4).

Predicts how long the answers of a window of requests will be (the paper's groups of 256), and sorts the window by it. From its
short end micro-batches are cut: requests whose predictions fall into one bucket, the more of them the shorter the bucket. Each
runs as a rectangle, really padded as under `static`, that ends at its bucket's length at the latest. Requests unfinished by
then were predicted too short and count as failures; the failures of a window run again in a last batch.

Left out: the language model as its own predictor (section 3; support/predictors.py has what there is instead). A failure goes
on from the text that it has, computed as part of its prompt, where the paper generates all of it anew. A remainder that fills
less than half of a batch joins the next bucket, as in the authors' code. Added is a time-out for windows that do not fill.
"""

from dataclasses import dataclass
from math import ceil

from batching.params import Params, choice, number
from batching.policies.static import Static, rectangle
from batching.policies.support.predictors import PREDICTORS
from batching.policy import Plan, RequestView, View


@dataclass(frozen=True)
class SequenceParams(Params):
    predictor: str = choice("oracle", PREDICTORS)  # of output lengths; `oracle` is given the true ones
    error: float = number(0.3, 0, 10)  # of the noisy oracle: a standard deviation, relative to the length
    window: int = number(256, 1, 1e6)  # requests
    bucket: int = number(50, 1, 1e6)  # tokens: the width of a bucket of lengths
    longest_batch: int = number(16, 1, 1e6)  # rows at least: the shortest bucket has all slots, each longer one half as many
    batch_timeout_ms: float = number(50, 0, 6e4)  # of a window that is not full


class SequenceScheduling(Static):
    """Preempts: failures of the prediction, which run again in the window's last batch.
    Reserves: KV for the whole rectangle, when a micro-batch begins.
    Prefix cache: not used: prompts run whole.
    """

    Params = SequenceParams
    window: frozenset[RequestView] = frozenset()
    end = 0  # the width at which the micro-batch ends

    def __init__(self, params: SequenceParams | None = None) -> None:
        super().__init__(params)
        self.predictor = PREDICTORS[self.params.predictor](self.params.error)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        if view.resident and self.columns < self.end:
            self.go_on(plan, view)
            return plan
        for req in view.done:
            self.predictor.learn(req)
        plan.release(*view.done)
        for req in view.resident:
            plan.preempt(req)
            plan.because(req, "failed: longer than predicted, runs again in the last batch of its window")
        if not view.resident and (window := self._window(plan, view, now)):
            ordered, longest = self._micro_batch(window, view.limits.max_batch_size)
            batch = rectangle(ordered, view.limits, plan.free_blocks, longest)
            self.end = self.start(plan, batch, longest) if batch else 0
        return plan

    def _window(self, plan: Plan, view: View, now: float) -> list[RequestView]:
        """What has not run of the window; else what failed in it; else the next window, once it is full or has waited."""
        new = [req for req in view.waiting if not req.preemptions]
        left = [req for req in new if req in self.window] or [req for req in view.waiting if req.preemptions]
        if left or not new:
            return left
        start = new[0].arrival + self.params.batch_timeout_ms / 1000
        if now < start and len(new) < self.params.window:
            plan.wait_until(start)
            return []
        self.window = frozenset(new[: self.params.window])
        return new[: self.params.window]

    def _micro_batch(self, window: list[RequestView], seats: int) -> tuple[list[RequestView], int]:
        """The shortest of the window, in order, and the length of their bucket."""
        lengths = {req: req.to_generate if req.preemptions else self.predictor.predict(req) for req in window}
        buckets = {req: ceil(length / self.params.bucket) for req, length in lengths.items()}
        window = sorted(window, key=lambda req: lengths[req])
        for bucket in sorted({*buckets.values()}):
            rows = min(seats, max(self.params.longest_batch, seats >> bucket - 1))
            batch = [req for req in window if buckets[req] <= bucket][:rows]
            if len(batch) >= rows / 2:
                break
        return batch, bucket * self.params.bucket
