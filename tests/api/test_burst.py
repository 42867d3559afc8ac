"""POST /burst: many requests at once, made by the server, the same ones each time."""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from api.burst import read_burst
from batching.loop import Engine
from batching.request import Priority

from .conftest import PATIENCE_S, Gate, Server
from .server_process import wait_for

GOOD = {"requests": 12, "prompt_tokens": [4, 9], "num_tokens": [2, 7], "deferred": 0.25}


def test_a_burst_is_answered_at_once_and_runs_to_the_end(server: Server) -> None:
    assert server.client.post("/burst", json=GOOD).get_json() == {"taken": 12, "refused": 0}
    wait_for(lambda: server.stats()["requests_finished"] == 12, PATIENCE_S, "all of the burst")
    latency = server.stats()["latency"]
    assert (latency["deferred"]["requests"], latency["immediate"]["requests"]) == (3, 9)


def test_a_burst_larger_than_the_queue_says_how_many_were_refused(serve: Any, gate: Gate) -> None:
    server = serve(max_queue=10)
    gate.close()
    answer = server.client.post("/burst", json=GOOD | {"requests": 50}).get_json()
    assert answer["taken"] + answer["refused"] == 50
    assert 10 <= answer["taken"] < 50


def test_the_same_burst_has_the_same_requests(engine: Engine) -> None:
    def shown(body: dict[str, Any]) -> list[tuple]:
        return [(r.tokens, r.max_tokens, r.priority, r.sampling) for r in read_burst(body, engine, 0.0)]

    assert shown(GOOD) == shown(GOOD)
    several = [shown(GOOD | {"seed": seed}) for seed in (0, 1, 5, -5)]
    assert all(one != other for one, other in combinations(several, 2))
    assert shown(GOOD | {"seed": -1}) != shown(GOOD | {"seed": -1}), "no seed, as on the other routes"


def test_lengths_and_classes_are_those_asked_for(engine: Engine) -> None:
    requests = read_burst(GOOD | {"requests": 200}, engine, 5.0)
    assert {req.prompt_len for req in requests} == {4, 9}
    assert {req.max_tokens for req in requests} == {2, 7}
    assert Counter(req.priority for req in requests) == {Priority.DEFERRED: 50, Priority.IMMEDIATE: 150}
    assert {req.arrival for req in requests} == {5.0}
    assert len({req.id for req in requests}) == 200


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("requests", 0, "between 1 and 2000"),
        ("requests", 2001, "between 1 and 2000"),
        ("requests", None, "between 1 and 2000"),
        ("prompt_tokens", [], "a list of at most 32"),
        ("prompt_tokens", [1] * 33, "a list of at most 32"),
        ("prompt_tokens", [0], "between 1 and 511"),
        ("num_tokens", "8", "between 1 and 511"),
        ("num_tokens", [True], "between 1 and 511"),
        ("num_tokens", 510, "at most 512"),
        ("deferred", 1.1, "between 0 and 1"),
        ("seed", 2**63, f"between {-(2**63)} and"),
        ("length", 5, "allowed: requests"),
    ],
)
def test_a_field_that_will_not_do_is_named_with_its_limit(server: Server, field: str, value: Any, limit: str) -> None:
    response = server.client.post("/burst", json=GOOD | {field: value})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == field
    assert limit in response.get_json()["error"]["message"]


def test_only_the_teacher_fires_bursts(serve: Any) -> None:
    server = serve(teacher_key="chalk")
    assert server.client.post("/burst", json=GOOD).status_code == 403
    with_key = server.client.post("/burst", json=GOOD, headers={"Authorization": "Bearer chalk"})
    assert with_key.status_code == 200


def test_a_burst_can_be_called_off_and_nobody_elses_request_is(server: Server, gate: Gate) -> None:
    gate.close()
    other = server.later(num_tokens=3)
    server.wait_for_load(running=1, queue_depth=0)
    for _ in range(2):
        server.client.post("/burst", json=GOOD)
    assert server.client.delete("/burst").get_json() == {"called_off": 24}
    gate.open()
    assert other.result(PATIENCE_S).status_code == 200
    server.wait_for_load(running=0, queue_depth=0)
    stats = server.stats()
    assert (stats["requests_finished"], stats["errors"], stats["kv_use"]) == (1, {"cancelled": 24}, 0)
    assert server.client.delete("/burst").get_json() == {"called_off": 0}


def test_what_of_a_burst_is_answered_is_not_called_off(server: Server) -> None:
    server.client.post("/burst", json=GOOD)
    wait_for(lambda: server.stats()["requests_finished"] == 12, PATIENCE_S, "all of the burst")
    assert server.client.delete("/burst").get_json() == {"called_off": 0}


def test_only_the_teacher_calls_bursts_off(serve: Any) -> None:
    assert serve(teacher_key="chalk").client.delete("/burst").status_code == 403
