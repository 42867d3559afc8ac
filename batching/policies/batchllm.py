"""Offline batches with shared prefixes: BatchLLM (Zheng et al. 2024, arXiv 2412.03594).

All that waits is known, so its prefixes are too: requests are grouped by the prefix that saves the most prefill
(`support/prefix_tree.py`) and a group runs together, while the prefix is in memory; an LRU cache alone would often have
evicted it before the next request of the group came along. Groups with much decoding for their prefill come first, so that
their decodes fill the steps in which later groups prefill. Admission goes by KV memory: a request joins where all the memory
it may come to need is free, so that nobody is preempted and no prefix computed twice; sequence slots bind only where the
engine has too few.

The first of a group computes the prefix, the others join when it is in the cache. Left out: the attention kernel that reads a
prefix once for the whole group, keeping a prefix for the rest of its group against all others (here LRU is relied upon, with
groups in a row), predicted output lengths (`max_tokens` stands for them), priorities: for deferred and immediate requests
in one batch see `mixed`.
"""

from batching.policies.support.prefix_tree import Group, prefix_groups
from batching.policy import Plan, Policy, RequestView, View


class BatchLLM(Policy):
    """Preempts: nobody.
    Reserves: KV for prompt and longest output, when a request joins.
    Prefix cache: used; requests that share a prefix run together.
    """

    def __init__(self, params: object = None) -> None:
        super().__init__(params)
        self._order: dict[RequestView, int] = {}  # places in the line, by group

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        for req in sorted(view.resident, key=lambda req: req.remaining):  # decodes, then what is left of prompts
            plan.run(req)
        if not view.waiting or any(req not in self._order for req in view.waiting):
            self._order = _line_up(view)
        for req in sorted(view.waiting, key=self._order.__getitem__):
            if not plan.prefix_coming(req) and not plan.run(req, reserve=req.kv_peak):
                break
        return plan


def _line_up(view: View) -> dict[RequestView, int]:
    """The requests, group after group, those with the most decoding for their prefill first; by arrival within a group."""
    waiting, block_size = view.waiting, view.limits.block_size
    paths = [view.prefix_keys(req) for req in waiting]

    def decode_ratio(group: Group) -> float:
        members = [waiting[place] for place in group.members]
        prefill = sum(req.remaining for req in members) - (len(members) - 1) * group.depth * block_size
        return sum(req.to_generate for req in members) / prefill

    groups = sorted(prefix_groups(paths), key=decode_ratio, reverse=True)
    return {waiting[place]: i for i, place in enumerate(place for group in groups for place in sorted(group.members))}
