"""Preemption between any two iterations by a skip-join multi-level feedback queue: FastServe (Wu et al. 2023, arXiv 2305.05920,
sections 4.1 and 4.2). The queue itself is `support/feedback_queue.py`.

Output lengths are unknown, so short jobs are found by trial: queue k grants `base_ms * 2^k` of running time, a request that
exhausts its quantum is demoted one queue, and higher queues run first. A request skips the queues whose quantum is shorter than
its prefill; one that has waited longer than `alpha_s` returns to queue 0. Preempted requests keep their KV blocks and go on
where they were. Where blocks are short, the request expected to resume last loses its blocks and recomputes.

Left out: proactive swapping, which moves such KV to host memory instead and back in time; pipeline parallelism. Whole prompts
run in one iteration, as in Orca.
"""

from dataclasses import dataclass

from batching.blocks import blocks_for
from batching.params import Params, number
from batching.policies.support.feedback_queue import FeedbackQueue
from batching.policy import Plan, Policy, RequestView, View
from batching.request import State
from batching.step_time import Load


@dataclass(frozen=True)
class FastServeParams(Params):
    base_ms: float = number(10, 0.01, 3.6e6)  # the quantum of queue 0
    alpha_s: float = number(10, 0, 1e9)  # a request that has waited longer returns to it


class FastServe(Policy):
    """Preempts: whoever is behind in the queues, between any two steps; the preempted keep their KV while there is room.
    Reserves: nothing.
    Prefix cache: not used: prompts run whole.
    """

    Params = FastServeParams

    def __init__(self, params: FastServeParams | None = None) -> None:
        super().__init__(params)
        self.queue = FeedbackQueue(self.params.base_ms / 1000, self.params.alpha_s)
        self._ran: set[RequestView] = set()  # in the last plan, made at:
        self._planned_at = 0.0

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)

        def prefill_s(req: RequestView) -> float:
            return view.step_time.predict(Load().plus(req.remaining, 0))

        self.queue.update((*view.resident, *view.waiting), self._ran, now - self._planned_at, now, prefill_s)
        ranking = self.queue.ranking()
        full = False  # somebody found no room: nobody joins behind it
        for req in ranking:
            if full and req.state is State.WAITING:
                continue
            while req not in plan.preempted and req not in plan.dropped and not plan.run_exactly(req, req.remaining):
                victim = self._victim(plan, req, ranking, view, now)
                if victim is None:
                    full = full or plan.refusal in ("slots", "blocks")
                    break
                plan.preempt(victim, keep_kv=plan.refusal == "slots")
                plan.because(
                    victim, f"preempted in queue {self.queue.queue_of(victim)}: request {req.id} lacked {plan.refusal}"
                )
        self._ran, self._planned_at = {req for req in ranking if req in plan}, now
        return plan

    def _victim(self, plan: Plan, req: RequestView, ranking: list[RequestView], view: View, now: float) -> RequestView | None:
        """Of those behind `req`, who gives way to it; nobody if even all of them would not help."""
        behind = ranking[: ranking.index(req) : -1]
        holding = [other for other in behind if other.blocks and other not in plan.dropped]
        lacks = blocks_for(req.num_tokens, view.limits.block_size) - len(req.blocks) - plan.free_blocks
        if plan.refusal not in ("slots", "blocks") or sum(len(other.blocks) for other in holding) < lacks:
            return None
        if plan.refusal == "slots":
            return next((other for other in behind if other.state is State.RESIDENT and other not in plan.preempted), None)
        wait_s = self.queue.until_next_run(view.limits.max_batch_size, now)
        return max(holding, key=lambda other: wait_s[other])
