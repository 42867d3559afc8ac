"""Which server answered, and in which mode: by this a client knows that a comparison is one."""

import json
from collections.abc import Callable

from .conftest import PATIENCE_S, Server

HEADER = "BatchLab-Instance"


def completion(server: Server, **fields: object) -> dict[str, object]:
    return {"model": "demo", "prompt": "The king", "max_tokens": 3} | fields


def test_every_answer_names_the_server_that_gave_it(server: Server) -> None:
    name = server.stats()["instance"]
    client = server.client
    answers = [
        client.get("/health"),
        client.get("/stats"),
        client.put("/mode", json={"mode": "static"}),
        server.ask(),
        client.post("/v1/completions", json=completion(server, stream=True)),
        client.post("/inference", json={"prompt": ""}),
        client.get("/no-such-route"),
    ]
    assert [answer.headers[HEADER] for answer in answers] == [name] * len(answers)


def test_another_start_is_another_name(serve: Callable[..., Server]) -> None:
    assert serve().stats()["instance"] != serve().stats()["instance"]


def test_a_completion_tells_the_mode_in_which_it_was_served(server: Server) -> None:
    for mode in ("static", "mixed"):
        assert server.client.put("/mode", json={"mode": mode}).status_code == 200
        whole = server.client.post("/v1/completions", json=completion(server, n=2, seed=1)).get_json()
        assert [choice["mode"] for choice in whole["choices"]] == [mode] * 2
        streamed = server.client.post("/v1/completions", json=completion(server, stream=True, seed=1)).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        told = [choice.get("mode") for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert told == [mode]


def test_stats_count_how_often_the_policy_was_changed(server: Server) -> None:
    before = server.stats()["policy_changes"]
    for mode in ("static", "static", "dynamic"):
        assert server.put_mode_later(mode).result(PATIENCE_S).status_code == 200
    assert server.stats()["policy_changes"] == before + 3
