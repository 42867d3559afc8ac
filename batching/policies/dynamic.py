"""Dynamic batching as the LLM field means it: continuous, iteration-level (Orca), with paged KV (Kwon et al. 2023), chunked
prefill under a token budget (Sarathi-Serve) and recompute preemption. The rule is that of vLLM's V1 scheduler.

Cached prefixes are not recomputed, but no request waits for a prefix that another is still computing (see `batchllm`).

Left out: swapping, priorities (see `mixed`).
"""

from batching.policy import Plan, Policy, RequestView, View


class Dynamic(Policy):
    """Preempts: the request that joined last, where KV blocks are short; it recomputes.
    Reserves: nothing; blocks are taken as they fill.
    Prefix cache: used.
    """

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        run_or_preempt(plan, list(view.resident))
        if not plan.preempted:  # else memory is short, and nobody joins
            for req in view.waiting:
                if not plan.run(req):
                    break  # head of line: nobody overtakes
        return plan


def run_or_preempt(plan: Plan, running: list[RequestView], to_tail: bool = False) -> None:
    """Each in turn gets its tokens; where blocks are short, the last one goes, possibly the one that asked."""
    planned = 0
    while planned < len(running):
        if plan.run(running[planned]):
            planned += 1
        elif plan.refusal == "blocks":
            victim = running.pop()
            plan.preempt(victim, to_tail=to_tail)
            plan.because(victim, "preempted: others need its KV blocks")
        else:
            return  # the step is full
