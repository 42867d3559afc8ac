"""What goes wrong under a batch, and costs no more than it must: over the app in this process, the real store and model."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Gate, Server
from .server_process import wait_for

PATIENCE_S = 30


def line(name: str, **body: Any) -> str:
    asked = {"model": "demo", "prompt": f"Chapter {name}", "max_tokens": 4, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": asked})


def create(server: Server, lines: list[str], window: str = "1h") -> str:
    content = io.BytesIO("\n".join(lines).encode())
    file = server.client.post("/v1/files", data={"purpose": "batch", "file": (content, "lines.jsonl")}).get_json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": window}
    id: str = server.client.post("/v1/batches", json=asked).get_json()["id"]
    return id


def look(server: Server, id: str) -> dict[str, Any]:
    batch: dict[str, Any] = server.client.get(f"/v1/batches/{id}").get_json()
    return batch


def reached(server: Server, id: str, status: str) -> dict[str, Any]:
    wait_for(lambda: look(server, id)["status"] == status, PATIENCE_S, f"{status}, not {look(server, id)}")
    return look(server, id)


def entries(server: Server, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    content = server.client.get(f"/v1/files/{file_id}/content").get_data(as_text=True)
    return {entry["custom_id"]: entry for entry in map(json.loads, content.splitlines())}


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve("mixed")


def test_a_full_disk_fails_the_batch_it_met_and_nothing_else(server: Server, gate: Gate) -> None:
    gate.close()
    id = create(server, [line(f"l{i}", echo=True, prompt="word " * 200) for i in range(60)])
    reached(server, id, "in_progress")
    pages = server.store._db.execute("PRAGMA page_count").fetchone()[0]
    server.store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    gate.open()
    failed = reached(server, id, "failed")
    assert [error["code"] for error in failed["errors"]["data"]] == ["insufficient_storage"]
    assert "disk is full" in failed["errors"]["data"][0]["message"]
    assert server.ask().status_code == 200
    wait_for(lambda: server.loop.stats()["running"] == 0, PATIENCE_S, "what was under way for it is cancelled")
    server.store._db.execute(f"PRAGMA max_page_count = {pages + 10_000}")
    assert reached(server, create(server, [line("again")]), "completed")["request_counts"]["completed"] == 1


def test_a_full_disk_where_not_even_the_failure_can_be_written_is_told_as_soon_as_there_is_room(
    server: Server, gate: Gate
) -> None:
    gate.close()
    id = create(server, [line(f"l{i}") for i in range(3)])
    reached(server, id, "in_progress")
    server.store._db.execute("PRAGMA query_only = ON")  # every write fails
    gate.open()
    wait_for(lambda: server.loop.stats()["requests_finished"] >= 3, PATIENCE_S, "the engine has done its part")
    assert server.ask().status_code == 200
    server.store._db.execute("PRAGMA query_only = OFF")
    wait_for(lambda: look(server, id)["status"] in ("failed", "completed"), PATIENCE_S, "the batch ends")


def test_a_damaged_line_costs_only_itself(server: Server, gate: Gate) -> None:
    gate.close()
    id = create(server, [line(f"l{i}") for i in range(40)])
    batch = reached(server, id, "in_progress")
    path = server.store._folder.files / batch["input_file_id"]
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"Chapter l35"))
        file.write(b"Chapter xxx")
    gate.open()
    done = reached(server, id, "completed")
    assert (done["request_counts"]["completed"], done["request_counts"]["failed"]) == (39, 1)
    (damaged,) = entries(server, done["error_file_id"]).values()
    assert (damaged["custom_id"], damaged["response"], damaged["error"]["code"]) == ("l35", None, "damaged_line")
    assert "line 36" in damaged["error"]["message"]


def test_a_step_that_fails_is_no_fault_of_its_lines(server: Server, gate: Gate) -> None:
    gate.failure = RuntimeError("the device hiccups")
    gate.seconds_a_step = 0.05
    id = create(server, [line(f"l{i}") for i in range(5)])
    wait_for(lambda: server.loop.stats()["errors"].get("step_failed", 0) >= 1, PATIENCE_S, "a step failed")
    gate.reset()
    done = reached(server, id, "completed")
    assert done["request_counts"] == {"total": 5, "completed": 5, "failed": 0}


def test_a_seeded_line_that_runs_again_after_a_failure_has_the_text_it_would_have_had(server: Server, gate: Gate) -> None:
    hot = {"temperature": 1, "seed": 11, "n": 2, "max_tokens": 8}
    asked = json.loads(line("a", **hot))["body"]
    alone = [choice["text"] for choice in server.client.post("/v1/completions", json=asked).get_json()["choices"]]
    gate.failure = RuntimeError("the device hiccups")
    gate.seconds_a_step = 0.05
    id = create(server, [line("a", **hot)])
    wait_for(lambda: server.loop.stats()["errors"].get("step_failed", 0) >= 1, PATIENCE_S, "a step failed")
    gate.reset()
    done = entries(server, reached(server, id, "completed")["output_file_id"])
    assert [choice["text"] for choice in done["a"]["response"]["body"]["choices"]] == alone


def test_a_line_that_fails_each_time_is_given_up(server: Server, gate: Gate) -> None:
    gate.failure = RuntimeError("the device is gone")
    done = reached(server, create(server, [line("a"), line("b")]), "completed")
    assert done["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    told = entries(server, done["error_file_id"])["a"]["response"]
    assert (told["status_code"], told["body"]["error"]["code"]) == (500, "step_failed")


def test_a_small_queue_holds_lines_back_and_leaves_room_for_others(serve: Callable[..., Server]) -> None:
    server = serve("mixed", max_batch_size=2, max_queue=4)
    id = create(server, [line(f"l{i}", n=3) for i in range(12)])
    for _ in range(5):
        assert server.ask().status_code == 200
    assert reached(server, id, "completed")["request_counts"]["completed"] == 12


def test_a_batch_goes_on_while_the_mode_is_switched(server: Server) -> None:
    id = create(server, [line(f"l{i}", max_tokens=20) for i in range(40)])
    for mode in ("static", "nobatch", "orca", "dynamic"):
        assert server.put_mode_later(mode).result(PATIENCE_S).status_code == 200
    assert reached(server, id, "completed")["request_counts"]["completed"] == 40


def test_batches_that_are_due_sooner_go_first(server: Server, gate: Gate) -> None:
    gate.seconds_a_step = 0.002
    slow = create(server, [line(f"l{i}", max_tokens=20) for i in range(150)], "24h")
    reached(server, slow, "in_progress")
    soon = create(server, [line(f"l{i}") for i in range(10)], "10m")
    reached(server, soon, "completed")
    assert look(server, slow)["status"] == "in_progress"
    server.client.post(f"/v1/batches/{slow}/cancel")
    reached(server, slow, "cancelled")


def test_what_a_draining_engine_did_not_finish_goes_on_after_the_next_start(
    serve: Callable[..., Server], gate: Gate, tmp_path: Path
) -> None:
    folder = str(tmp_path / "kept")
    first = serve("mixed", data_dir=folder)
    gate.seconds_a_step = 0.005
    id = create(first, [line(f"l{i}", max_tokens=20) for i in range(60)])
    wait_for(lambda: look(first, id)["request_counts"]["completed"] > 5, PATIENCE_S, "some lines are done")
    before = look(first, id)["request_counts"]["completed"]
    first.stop()
    done = reached(serve("dynamic", data_dir=folder), id, "completed")
    assert done["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    assert before < 60


def test_a_batch_waits_for_its_model_when_the_server_was_started_with_another(
    serve: Callable[..., Server], gate: Gate, tmp_path: Path
) -> None:
    folder = str(tmp_path / "kept")
    first = serve("mixed", data_dir=folder)
    gate.seconds_a_step = 0.005
    id = create(first, [line(f"l{i}", max_tokens=20) for i in range(60)])
    wait_for(lambda: look(first, id)["request_counts"]["completed"] > 0, PATIENCE_S, "some lines are done")
    first.stop()
    second = serve("mixed", data_dir=folder, served_model_name=("another",))
    before = look(second, id)
    assert second.ask().status_code == 200
    assert second.ask(num_tokens=50).status_code == 200
    assert look(second, id) == before
    second.stop()
    done = reached(serve("mixed", data_dir=folder), id, "completed")
    assert done["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
