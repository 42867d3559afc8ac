"""/v1/files: uploads, lists, contents, deletions, and what is refused."""

import io
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api import files
from jobs.records import Status

from .store_app import create_store_app


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    app = create_store_app(tmp_path)
    yield app
    app.extensions["store"].close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def upload(client: FlaskClient, content: bytes = b"{}\n", filename: str = "requests.jsonl", **fields: Any) -> TestResponse:
    form = {"purpose": "batch", "file": (io.BytesIO(content), filename)} | fields
    return client.post("/v1/files", data={name: value for name, value in form.items() if value is not None})


def error_of(response: TestResponse) -> dict[str, Any]:
    error: dict[str, Any] = response.get_json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def test_an_upload_is_answered_with_a_file_as_openai_has_it(client: FlaskClient) -> None:
    file = upload(client, b"12345").get_json()
    assert file.pop("id").startswith("file-")
    assert isinstance(file.pop("created_at"), int)
    assert file == {
        "object": "file", "bytes": 5, "filename": "requests.jsonl", "purpose": "batch", "status": "processed",
    }  # fmt: skip


def test_a_file_can_be_looked_up_read_and_deleted(client: FlaskClient) -> None:
    content = bytes(range(256)) * 4000
    file = upload(client, content).get_json()
    assert client.get(f"/v1/files/{file['id']}").get_json() == file
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert (answer.data, answer.content_type) == (content, "application/octet-stream")
    assert answer.content_length == len(content)
    deleted = client.delete(f"/v1/files/{file['id']}").get_json()
    assert deleted == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404


@pytest.mark.parametrize("id", ["file-0", "%ed%a0%80", "..%2Flock", "..", "x" * 1000, "%00"])
def test_an_unknown_file_is_404(client: FlaskClient, id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        response = client.open(f"/v1/files/{id}{path}", method=method)
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"
    assert client.get("/v1/files", query_string=f"after={id}").status_code == 404


def test_files_are_listed_a_page_at_a_time(client: FlaskClient) -> None:
    assert client.get("/v1/files").get_json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    added = [upload(client).get_json() for _ in range(3)]
    ids = [file["id"] for file in added]
    assert client.get("/v1/files").get_json()["data"] == added[::-1]
    page = client.get("/v1/files?limit=2").get_json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    page = client.get(f"/v1/files?limit=2&after={ids[1]}").get_json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == ([ids[0]], False)
    page = client.get("/v1/files?limit=3&order=asc&purpose=batch").get_json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids, False)
    assert client.get("/v1/files?purpose=batch_output").get_json()["data"] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "limit=-1", "limit=", "order=up", "order="])
def test_a_page_that_cannot_be_is_refused(client: FlaskClient, query: str) -> None:
    response = client.get(f"/v1/files?{query}")
    assert response.status_code == 400
    assert error_of(response)["param"] == query.split("=")[0]


@pytest.mark.parametrize("purpose", [None, "", "fine-tune", "batch_output", ["batch", "batch"]])
def test_a_purpose_other_than_batch_is_refused(client: FlaskClient, purpose: Any) -> None:
    response = upload(client, purpose=purpose)
    assert response.status_code == 400
    assert error_of(response)["param"] == "purpose"
    assert "batch" in error_of(response)["message"]


def test_a_part_of_a_form_without_a_name_is_refused(client: FlaskClient) -> None:
    body = b"--x\r\nContent-Disposition: form-data\r\n\r\nvalue\r\n--x--\r\n"
    response = client.post("/v1/files", data=body, content_type="multipart/form-data; boundary=x")
    assert response.status_code == 400
    assert error_of(response)["param"] == "form"
    assert "file, purpose" in error_of(response)["message"]


def test_a_form_without_one_file_is_refused(client: FlaskClient) -> None:
    two = [(io.BytesIO(b"x"), "a"), (io.BytesIO(b"x"), "b")]
    for file in (None, "not a file", two):
        response = upload(client, file=file)
        assert response.status_code == 400
        assert error_of(response)["param"] == "file"
    assert client.get("/v1/files").get_json()["data"] == []


