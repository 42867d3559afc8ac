"""Temporal fusion: Flover (Yao et al., HiPC 2023, arXiv 2305.13484).

Prompts have a lane of their own, and all decodes are fused into one loop that never stops for a prompt: a step holds prefills
only or decodes only. After its prefill a request joins the loop in the next free slot. Slots are contiguous, since the paper's
kernels read one buffer: when requests end, the last ones move into the holes. KV memory is reserved for the longest output.

Where lanes compute side by side (in virtual time with `Limits(lanes=2)`) a prompt delays no decode; on the real engine they
take turns, a step each. Left out: the second CUDA stream that it would need, what two lanes on one device cost each other, and
tensor parallelism. Prompts that wait together are one prefill step, where the paper has an instance for each. With a paged
cache nothing has to be contiguous: a move changes the order of the rows, and copies nothing.
"""

from collections.abc import Sequence
from itertools import takewhile

from batching.policy import Plan, Policy, RequestView, View
from batching.request import Lane, State


class Flover(Policy):
    """Preempts: nobody.
    Reserves: KV for prompt and longest output, when a request joins.
    Prefix cache: not used: prompts run whole.
    """

    lanes = (Lane.PREFILL, Lane.MAIN)
    turns = lanes  # the lane that had its turn last comes last
    slots: tuple[RequestView, ...] = ()  # of the fused loop

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        for lane, other in (self.turns, self.turns[::-1]):
            plan.lane = lane
            if lane not in view.busy and (_prefill(plan, view) if lane is Lane.PREFILL else self._decode(plan, view)):
                self.turns = (other, lane)
                break
        return plan

    def _decode(self, plan: Plan, view: View) -> int:
        """One token for each slot. Returns for how many."""
        live = [req.state is State.RESIDENT for req in self.slots]
        slots = list(self.slots)
        for source, hole in moves(live):
            slots[hole] = slots[source]
            plan.because(slots[hole], f"moved from slot {source} to slot {hole}")
        slots = slots[: sum(live)]
        for req in slots:
            plan.run_exactly(req, 1)
        slots += [req for req in view.resident if req not in plan and plan.run_exactly(req, 1)]  # prefilled since the last step
        self.slots = tuple(slots)
        return len(slots)


def _prefill(plan: Plan, view: View) -> int:
    """Whole prompts in the order of arrival, as many as fit. Returns how many."""
    joining = list(takewhile(lambda req: plan.run_exactly(req, req.remaining, reserve=req.kv_peak), view.waiting))
    return len(joining)


def moves(live: Sequence[bool]) -> list[tuple[int, int]]:
    """The fewest moves (from slot, to slot) after which the live slots are the first ones."""
    count = sum(live)
    holes = [slot for slot in range(count) if not live[slot]]
    beyond = [slot for slot in range(count, len(live)) if live[slot]]
    return list(zip(beyond, holes, strict=True))
