"""Dynamic batching as the LLM field means it: continuous, iteration-level (Orca), with paged KV (Kwon et al. 2023), chunked
prefill under a token budget (Sarathi-Serve) and recompute preemption. The rule is that of vLLM's V1 scheduler.

Left out: prefix caching, swapping, priorities (see `mixed`).
"""

from collections.abc import Iterable

from batching.policy import Planner, Policy, View
from batching.request import Request


class Dynamic(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.release(*view.done)
        run_or_preempt(plan, view.resident, ranking=list(view.resident))
        if not plan.preempted:  # else memory is short, and nobody joins
            for req in view.waiting:
                if not plan.run(req):
                    break  # head of line: nobody overtakes
        return plan


def run_or_preempt(plan: Planner, running: Iterable[Request], ranking: list[Request]) -> None:
    """Each of `running` in turn gets its tokens; where blocks are short, the last of `ranking` goes, possibly the one that
    asked. Ends when the step is full."""
    for req in running:
        while req not in plan.preempted and not plan.run(req):
            if plan.refusal != "blocks":
                return
            victim = ranking.pop()
            plan.preempt(victim)
            plan.because(victim, f"preempted: request {req.id} needs its KV blocks")
