"""Stall-free batching: Sarathi-Serve (Agrawal et al., OSDI'24, arXiv 2403.02310, Algorithm 3).

Every running decode gets its token in every iteration; what is left of the token budget goes to unfinished prefills, then to
new requests, in chunks. A long prompt therefore delays nobody's next token by more than one bounded iteration, where Orca
runs it whole while all decodes wait. The budget is the largest whose predicted iteration time meets the limit on the time
between tokens (section 4.3). With the same budget `dynamic` makes the same plans; this is that plus the choice of the budget.

Left out: measuring the budget once, beforehand (here the step-time model gives it anew for each iteration, from the decodes at
hand and the chunk's context); tile quantization; pipeline parallelism.
"""

from bisect import bisect_left
from dataclasses import dataclass

from batching.params import Params, number
from batching.policies.dynamic import run_or_preempt
from batching.policy import Plan, Policy, RequestView, View
from batching.step_time import Load


@dataclass(frozen=True)
class SarathiParams(Params):
    tbt_slo_ms: float = number(0, 0, 3.6e6)  # limit on the time between tokens; 0: the engine's own, measured when it started


class Sarathi(Policy):
    """Preempts: the request that joined last, unfinished prompts before decodes; it recomputes.
    Reserves: nothing; blocks are taken as they fill.
    Prefix cache: used.
    """

    Params = SarathiParams

    def schedule(self, view: View, now: float) -> Plan:
        decodes = [req for req in view.resident if req.remaining == 1]
        prefills = [req for req in view.resident if req.remaining > 1]
        plan = Plan(view, self._budget(view, decodes, [*prefills, *view.waiting]))
        plan.release(*view.done)
        run_or_preempt(plan, decodes + prefills)
        if not plan.preempted:  # else memory is short, and nobody joins
            for req in view.waiting:
                if not plan.run(req):
                    break  # head of line: nobody overtakes
        return plan

    def _budget(self, view: View, decodes: list[RequestView], prefills: list[RequestView]) -> int:
        """Tokens: all decodes, and the longest chunk after them that lets the iteration end in time."""
        most = view.limits.token_budget - len(decodes)
        limit_s = (self.params.tbt_slo_ms or view.limits.tbt_slo_ms) / 1000
        load = Load.of((1, req.num_computed) for req in decodes)
        context = self._context(view, prefills[0]) if prefills else 0

        def too_long(chunk: int) -> bool:
            return view.step_time.bound(load.plus(chunk, context)) > limit_s

        chunk = bisect_left(range(1, most + 1), True, key=too_long)
        if not decodes and not chunk:
            chunk = view.limits.block_size  # a limit that cannot be kept slows, but stops nobody
        return len(decodes) + chunk

    def _context(self, view: View, req: RequestView) -> int:
        """Columns before the chunk: those computed, or those with which a new request joins from the prefix cache."""
        return req.num_computed or len(view.cached_prefix(req) or ()) * view.limits.block_size
