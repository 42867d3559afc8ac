"""Dynamic batching as the LLM field means it: continuous, iteration-level (Orca), with paged KV (Kwon et al. 2023), chunked
prefill under a token budget (Sarathi-Serve) and recompute preemption. The rule is that of vLLM's V1 scheduler.

Left out: prefix caching, swapping, priorities (see `mixed`).
"""

from batching.policy import Planner, Policy, View
from batching.request import Request


class Dynamic(Policy):
    def schedule(self, view: View, now: float) -> Planner:
        plan = Planner(view)
        plan.release(*view.done)
        run_or_preempt(plan, list(view.resident))
        if not plan.preempted:  # else memory is short, and nobody joins
            for req in view.waiting:
                if not plan.run(req):
                    break  # head of line: nobody overtakes
        return plan


def run_or_preempt(plan: Planner, running: list[Request], victims: list[Request] | None = None) -> None:
    """Each of `running` in turn gets its tokens; where blocks are short, the last of `victims`, else of `running`, goes."""
    planned = 0
    while planned < len(running) and plan.budget:
        if plan.run(running[planned]):
            planned += 1
        else:
            plan.preempt((victims or running).pop())  # possibly the one that asked: then it waits
