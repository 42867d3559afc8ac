"""Dynamic SplitFuse: DeepSpeed-FastGen (Holmes et al. 2024, arXiv 2401.08671, section 3; the scheduler is in DeepSpeed-MII).

A long prompt is split over several forward passes and short ones are combined, so that every forward has exactly `token_budget`
tokens as long as there is a backlog: a device's throughput saturates at some number of tokens, and steps of equal size take
equal time. Generated tokens go first. The choice of tokens is that of `sarathi` and `dynamic` on simple input; memory is
treated differently. A prompt is begun only if the KV blocks for all of it are free, so that none stays half computed for want
of memory. Where a generating request finds no block, the one admitted last is preempted to the tail of the queue, and later
prefills its prompt and generated tokens again, behind those that waited longer for their first token.

Left out: tensor parallelism, load balancing between replicas.
"""

from batching.policies.dynamic import run_or_preempt
from batching.policy import Plan, Policy, View


class SplitFuse(Policy):
    """Preempts: the last one, to the tail of the queue; it recomputes.
    Reserves: nothing, but a prompt begins only where KV for all of it is free.
    Prefix cache: used.
    """

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        run_or_preempt(plan, sorted(view.resident, key=lambda req: req.remaining > 1), to_tail=True)
        if not plan.preempted:  # else memory is short, and nobody joins
            for req in view.waiting:
                if not plan.run(req, reserve=req.num_tokens):
                    break  # head of line: nobody overtakes
        return plan
