"""Which of several engines gets a request: a router in front of them, as on a cluster. It sees what passes through it,
requests and answers, and what the engines learned of themselves; it moves nobody later on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batching.request import Request
from batching.step_time import Load
from simulator.virtual import Replica


@dataclass
class Seen:
    """A router's books of one engine: what it was sent and has not answered."""

    replica: Replica
    requests: int = 0
    tokens: int = 0  # prompts and outputs of those requests, whole


class Router:
    """`rule` is one of ROUTERS. `answered` has to be called with every answer."""

    def __init__(self, replicas: Sequence[Replica], rule: str) -> None:
        self._seen = [Seen(replica) for replica in replicas]
        self._cost = ROUTERS[rule]
        self._next = 0

    def route(self, req: Request) -> Replica:
        """The engine that gets it: the cheapest by the rule, of equal ones the next in turn."""
        turn = self._seen[self._next :] + self._seen[: self._next]
        chosen = min(turn, key=lambda seen: self._cost(seen, req))
        self._next = (self._seen.index(chosen) + 1) % len(self._seen)
        chosen.requests += 1
        chosen.tokens += _size(req)
        return chosen.replica

    def answered(self, place: int, req: Request) -> None:
        """An engine, by its place, has answered."""
        self._seen[place].requests -= 1
        self._seen[place].tokens -= _size(req)


def _size(req: Request) -> int:
    return req.prompt_len + req.max_tokens


def _in_turn(seen: Seen, req: Request) -> float:
    return 0.0


def _requests(seen: Seen, req: Request) -> float:
    return seen.requests


def _tokens(seen: Seen, req: Request) -> float:
    return seen.tokens


def _wait(seen: Seen, req: Request) -> float:
    """Predicted seconds until `req` has its first token, by the step times that the engine has learned and the state at the end
    of its step: all prompts before its own, and where no seat is free, the outputs of all who go before, spread over the
    seats."""
    scheduler = seen.replica.driver.scheduler
    model, seats = scheduler.step_times[0], scheduler.limits.max_batch_size
    ahead = scheduler.live
    prompts = sum(max(0, other.prompt_len - other.num_computed) for other in ahead) + req.prompt_len
    steps = sum(other.max_tokens - other.num_generated for other in ahead) / seats if len(ahead) >= seats else 0.0
    return model.predict(Load(prefill=prompts)) + steps * model.recent_s


ROUTERS: dict[str, Callable[[Seen, Request], float]] = {
    "round-robin": _in_turn,
    "least-requests": _requests,
    "least-tokens": _tokens,
    "shortest-wait": _wait,
}
