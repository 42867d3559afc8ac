"""Iteration-level scheduling with reservation: Orca (Yu et al., OSDI'22, Algorithm 1).

Requests join and leave at every iteration, in arrival order, whole prompts, no preemption. A request joins only if the KV
slots of its longest possible output can be reserved, so it is reservation, not memory in use, that blocks the queue.
Selective batching (section 4.2) is the executor's: everything but attention runs on the flattened batch. Left out: pipelining
over several workers (section 4.1).
"""

from batching.policy import Limits, Plan, Policy, RequestView, View, too_large


class Orca(Policy):
    """Preempts: nobody.
    Reserves: KV for prompt and longest output, when a request joins.
    Prefix cache: not used: prompts run whole.
    """

    def refuses(self, req: RequestView, limits: Limits) -> str | None:
        return too_large(_max_tokens(req), limits)

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        for req in view.resident:
            plan.run_exactly(req, req.remaining)
        for req in view.waiting:
            if not plan.run_exactly(req, req.remaining, reserve=_max_tokens(req)):
                break  # head of line: nobody overtakes
        return plan


def _max_tokens(req: RequestView) -> int:
    """Algorithm 1's `req.max_tokens`: prompt and longest output."""
    return req.prompt_len + req.max_tokens
