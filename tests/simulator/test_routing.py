"""Several engines behind a router."""

from functools import partial

import pytest

from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Limits
from batching.request import Request
from simulator.plans import Lengths, Plan, poisson_plan
from simulator.routing import ROUTERS, Router
from simulator.simulation import run
from simulator.step_times import Linear, Model
from simulator.virtual import OpenLoop, Replica, serve

PER_TOKEN = Model(Linear((0.5, 0.01, 0.05, 0.0, 0.0)), Limits(max_batch_size=4), "toy")


def routed(rule: str, requests: list[Request], engines: int = 2, slots: int = 64) -> list[list[str]]:
    """Which requests each engine got, a second a step, one at a time."""
    answered: list[list[str]] = [[] for _ in range(engines)]
    router: Router | None = None

    def on_answer(place: int, req: Request) -> None:
        answered[place].append(req.id)
        assert router is not None
        router.answered(place, req)

    limits = Limits(max_batch_size=slots)
    replicas = [Replica(NoBatch(), limits, lambda step: 1.0, partial(on_answer, place)) for place in range(engines)]
    router = Router(replicas, rule)
    serve(replicas, OpenLoop(requests), router.route)
    return answered


def test_round_robin_gives_each_its_turn_whatever_it_has_to_do():
    requests = [Request(name, [0], output, arrival=0.0) for name, output in (("a", 9), ("b", 1), ("c", 9), ("d", 1))]
    assert routed("round-robin", requests) == [["a", "c"], ["b", "d"]]


def test_least_requests_counts_who_is_not_answered_at_that_moment():
    requests = [Request("a", [0], 9), Request("b", [0], 1, arrival=0.1), Request("c", [0], 1, arrival=2.0)]
    assert routed("least-requests", requests) == [["a"], ["b", "c"]]
    early = [Request("a", [0], 3), Request("b", [0], 1, arrival=0.1), Request("c", [0], 1, arrival=0.5)]
    assert routed("least-requests", early) == [["a", "c"], ["b"]], "b's answer is on its way: the next in turn"


def test_least_tokens_knows_a_long_request_from_a_short_one():
    requests = [Request("long", [0] * 50, 9)] + [Request(f"short {i}", [0], 1, arrival=0.1) for i in range(3)]
    assert routed("least-tokens", requests) == [["long"], ["short 0", "short 1", "short 2"]]


def test_shortest_wait_looks_at_who_goes_before():
    full = [Request(f"{i}", [0] * 8, 40, arrival=0.001 * i) for i in range(3)]
    later = [Request("late", [0] * 8, 1, arrival=30.0)]
    engines = routed("shortest-wait", [*full, *later])
    assert sorted(len(served) for served in engines) == [2, 2]
    assert "late" in min(engines, key=lambda served: sum(name != "late" for name in served))


def test_shortest_wait_knows_how_long_a_taken_seat_stays_taken():
    requests = [Request("long", [0], 40), Request("short", [0], 10, arrival=0.1), Request("late", [0], 1, arrival=5.0)]
    assert routed("shortest-wait", requests, slots=1) == [["long"], ["short", "late"]]


@pytest.mark.parametrize("rule", ROUTERS)
def test_every_request_is_served_once_whichever_the_rule(rule: str):
    found = run(Dynamic, PER_TOKEN, poisson_plan(400, 4.0, Lengths(1, 60), Lengths(1, 30)), replicas=3, router=rule)
    assert sorted(found.columns.index) == list(range(400))
    assert not found.errors


def test_four_engines_serve_four_times_the_load_as_one_serves_its_own():
    def served(engines: int) -> float:
        plan = poisson_plan(1500 * engines, 1.5 * engines, Lengths(8, 8), Lengths(4, 4), seed=1)
        return run(Dynamic, PER_TOKEN, plan, replicas=engines, router="least-requests").summary()["e2el"]["mean"]

    assert served(4) < served(1), "they share their queues' luck"


def test_a_closed_loop_goes_round_several_engines():
    def draw():
        for index in range(12):
            yield Request(str(index), [0], 2)

    one_second = Model(Linear((1.0, 0.0, 0.0, 0.0, 0.0)), Limits(), "")
    found = run(NoBatch, one_second, Plan(12, draw, users=3), replicas=3, router="least-requests")
    assert sorted(found.columns.answered) == [2.0] * 3 + [4.0] * 3 + [6.0] * 3 + [8.0] * 3