def test_a_form_field_that_there_is_not_is_named(client: FlaskClient) -> None:
    response = upload(client, **{"expires_after[seconds]": "3600"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "expires_after[seconds]"


@pytest.mark.parametrize("body", [b"", b"{}", b"--x\r\n"])
def test_a_body_that_is_no_form_is_refused(client: FlaskClient, body: bytes) -> None:
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=x"):
        assert client.post("/v1/files", data=body, content_type=kind).status_code == 400


def test_a_file_may_be_larger_than_other_bodies_but_not_than_its_own_limit(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 2 << 20)
    assert upload(client, b"x" * (2 << 20)).get_json()["bytes"] == 2 << 20
    for size in ((2 << 20) + 1, 4 << 20):
        response = upload(client, b"x" * size)
        assert response.status_code == 413
        assert "at most 2" in error_of(response)["message"]
    assert len(client.get("/v1/files").get_json()["data"]) == 1


def test_a_form_that_is_too_large_in_another_way_is_told_in_which(client: FlaskClient) -> None:
    long = upload(client, purpose="x" * 600_000)
    many = client.post("/v1/files", data={f"field{i}": "x" for i in range(1001)} | {"file": (io.BytesIO(b""), "f")})
    for response in (long, many):
        assert response.status_code == 413
        assert "at most 1000 parts, and 500000 bytes in fields" in error_of(response)["message"]


def test_a_part_without_a_name_is_refused(client: FlaskClient) -> None:
    body = b'--b\r\nContent-Disposition: form-data; nme="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    response = client.post("/v1/files", data=body, content_type="multipart/form-data; boundary=b")
    assert response.status_code == 400


def test_200_mib_is_what_a_file_may_have(client: FlaskClient) -> None:
    too_long = {"CONTENT_LENGTH": str(201 << 20)}
    response = client.post("/v1/files", content_type="multipart/form-data; boundary=x", environ_overrides=too_long)
    assert response.status_code == 413
    assert str((200 << 20) + files.FORM_BYTES) in error_of(response)["message"]


def test_a_file_in_use_is_409(app: Flask, client: FlaskClient) -> None:
    id = upload(client).get_json()["id"]
    store = app.extensions["store"]
    batch = store.create_batch(id, "/v1/completions", "24h", 86400, {})
    response = client.delete(f"/v1/files/{id}")
    assert response.status_code == 409
    assert batch.id in error_of(response)["message"]
    store.cancel(batch.id)
    store.finish(batch.id, Status.CANCELLED)
    assert client.delete(f"/v1/files/{id}").status_code == 200


def test_a_full_disk_is_507_and_says_so(app: Flask, client: FlaskClient, tmp_path: Path) -> None:
    store = app.extensions["store"]
    kept = upload(client).get_json()["id"]
    store._rows(f"PRAGMA max_page_count = {store._rows('PRAGMA page_count')[0][0]}")
    while (response := upload(client, filename="x" * 200)).status_code == 200:
        assert len(store.files()) < 1000
    assert response.status_code == 507
    assert error_of(response)["code"] == "insufficient_storage"
    assert "disk is full" in error_of(response)["message"]
    assert client.get(f"/v1/files/{kept}/content").data == b"{}\n"
    assert len(list((tmp_path / "files").iterdir())) == len(store.files())


def test_an_upload_that_finds_no_room_before_it_is_stored_is_507_too(client: FlaskClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = head + b"x" * (3 << 20) + b"\r\n--x--\r\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        response = client.post("/v1/files", data=body, content_type="multipart/form-data; boundary=x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert response.status_code == 507
    assert tempfile.gettempdir() + ":" in error_of(response)["message"]


def test_a_content_that_was_taken_away_is_500_and_named(client: FlaskClient, tmp_path: Path) -> None:
    id = upload(client).get_json()["id"]
    (tmp_path / "files" / id).unlink()
    response = client.get(f"/v1/files/{id}/content")
    assert response.status_code == 500
    assert error_of(response)["code"] == "storage_failed"
    assert id in error_of(response)["message"]
