"""GET /steps and GET /events over the real engine: the same records as a list and as a stream, and a most of viewers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.test import TestResponse

from batching.step_log import SCHEMA
from client.shared import schema

from .conftest import PATIENCE_S, Gate, Server
from .server_process import wait_for


def events(response: TestResponse) -> Iterator[str]:
    """The events of a stream, as they come."""
    for piece in response.response:
        yield piece if isinstance(piece, str) else piece.decode()


def data(event: str) -> Any:
    return json.loads(next(line for line in event.splitlines() if line.startswith("data: "))[6:])


def all_steps(server: Server, query: str = "") -> dict[str, Any]:
    response = server.client.get("/steps" + query)
    assert response.status_code == 200, response.text
    value: dict[str, Any] = response.get_json()
    return value


def ask_and_settle(server: Server, num_tokens: int) -> None:
    """A record is published when the next step is planned, or found to be none: after the answer."""
    before = all_steps(server, "?limit=1")["last"]
    assert server.ask(num_tokens=num_tokens).status_code == 200
    wait_for(lambda: all_steps(server, "?limit=1")["last"] == before + num_tokens, PATIENCE_S, "all records")


def test_steps_are_listed_oldest_first_with_what_a_reader_needs_to_draw_them(server: Server) -> None:
    assert all_steps(server)["steps"] == []
    ask_and_settle(server, 4)
    answer = all_steps(server)
    assert answer["schema"] == SCHEMA == schema.STEPS, "the client reads what this server writes"
    assert answer["slots"] == answer["limits"]["max_batch_size"] == 8
    assert answer["last"] == 4
    assert [step["id"] for step in answer["steps"]] == [1, 2, 3, 4]
    assert [step["cells"] for step in answer["steps"]] == ["p", "d", "d", "d"]
    assert sum(step["tokens"] for step in answer["steps"]) == 4
    assert answer["steps"][3]["done"][0][4] == 4


def test_after_and_limit_choose_a_page_of_the_steps(server: Server) -> None:
    ask_and_settle(server, 6)
    assert [step["id"] for step in all_steps(server, "?after=2&limit=3")["steps"]] == [3, 4, 5]
    assert all_steps(server, "?after=6")["steps"] == []


@pytest.mark.parametrize(
    ("path", "param", "limit"),
    [
        ("/steps?after=x", "after", "9007199254740992"),
        ("/steps?after=-1", "after", "9007199254740992"),
        ("/steps?limit=10001", "limit", "10000"),
        ("/events?after=1e3", "after", "9007199254740992"),
    ],
)
def test_a_place_that_will_not_do_is_named_with_its_limit(server: Server, path: str, param: str, limit: str) -> None:
    response = server.client.get(path)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param
    assert limit in response.get_json()["error"]["message"]


def test_the_stream_begins_with_how_the_engine_stands_and_goes_on_with_records(server: Server, gate: Gate) -> None:
    with server.client.get("/events") as response:
        assert response.mimetype == "text/event-stream"
        stream = events(response)
        idle = {"mode": "dynamic", "queue": 0, "running": 0, "kv": 0.0, "first_step": 1, "padding_share": 0.0}
        assert data(next(stream)) == idle
        server.later(num_tokens=5)
        found: list[dict[str, Any]] = []
        while len(found) < 5:
            event = next(stream)
            found += data(event)
            assert event.startswith(f"id: {found[-1]['id']}\n")
    assert found == all_steps(server)["steps"]


def test_the_stream_goes_on_where_it_broke_off(server: Server) -> None:
    ask_and_settle(server, 5)
    for given in ({"headers": {"Last-Event-ID": "3"}}, {"query_string": "after=3"}):
        with server.client.get("/events", **given) as response:  # type: ignore[arg-type]
            assert [step["id"] for step in data(next(events(response)))] == [4, 5]


def test_an_idle_stream_tells_that_somebody_reset_the_statistics(server: Server) -> None:
    ask_and_settle(server, 5)
    with server.client.get("/events") as response:
        stream = events(response)
        assert data(next(stream))["first_step"] == 1
        assert server.client.post("/stats/reset").status_code == 200
        assert data(next(stream))["first_step"] == server.stats()["first_step"] == 6


def test_an_idle_stream_tells_that_somebody_switched_the_mode(server: Server) -> None:
    with server.client.get("/events") as response:
        stream = events(response)
        next(stream)
        assert server.client.put("/mode", json={"mode": "orca"}).status_code == 200
        assert data(next(stream))["mode"] == "orca"


def test_there_is_a_most_of_viewers_and_who_leaves_makes_room(server: Server) -> None:
    viewers = server.extensions["viewers"]
    viewers.most = 2
    first, second = server.client.get("/events"), server.client.get("/events")
    refused = server.client.get("/events")
    assert refused.status_code == 429
    assert refused.get_json()["error"]["code"] == "too_many_viewers"
    assert "2 viewers" in refused.get_json()["error"]["message"]
    assert "Retry-After" in refused.headers
    next(events(first))
    first.close()
    second.close()  # never read
    assert viewers.count == 0
    with server.client.get("/events") as again:
        assert again.status_code == 200


def test_more_viewers_get_fewer_events_each(server: Server) -> None:
    viewers = server.extensions["viewers"]
    viewers.count = 1
    assert viewers.pause_s == 0.1
    viewers.count = 64
    assert viewers.pause_s == 1.28


def test_the_stream_ends_when_the_server_does(server: Server) -> None:
    with server.client.get("/events") as response:
        stream = events(response)
        next(stream)
        server.loop.drain("the test is over")
        server.loop.join(PATIENCE_S)
        assert list(stream) == []
