"""Batches from upload to output file, as OpenAI's own client sees them: over the real server and the demo model."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from . import kills
from .server_process import ServerProcess, wait_for

Start = Callable[..., ServerProcess]
DEMO = ("--model", "demo", "--dtype", "fp32", "--device", "cpu")
PATIENCE_S = 60
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def server(start_process: Start) -> ServerProcess:
    return start_process("mixed", *DEMO, "--max-batch-size", "8").wait_until_ready()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "demo", "prompt": f"Chapter {custom_id}", "max_tokens": 8, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": asked | body}


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in lines)
    return client.files.create(file=("lines.jsonl", io.BytesIO(text.encode())), purpose="batch").id


def create(client: openai.OpenAI, lines: list[Any], window: str = "24h", **fields: Any) -> Any:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint="/v1/completions", completion_window=window, **fields
    )


def ended(client: openai.OpenAI, id: str) -> Any:
    def look() -> Any:
        batch = client.batches.retrieve(id)
        return batch if batch.status in ENDED else None

    return wait_for(look, PATIENCE_S, f"{id} has ended")


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The entries of an output or error file by custom_id."""
    if file_id is None:
        return {}
    entries = [json.loads(entry) for entry in client.files.content(file_id).text.splitlines()]
    assert len({entry["custom_id"] for entry in entries}) == len(entries), "each line once"
    return {entry["custom_id"]: entry for entry in entries}


def test_a_batch_gives_each_line_the_answer_it_would_get_alone(client: openai.OpenAI) -> None:
    lines = [line(f"l{i}", max_tokens=4 + i % 5) for i in range(40)]
    batch = create(client, lines, metadata={"course": "cs101"})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"course": "cs101"})
    done = ended(client, batch.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 40, 0)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at <= done.expires_at
    assert done.expires_at - done.created_at == 24 * 3600
    assert done.error_file_id is None
    entries = read(client, done.output_file_id)
    assert list(entries) == [entry["custom_id"] for entry in lines], "in the order of the input"
    for entry in lines[::10]:
        answer = entries[entry["custom_id"]]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        alone = client.completions.create(**entry["body"])
        assert answer["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
        assert answer["response"]["body"]["usage"] == alone.usage.model_dump(exclude_none=True)
    assert batch.id in [one.id for one in client.batches.list(limit=5)]


def test_lines_run_as_deferred_requests(client: openai.OpenAI, server: ServerProcess) -> None:
    before = server.stats()["latency"]["deferred"]["requests"]
    ended(client, create(client, [line("a"), line("b", n=3)]).id)
    assert server.stats()["latency"]["deferred"]["requests"] == before + 4


def test_a_line_that_will_not_do_costs_only_itself(client: openai.OpenAI) -> None:
    lines = [line("good"), line("hot", temperature=9), line("long", max_tokens=5000), line("stream", stream=True)]
    done = ended(client, create(client, lines).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 3)
    assert list(read(client, done.output_file_id)) == ["good"]
    errors = read(client, done.error_file_id)
    assert {name: entry["response"]["status_code"] for name, entry in errors.items()} == {
        "hot": 400,
        "long": 400,
        "stream": 400,
    }
    assert errors["hot"]["response"]["body"]["error"]["param"] == "temperature"


def test_a_file_with_faults_fails_with_their_lines(client: openai.OpenAI) -> None:
    lines = [
        line("a"), "{not json", line("a"), {**line("b"), "url": "/v1/embeddings"}, line("c", model="gpt-4"),
        {key: value for key, value in line("d").items() if key != "custom_id"},
    ]  # fmt: skip
    done = ended(client, create(client, lines).id)
    assert done.status == "failed"
    assert [(error.line, error.code) for error in done.errors.data] == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url"), (5, "model_not_found"),
        (6, "missing_required_parameter"),
    ]  # fmt: skip
    assert done.output_file_id is None


def test_a_window_that_is_too_short_ends_as_expired_with_what_was_done(client: openai.OpenAI) -> None:
    lines = [line(f"l{i}", max_tokens=400, ignore_eos=True, n=4) for i in range(200)]
    done = ended(client, create(client, lines, "2s").id)
    assert done.status == "expired"
    assert done.expires_at - done.created_at in (2, 3)
    good, left = read(client, done.output_file_id), read(client, done.error_file_id)
    assert len(good) + len(left) == 200
    assert len(left) > 0
    assert {entry["error"]["code"] for entry in left.values()} == {"batch_expired"}
    assert done.request_counts.completed == len(good)


def test_a_cancelled_batch_keeps_what_was_done(client: openai.OpenAI, server: ServerProcess) -> None:
    lines = [line(f"l{i}", max_tokens=300, ignore_eos=True) for i in range(200)]
    batch = create(client, lines)
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0, PATIENCE_S, "some lines are done")
    with pytest.raises(openai.ConflictError, match=batch.id):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    good, left = read(client, done.output_file_id), read(client, done.error_file_id)
    assert len(good) == done.request_counts.completed > 0
    assert len(good) + len(left) == 200
    assert {entry["error"]["code"] for entry in left.values()} == {"batch_cancelled"}
    wait_for(lambda: server.stats()["running"] == 0, PATIENCE_S, "nothing runs for it any more")
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_errors_are_the_packages_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        client.files.content("file-none")
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        create(client, [line("a")], "8d")
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(
            input_file_id=upload(client, [line("a")]),
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=io.BytesIO(b"x"), purpose="fine-tune")


def test_immediate_requests_find_room_beside_a_batch(client: openai.OpenAI, server: ServerProcess) -> None:
    batch = create(client, [line(f"l{i}", max_tokens=200, ignore_eos=True) for i in range(100)])
    wait_for(lambda: server.stats()["running"] == 8, PATIENCE_S, "the batch has taken all seats")
    begun = time.monotonic()
    assert client.completions.create(model="demo", prompt="The", max_tokens=2).usage is not None
    took = time.monotonic() - begun
    assert client.batches.retrieve(batch.id).status == "in_progress", f"answered after {took} s, before the batch"
    assert any("preempted" in decision["why"] for decision in server.stats()["decisions"])
    client.batches.cancel(batch.id)
    assert ended(client, batch.id).status == "cancelled"


def test_a_second_server_on_the_folder_is_refused(server: ServerProcess, start_process: Start) -> None:
    folder = server.data_dir
    second = start_process("dynamic", *DEMO, "--data-dir", str(folder))
    assert second.wait() == 1
    assert len(second.stderr) == 1
    assert "--data-dir" in second.stderr[0]
    assert "in use by another server (process" in second.stderr[0]
    assert requests.get(server.url + "/health", timeout=10).status_code == 200


def test_a_batch_survives_five_kills_with_each_result_once(tmp_path: Path) -> None:
    outcome = kills.run(tmp_path, 5, seed=1, max_tokens=60)
    assert outcome["never_fewer_than_before"], "what was counted stays counted"
    assert outcome["killed_while"].get("in_progress", 0) >= 3, "most of them met a batch that ran"
    assert (outcome["results"], outcome["lines_with_a_result"]) == (500, 500)
    assert outcome["counts"] == {"total": 500, "completed": 500, "failed": 0}
    assert outcome["error_file_id"] is None
