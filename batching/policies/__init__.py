"""Every batching scheme, one file each. `POLICIES` is the only place that knows them by name: add yours here."""

from batching.policies.batchllm import BatchLLM
from batching.policies.deadline import Deadline
from batching.policies.dynamic import Dynamic
from batching.policies.fastserve import FastServe
from batching.policies.flover import Flover
from batching.policies.mixed import Mixed
from batching.policies.nobatch import NoBatch
from batching.policies.orca import Orca
from batching.policies.sarathi import Sarathi
from batching.policies.sequence import SequenceScheduling
from batching.policies.splitfuse import SplitFuse
from batching.policies.static import Static
from batching.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "nobatch": NoBatch,
    "static": Static,
    "orca": Orca,
    "dynamic": Dynamic,
    "mixed": Mixed,
    "sarathi": Sarathi,
    "splitfuse": SplitFuse,
    "fastserve": FastServe,
    "sequence": SequenceScheduling,
    "flover": Flover,
    "batchllm": BatchLLM,
    "deadline": Deadline,
}


def mode_of(policy: Policy) -> str:
    """The name under which a policy is registered; its class name for one that is not."""
    return next((name for name, cls in POLICIES.items() if type(policy) is cls), type(policy).__name__)
