"""A real store in a folder of its own, and batches in it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.check import check
from jobs.records import Batch, Result
from jobs.store import Store

ENDPOINT, MODEL = "/v1/completions", "demo"


def request_line(custom_id: str) -> bytes:
    body = {"model": MODEL, "prompt": "The king"}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"


def add_batch(store: Store, lines: int) -> Batch:
    """A batch that is being validated, of requests r1, r2, ..."""
    file = store.add_file([request_line(f"r{number}") for number in range(1, lines + 1)], "requests.jsonl", "batch")
    return store.create_batch(file.id, ENDPOINT, "24h", 86400, {})


def accept(store: Store, batch: Batch) -> Batch:
    with store.open_file(batch.input_file_id) as stream:
        lines, errors = check(stream, ENDPOINT, (MODEL,))
    assert not errors
    return store.accept(batch.id, lines, MODEL)


def result(batch: Batch, number: int, ok: bool = True, text: str = "") -> Result:
    return Result(batch.id, number, ok, json.dumps({"custom_id": f"r{number}", "text": text}))


def entries(store: Store, file_id: str | None) -> list[dict]:
    """The lines of an output or error file."""
    if file_id is None:
        return []
    with store.open_file(file_id) as file:
        content = file.read()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def assert_no_orphans(store: Store, folder: Path) -> None:
    assert {path.name for path in (folder / "files").iterdir()} == {file.id for file in store.files()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def open_store(folder: Path) -> Iterator[Callable[[], Store]]:
    """Opens the store in `folder`, as a new start of the server would; the one that was open is closed."""
    opened: list[Store] = []

    def reopen() -> Store:
        if opened:
            opened.pop().close()
        opened.append(Store(folder))
        return opened[-1]

    yield reopen
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()
