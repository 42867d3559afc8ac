"""No batching: first come, first served, one request at a time. The baseline: the device idles between small steps, and
latency grows with the queue."""

from batching.policy import Plan, Policy, View


class NoBatch(Policy):
    """Preempts: nobody.
    Reserves: nothing; the one request has all memory.
    Prefix cache: not used.
    """

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        req = next(iter(view.resident or view.waiting), None)
        if req:
            plan.run_exactly(req, req.remaining)
        return plan
