"""What the store keeps and refuses. What it keeps of a crash or on a full disk is in test_store_crashes.py."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.errors import Conflict, DamagedLine, NotFound, StoreError, TooLarge
from jobs.records import BatchError, Counts, Result, Status
from jobs.store import Store

from .conftest import ENDPOINT, MODEL, accept, add_batch, assert_no_orphans, entries, request_line, result

Reopen = Callable[[], Store]
LATE = ("batch_expired", "the window closed")


def test_a_file_comes_back_as_it_went_in(open_store: Reopen) -> None:
    added = open_store().add_file([b"one\n", b"", b"two"], "some.jsonl", "batch")
    store = open_store()
    assert store.file(added.id) == added
    assert (added.bytes, added.filename, added.purpose) == (7, "some.jsonl", "batch")
    with store.open_file(added.id) as file:
        assert file.read() == b"one\ntwo"


def test_a_file_over_the_limit_is_refused_and_nothing_stays(store: Store, folder: Path) -> None:
    assert store.add_file([b"x" * 100], "fits", "batch", limit_bytes=100).bytes == 100
    with pytest.raises(TooLarge, match="at most 100 bytes"):
        store.add_file([b"x" * 100, b"x"], "does not", "batch", limit_bytes=100)
    assert len(store.files()) == 1
    assert_no_orphans(store, folder)


def test_an_upload_that_breaks_off_leaves_nothing(store: Store, folder: Path) -> None:
    def breaks_off() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise EOFError("the client hung up")

    with pytest.raises(EOFError):
        store.add_file(breaks_off(), "half", "batch")
    assert store.files() == []
    assert_no_orphans(store, folder)


def test_files_are_listed_by_purpose_and_page_in_either_order(store: Store) -> None:
    ids = [store.add_file([b"x"], str(number), "batch").id for number in range(4)]
    other = store.add_file([b"x"], "other", "batch_output").id
    assert [file.id for file in store.files()] == [other, *ids[::-1]]
    assert [file.id for file in store.files("batch_output")] == [other]
    assert [file.id for file in store.files("batch", limit=2)] == [ids[3], ids[2]]
    assert [file.id for file in store.files("batch", after=ids[2])] == [ids[1], ids[0]]
    assert [file.id for file in store.files("batch", after=ids[0], limit=2, order="asc")] == [ids[1], ids[2]]
    assert store.files(after=ids[0]) == []
    with pytest.raises(NotFound):
        store.files(after="file-0")


def test_a_deleted_file_is_gone_and_who_reads_it_still_reads_to_its_end(store: Store, folder: Path) -> None:
    file = store.add_file([b"content"], "some", "batch")
    with store.open_file(file.id) as stream:
        store.delete_file(file.id)
        assert stream.read() == b"content"
    for ask in (store.file, store.open_file, store.delete_file):
        with pytest.raises(NotFound, match=file.id):
            ask(file.id)
    assert_no_orphans(store, folder)


def test_a_file_cannot_be_deleted_while_its_batch_is_not_finished(store: Store) -> None:
    batch = add_batch(store, lines=1)
    for step in (lambda: None, lambda: accept(store, batch), lambda: store.cancel(batch.id)):
        step()
        with pytest.raises(Conflict, match=batch.id):
            store.delete_file(batch.input_file_id)
    store.finish(batch.id, Status.CANCELLED, LATE)
    store.delete_file(batch.input_file_id)
    assert store.batch(batch.id).input_file_id == batch.input_file_id


def test_a_batch_goes_from_validating_to_completed(folder: Path) -> None:
    now = 1000.5
    store = Store(folder, lambda: now)
    batch = add_batch(store, lines=3)
    assert (batch.status, batch.created_at, batch.expires_at, batch.model) == (Status.VALIDATING, 1000, 87400.5, None)
    now += 1
    batch = accept(store, batch)
    assert (batch.status, batch.in_progress_at, batch.model) == (Status.IN_PROGRESS, 1001, MODEL)
    assert batch.counts == Counts(3, 0, 0)
    store.record([result(batch, 3), result(batch, 1), result(batch, 2, ok=False)])
    assert store.batch(batch.id).counts == Counts(3, 2, 1)
    now += 1
    batch = store.finish(batch.id, Status.COMPLETED)
    assert (batch.status, batch.finalizing_at, batch.completed_at) == (Status.COMPLETED, 1002, 1002)
    assert batch.counts == Counts(3, 2, 1)
    assert [entry["custom_id"] for entry in entries(store, batch.output_file_id)] == ["r1", "r3"]
    assert [entry["custom_id"] for entry in entries(store, batch.error_file_id)] == ["r2"]
    assert store.file(str(batch.output_file_id)).purpose == "batch_output"
    assert store.unfinished() == []
    store.close()


def test_a_file_without_lines_is_not_made(store: Store) -> None:
    all_good, all_bad = (accept(store, add_batch(store, lines=1)) for _ in range(2))
    store.record([result(all_good, 1), result(all_bad, 1, ok=False)])
    assert store.finish(all_good.id, Status.COMPLETED).error_file_id is None
    assert store.finish(all_bad.id, Status.COMPLETED).output_file_id is None


def test_files_of_more_entries_than_one_read_hold_each_line_once_in_order(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=1100))
    store.record([result(batch, number, ok=number % 2 == 0) for number in range(1, 1001)])
    batch = store.finish(batch.id, Status.EXPIRED, LATE)
    assert [entry["custom_id"] for entry in entries(store, batch.output_file_id)] == [f"r{n}" for n in range(2, 1001, 2)]
    failed = [*range(1, 1000, 2), *range(1001, 1101)]
    assert [entry["custom_id"] for entry in entries(store, batch.error_file_id)] == [f"r{n}" for n in failed]


def test_lines_without_a_result_get_the_leftover_error(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=2))
    store.record([result(batch, 1)])
    batch = store.finish(batch.id, Status.EXPIRED, LATE)
    assert (batch.status, batch.counts) == (Status.EXPIRED, Counts(2, 1, 0))
    assert batch.expired_at is not None
    (entry,) = entries(store, batch.error_file_id)
    assert entry.pop("id").startswith("batch_req_")
    assert entry == {
        "custom_id": "r2",
        "response": None,
        "error": {"code": "batch_expired", "message": "the window closed"},
    }


def test_lines_without_a_result_and_without_a_leftover_error_are_not_dropped(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=2))
    store.record([result(batch, 1)])
    with pytest.raises(ValueError, match="leftover"):
        store.finish(batch.id, Status.COMPLETED)
    assert store.batch(batch.id).status is Status.IN_PROGRESS


def test_the_first_result_of_a_line_stands_and_is_counted_once(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=2))
    store.record([result(batch, 1, text="first"), result(batch, 1, ok=False, text="twice in one go")])
    store.record([result(batch, 1, ok=False, text="again"), result(batch, 2)])
    assert store.batch(batch.id).counts == Counts(2, 2, 0)
    batch = store.finish(batch.id, Status.COMPLETED)
    assert [entry["text"] for entry in entries(store, batch.output_file_id)] == ["first", ""]
    assert batch.error_file_id is None


def test_results_that_come_when_the_batch_is_over_change_nothing(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=1))
    store.cancel(batch.id)
    store.finish(batch.id, Status.CANCELLED, LATE)
    ended = store.batch(batch.id)
    store.record([result(batch, 1)])
    assert store.batch(batch.id) == ended
    assert ended.counts == Counts(1, 0, 0)


def test_a_bad_result_among_good_ones_keeps_all_of_them_out(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=2))
    with pytest.raises(StoreError):
        store.record([result(batch, 1), result(batch, 3)])
    assert store.batch(batch.id).counts == Counts(2, 0, 0)
    assert len(store.pending(batch.id, 0, 10)) == 2


def test_pending_gives_lines_without_a_result_a_page_at_a_time(open_store: Reopen) -> None:
    store = open_store()
    batch = accept(store, add_batch(store, lines=10))
    accept(store, add_batch(store, lines=10))
    store.record([result(batch, number) for number in (1, 4, 10)])
    store = open_store()
    first = store.pending(batch.id, 0, 4)
    assert [(line.number, line.custom_id) for line in first] == [(2, "r2"), (3, "r3"), (5, "r5"), (6, "r6")]
    assert [line.number for line in store.pending(batch.id, 6, 100)] == [7, 8, 9]
    assert store.read_line(batch, first[1]) == request_line("r3").rstrip(b"\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"r2"', b'"R2"')), "changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "cut short"),
        (lambda path: path.unlink(), "gone"),
    ],
    ids=["changed", "cut short", "gone"],
)
def test_a_damaged_line_is_found_out_when_it_is_read(store: Store, folder: Path, damage: Callable, said: str) -> None:
    batch = accept(store, add_batch(store, lines=2))
    damage(folder / "files" / batch.input_file_id)
    first, second = store.pending(batch.id, 0, 10)
    with pytest.raises(DamagedLine, match=f"line 2: .*{said}"):
        store.read_line(batch, second)
    if said != "gone":
        assert store.read_line(batch, first) == request_line("r1").rstrip(b"\n")


def test_a_rejected_batch_says_what_was_wrong(open_store: Reopen) -> None:
    store = open_store()
    batch = add_batch(store, lines=1)
    errors = (BatchError("invalid_json_line", "must be JSON", 1), BatchError("invalid_url", "url: ...", 2, "url"))
    store.reject(batch.id, errors)
    batch = open_store().batch(batch.id)
    assert (batch.status, batch.errors) == (Status.FAILED, errors)
    assert batch.failed_at is not None


def test_cancelling_twice_is_cancelling_once(folder: Path) -> None:
    now = 1000.0
    store = Store(folder, lambda: now)
    batch = add_batch(store, lines=1)
    first = store.cancel(batch.id)
    now += 100
    assert store.cancel(batch.id) == first
    assert (first.status, first.cancelling_at) == (Status.CANCELLING, 1000)
    ended = store.finish(batch.id, Status.CANCELLED)
    assert (ended.status, ended.cancelled_at, ended.finalizing_at) == (Status.CANCELLED, 1100, None)
    store.close()


def test_what_ran_before_the_cancelling_is_in_the_files(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=3))
    store.record([result(batch, 2)])
    store.cancel(batch.id)
    store.record([result(batch, 1)])  # it was under way
    batch = store.finish(batch.id, Status.CANCELLED, ("batch_cancelled", "cancelled"))
    assert [entry["custom_id"] for entry in entries(store, batch.output_file_id)] == ["r1", "r2"]
    assert [entry["error"]["code"] for entry in entries(store, batch.error_file_id)] == ["batch_cancelled"]


def test_a_batch_changes_only_from_states_that_allow_it(store: Store) -> None:
    batch = add_batch(store, lines=1)
    with pytest.raises(Conflict, match="validating"):
        store.finish(batch.id, Status.COMPLETED, LATE)
    accept(store, batch)
    for wrong in (
        lambda: accept(store, batch),
        lambda: store.reject(batch.id, []),
        lambda: store.finish(batch.id, Status.CANCELLED, LATE),
    ):
        with pytest.raises(Conflict, match="in_progress"):
            wrong()
    store.cancel(batch.id)
    for wrong in (lambda: accept(store, batch), lambda: store.finish(batch.id, Status.COMPLETED, LATE)):
        with pytest.raises(Conflict, match="cancelling"):
            wrong()
    assert store.batch(batch.id).status is Status.CANCELLING


def test_a_finished_batch_stays_as_it_is(store: Store) -> None:
    cancelled, failed, completed, rejected = (add_batch(store, lines=1) for _ in range(4))
    store.cancel(cancelled.id)
    store.finish(cancelled.id, Status.CANCELLED)
    store.fail(accept(store, failed).id, "storage_failed", "the disk is gone")
    store.reject(rejected.id, [])
    store.record([result(accept(store, completed), 1)])
    store.finish(completed.id, Status.COMPLETED)
    for batch in (cancelled, failed, completed, rejected):
        ended = store.batch(batch.id)
        with pytest.raises(Conflict, match=ended.status.value):
            store.cancel(batch.id)
        with pytest.raises(Conflict, match=ended.status.value):
            store.fail(batch.id, "code", "message")
        with pytest.raises(Conflict, match=ended.status.value):
            accept(store, batch)
        assert store.batch(batch.id) == ended


@pytest.mark.parametrize("status", ["validating", "in_progress", "cancelling"])
def test_a_whole_batch_can_fail_in_any_unfinished_state(store: Store, status: str) -> None:
    batch = add_batch(store, lines=1)
    if status != "validating":
        accept(store, batch)
    if status == "cancelling":
        store.cancel(batch.id)
    ended = store.fail(batch.id, "insufficient_storage", "the disk is full")
    assert (ended.status, ended.errors) == (Status.FAILED, (BatchError("insufficient_storage", "the disk is full"),))
    assert store.pending(batch.id, 0, 10) == []


def test_finishing_a_second_time_gives_the_same_files(store: Store, folder: Path) -> None:
    batch = accept(store, add_batch(store, lines=2))
    store.record([result(batch, 1)])
    first = store.finish(batch.id, Status.EXPIRED, LATE)
    assert store.finish(batch.id, Status.EXPIRED, LATE) == first
    assert store.finish(batch.id, Status.COMPLETED) == first
    assert len(store.files("batch_output")) == 2
    assert_no_orphans(store, folder)


def test_batches_are_listed_newest_first_and_the_unfinished_oldest_first(store: Store) -> None:
    ids = [add_batch(store, lines=1).id for _ in range(5)]
    assert [batch.id for batch in store.batches()] == ids[::-1]
    assert [batch.id for batch in store.batches(after=ids[3], limit=2)] == [ids[2], ids[1]]
    store.reject(ids[2], [])
    store.cancel(ids[1])
    assert [batch.id for batch in store.unfinished()] == [ids[0], ids[1], ids[3], ids[4]]
    with pytest.raises(NotFound):
        store.batches(after="batch_0")


def test_a_batch_needs_a_file(store: Store) -> None:
    with pytest.raises(NotFound, match="file-0"):
        store.create_batch("file-0", ENDPOINT, "24h", 86400, {})


def test_metadata_comes_back_as_it_was(open_store: Reopen) -> None:
    metadata = {"class": "5b", "Größe": "½ \ud83d", "": ""}
    store = open_store()
    file = store.add_file([b"x"], "some", "batch")
    batch = store.create_batch(file.id, ENDPOINT, "24h", 86400, metadata)
    assert open_store().batch(batch.id).metadata == metadata


def test_the_database_does_not_keep_what_is_in_the_files(store: Store, folder: Path) -> None:
    batch = accept(store, add_batch(store, lines=10))
    store.record([result(batch, number) for number in range(1, 11)])
    store.finish(batch.id, Status.COMPLETED)
    assert [store._rows(f"SELECT count(*) FROM {table}")[0][0] for table in ("lines", "results")] == [0, 0]


def test_threads_that_record_the_same_results_count_each_once(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=40))

    def record() -> None:
        for number in range(1, 41):
            store.record([result(batch, number)])

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.batch(batch.id).counts == Counts(40, 40, 0)


def test_a_database_that_is_none_is_refused_by_its_path(folder: Path, open_store: Reopen) -> None:
    folder.mkdir()
    (folder / "batchlab.sqlite3").write_bytes(b"these are not the pages you are looking for" * 200)
    with pytest.raises(StoreError, match=r"batchlab\.sqlite3: file is not a database") as refusal:
        open_store()
    (folder / "batchlab.sqlite3").unlink()
    open_store()  # the folder was let go, though the failure is still held here
    del refusal


def test_a_database_of_a_newer_version_is_left_alone(folder: Path, open_store: Reopen) -> None:
    open_store().close()
    database = sqlite3.connect(folder / "batchlab.sqlite3")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="newer version"):
        Store(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreError, match=f"{tmp_path}/taken"):
        Store(tmp_path / "taken")


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.files()


def test_an_entry_of_any_unicode_comes_back(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=1))
    entry = json.dumps({"custom_id": "r1", "text": "½\x00\u2028"}, ensure_ascii=False)
    store.record([Result(batch.id, 1, True, entry)])
    ended = store.finish(batch.id, Status.COMPLETED)
    with store.open_file(str(ended.output_file_id)) as file:
        assert file.read() == entry.encode() + b"\n"
