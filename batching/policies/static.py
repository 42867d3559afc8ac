"""Static batching: request-level, with a maximum size and a time-out (the baseline of the Orca paper, OSDI'22, figure 3; what
Triton Inference Server and TF Serving call dynamic batching).

Collects requests, then runs them as one rectangle: every prompt padded to the longest, every row kept until the longest
output is finished. Nobody joins and nobody is answered before. The padding is really computed, so its cost can be measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from batching.blocks import blocks_for
from batching.params import Params, number
from batching.policy import Limits, Plan, Policy, RequestView, View


@dataclass(frozen=True)
class StaticParams(Params):
    batch_timeout_ms: float = number(50.0, 0, 60_000)


class Static(Policy):
    """Preempts: nobody.
    Reserves: KV for the whole rectangle, when the batch begins.
    Prefix cache: not used: prompts run whole.
    """

    Params: ClassVar[type[Params]] = StaticParams
    columns = 0  # the rectangle's width so far: longest prompt + tokens generated

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        if view.resident:
            self.go_on(plan, view)
            return plan

        plan.release(*view.done)
        batch = rectangle(view.waiting, view.limits, plan.free_blocks)
        if not batch:
            return plan
        start = batch[0].arrival + self.params.batch_timeout_ms / 1000
        full = len(batch) == view.limits.max_batch_size or len(batch) < len(view.waiting)
        if now < start and not full:
            plan.wait_until(start)
            return plan
        self.start(plan, batch)
        return plan

    def start(self, plan: Plan, batch: Sequence[RequestView], longest: float = inf) -> int:
        """All prompts, each padded to the longest. Returns the width that outputs of at most `longest` tokens give it."""
        self.columns = max(req.remaining for req in batch)
        width = self.columns + int(min(longest, max(req.to_generate for req in batch))) - 1
        for req in batch:
            plan.run_exactly(req, req.remaining, pad=self.columns - req.remaining, reserve=width)
        return width

    def go_on(self, plan: Plan, view: View) -> None:
        """A column of every row, also of those that have finished, until the last one has."""
        self.columns += 1
        for req in view.resident:
            plan.run_exactly(req, req.remaining, span=self.columns)
        for req in view.done:
            plan.keep(req, span=self.columns)


def rectangle(queue: Iterable[RequestView], limits: Limits, free_blocks: int, longest: float = inf) -> list[RequestView]:
    """The longest head of `queue` whose padded prompts, padded outputs (of at most `longest`) and seats the engine can hold."""
    prompt = output = 0
    batch: list[RequestView] = []
    for req in queue:
        prompt, rows = max(prompt, req.remaining), len(batch) + 1
        output = max(output, int(min(longest, req.to_generate)))
        blocks = rows * blocks_for(prompt + output - 1, limits.block_size)
        too_wide = prompt + output - 1 > limits.max_context or rows * prompt > limits.max_prefill_tokens
        if rows > limits.max_batch_size or too_wide or blocks > free_blocks:
            break
        batch.append(req)
    return batch
