"""/v1/batches: creating, looking up, listing, cancelling, and what is refused."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from jobs.records import BatchError, Line, Status

from .store_app import create_store_app

LEFT_OUT = ...


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    app = create_store_app(tmp_path)
    yield app
    app.extensions["store"].close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def file_id(client: FlaskClient) -> str:
    form = {"purpose": "batch", "file": (io.BytesIO(b"{}\n"), "requests.jsonl")}
    id: str = client.post("/v1/files", data=form).get_json()["id"]
    return id


def create(client: FlaskClient, file_id: str, **fields: Any) -> TestResponse:
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"} | fields
    return client.post("/v1/batches", json={name: value for name, value in body.items() if value is not LEFT_OUT})


def error_of(response: TestResponse) -> dict[str, Any]:
    error: dict[str, Any] = response.get_json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def test_a_new_batch_is_as_openai_has_it_and_wakes_the_runner(app: Flask, client: FlaskClient, file_id: str) -> None:
    batch = create(client, file_id, metadata={"class": "5b"}).get_json()
    assert app.extensions["runner"].woken == 1
    assert client.get(f"/v1/batches/{batch['id']}").get_json() == batch
    assert batch.pop("id").startswith("batch_")
    assert batch.pop("expires_at") - batch.pop("created_at") == 24 * 3600
    never = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    assert batch == {
        "object": "batch",
        "endpoint": "/v1/completions",
        "model": None,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        **{f"{event}_at": None for event in never},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"class": "5b"},
    }


def test_a_batch_shows_what_became_of_it(app: Flask, client: FlaskClient, file_id: str) -> None:
    store = app.extensions["store"]
    done, rejected = (create(client, file_id).get_json()["id"] for _ in range(2))
    store.accept(done, [Line(1, "a", 0, 2, 0)], "demo")
    store.finish(done, Status.EXPIRED, ("batch_expired", "late"))
    shown = client.get(f"/v1/batches/{done}").get_json()
    assert (shown["status"], shown["model"], shown["request_counts"]["total"]) == ("expired", "demo", 1)
    assert b"batch_expired" in client.get(f"/v1/files/{shown['error_file_id']}/content").data
    store.reject(rejected, [BatchError("invalid_url", "url: ...", 1, "url")])
    shown = client.get(f"/v1/batches/{rejected}").get_json()
    fault = {"code": "invalid_url", "message": "url: ...", "line": 1, "param": "url"}
    assert shown["errors"] == {"object": "list", "data": [fault]}


@pytest.mark.parametrize(("window", "seconds"), [("1s", 1), ("90s", 90), ("5m", 300), ("24h", 86400), ("7d", 7 * 86400)])
def test_a_completion_window_may_be_short_for_a_lesson(client: FlaskClient, file_id: str, window: str, seconds: int) -> None:
    batch = create(client, file_id, completion_window=window).get_json()
    assert batch["completion_window"] == window
    assert batch["expires_at"] - batch["created_at"] == seconds


FIELDS = [
    *(("input_file_id", value, "id of a file") for value in (LEFT_OUT, None, 5, ["a"], {})),
    ("input_file_id", "\ud800", "surrogate"),
    *(("endpoint", value, "/v1/completions") for value in (LEFT_OUT, None, 5, "/v1/chat/completions", "", [])),
    *(("completion_window", value, "between 1s and 7d") for value in (LEFT_OUT, None, 24, "", "24", "0s", "8d", "169h")),
    *(("completion_window", value, "between 1s and 7d") for value in ("1.5h", "-1h", "1w", " 1h", "1h\n", "1" * 5000, "٣h")),
    *(("metadata", value, "at most 16 pairs") for value in ("a", [], 5, False, {str(n): "" for n in range(17)})),
    *(("metadata", value, "64 characters") for value in ({"x" * 65: ""}, {"a": "x" * 513}, {"a": 5}, {"a": None})),
    *((name, {}, "unknown field") for name in ("output_expires_after", "priority", "\ud800")),
]


@pytest.mark.parametrize(("field", "value", "limit"), FIELDS, ids=[f"{f}-{ascii(v)[:12]}" for f, v, _ in FIELDS])
def test_a_field_that_will_not_do_is_named_with_its_limit(
    app: Flask, client: FlaskClient, file_id: str, field: str, value: Any, limit: str
) -> None:
    response = create(client, file_id, **{field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == field
    assert field in error["message"]
    assert limit in error["message"]
    assert len(error["message"]) < 300
    assert app.extensions["runner"].woken == 0
    assert client.get("/v1/batches").get_json()["data"] == []


def test_metadata_up_to_its_limits_comes_back(client: FlaskClient, file_id: str) -> None:
    metadata = {"k" * 62 + f"{number:02}": "ü" * 512 for number in range(16)}
    assert create(client, file_id, metadata=metadata).get_json()["metadata"] == metadata
    assert create(client, file_id, metadata=None).get_json()["metadata"] == {}


def test_an_input_file_has_to_be_there_and_meant_for_it(app: Flask, client: FlaskClient) -> None:
    response = create(client, "file-0")
    assert response.status_code == 404
    assert (error_of(response)["param"], error_of(response)["code"]) == ("input_file_id", "not_found")
    output = app.extensions["store"].add_file([b"x"], "out", "batch_output")
    response = create(client, output.id)
    assert response.status_code == 400
    assert "batch_output" in error_of(response)["message"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(client: FlaskClient, body: bytes) -> None:
    response = client.post("/v1/batches", data=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "body"


def test_a_body_over_1_mib_is_413(client: FlaskClient) -> None:
    response = client.post("/v1/batches", data=b"x" * (2 << 20))
    assert response.status_code == 413
    assert str(1 << 20) in error_of(response)["message"]


def test_batches_are_listed_newest_first_a_page_at_a_time(client: FlaskClient, file_id: str) -> None:
    ids = [create(client, file_id).get_json()["id"] for _ in range(22)]
    page = client.get("/v1/batches").get_json()
    assert [batch["id"] for batch in page["data"]] == ids[:1:-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[21], ids[2], True)
    page = client.get(f"/v1/batches?limit=2&after={ids[2]}").get_json()
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([ids[1], ids[0]], False)
    for query, status in (("limit=101", 400), ("limit=0", 400), ("after=batch_0", 404)):
        assert client.get(f"/v1/batches?{query}").status_code == status


@pytest.mark.parametrize("id", ["batch_0", "%ed%a0%80", "x" * 1000])
def test_an_unknown_batch_is_404(client: FlaskClient, id: str) -> None:
    for response in (client.get(f"/v1/batches/{id}"), client.post(f"/v1/batches/{id}/cancel")):
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"


def test_cancelling_wakes_the_runner_and_may_be_asked_for_twice(app: Flask, client: FlaskClient, file_id: str) -> None:
    id = create(client, file_id).get_json()["id"]
    first = client.post(f"/v1/batches/{id}/cancel").get_json()
    assert first["status"] == "cancelling"
    assert isinstance(first["cancelling_at"], int)
    assert client.post(f"/v1/batches/{id}/cancel").get_json() == first
    assert app.extensions["runner"].woken == 3


def test_cancelling_a_finished_batch_is_409(app: Flask, client: FlaskClient, file_id: str) -> None:
    id = create(client, file_id).get_json()["id"]
    app.extensions["store"].reject(id, [])
    response = client.post(f"/v1/batches/{id}/cancel")
    assert response.status_code == 409
    assert "failed" in error_of(response)["message"]
    assert app.extensions["runner"].woken == 1


def test_a_store_that_fails_is_500_and_the_next_call_is_answered(app: Flask, client: FlaskClient, file_id: str) -> None:
    app.extensions["store"].close()
    response = create(client, file_id)
    assert response.status_code == 500
    assert error_of(response)["code"] == "storage_failed"
    assert json.loads(client.get("/v1/batches/batch_0").data)["error"]["type"] == "server_error"
