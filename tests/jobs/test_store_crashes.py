"""Killed at any moment, or out of room, the store has each result once and each file whole, or says that it has not."""

import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.errors import INSUFFICIENT_STORAGE, StoreError
from jobs.records import Counts, Status
from jobs.store import Store

from .conftest import accept, add_batch, assert_no_orphans, entries, result
from .victim import LATE, LINES

ROOT = Path(__file__).parents[2]
Reopen = Callable[[], Store]


def start(folder: Path, work: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.jobs.victim", str(folder), work]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill_amid(folder: Path, work: str, rng: random.Random, most_lines: int) -> list[str]:
    """What the victim printed until it was killed: up to so many lines, and what it does within some milliseconds more."""
    victim = start(folder, work)
    assert victim.stdout
    read = [victim.stdout.readline() for _ in range(rng.randint(1, most_lines))]
    time.sleep(rng.uniform(0, 0.01))
    victim.kill()
    rest, _ = victim.communicate()
    return ("".join(read) + rest).split("\n")[:-1]


def test_a_folder_in_use_by_another_process_is_refused_and_names_it(folder: Path) -> None:
    victim = start(folder, "hold")
    assert victim.stdout
    assert victim.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match=f"{folder}: in use by another server .process {victim.pid}.") as refusal:
        Store(folder)
    assert refusal.value.code == "in_use"
    victim.kill()
    victim.communicate()
    Store(folder).close()


@pytest.mark.parametrize("seed", range(5))
def test_a_process_killed_while_it_adds_files_leaves_whole_files_only(folder: Path, open_store: Reopen, seed: int) -> None:
    told = kill_amid(folder, "add_files", random.Random(seed), most_lines=5)
    store = open_store()
    assert {file.id for file in store.files()} >= set(told)
    for file in store.files():
        with store.open_file(file.id) as stream:
            assert stream.read() == b"".join(bytes([number]) * 10_000 for number in range(100))
    assert_no_orphans(store, folder)


def test_what_a_crash_left_in_the_folder_is_removed(open_store: Reopen, folder: Path) -> None:
    kept = open_store().add_file([b"x"], "some", "batch")
    (folder / "files" / f"file-{1:024x}.part").write_bytes(b"half")
    (folder / "files" / f"file-{2:024x}").write_bytes(b"whole, but not in the database")
    store = open_store()
    assert_no_orphans(store, folder)
    assert [file.id for file in store.files()] == [kept.id]


def test_what_is_none_of_the_stores_business_stays(open_store: Reopen, folder: Path) -> None:
    open_store()
    for name in ("file-1", "notes.txt", "file-1.part"):
        (folder / "files" / name).write_bytes(b"somebody's")
    open_store()
    assert {path.name for path in (folder / "files").iterdir()} == {"file-1", "notes.txt", "file-1.part"}


def test_files_whose_database_is_gone_are_not_swept_away(open_store: Reopen, folder: Path) -> None:
    kept = open_store().add_file([b"x"], "some", "batch")
    (folder / "batchlab.sqlite3").unlink()
    with pytest.raises(StoreError, match="bring it back, or move them away"):
        open_store()
    assert (folder / "files" / kept.id).read_bytes() == b"x"


def test_a_process_killed_while_it_records_loses_and_doubles_no_result(folder: Path, open_store: Reopen) -> None:
    rng, told = random.Random(1), {}
    for _ in range(6):
        for line in kill_amid(folder, "record", rng, most_lines=50)[1:]:
            number, process = line.split()
            assert number not in told, "a line that was on the disk was run again"
            told[number] = process
    store = open_store()
    (batch,) = store.unfinished()
    pending = store.pending(batch.id, 0, LINES)
    assert {line.number for line in pending}.isdisjoint(int(number) for number in told)
    assert batch.counts.completed + batch.counts.failed == LINES - len(pending)
    store.record([result(batch, number, number % 3 > 0, "last") for number in range(1, LINES + 1)])
    batch = store.finish(batch.id, Status.COMPLETED)
    assert batch.counts == Counts(LINES, LINES * 2 // 3, LINES // 3)
    good, bad = entries(store, batch.output_file_id), entries(store, batch.error_file_id)
    assert [entry["custom_id"] for entry in good] == [f"r{n}" for n in range(1, LINES + 1) if n % 3]
    assert [entry["custom_id"] for entry in bad] == [f"r{n}" for n in range(3, LINES + 1, 3)]
    texts = {entry["custom_id"]: entry["text"] for entry in good + bad}
    assert all(texts[f"r{number}"] == process for number, process in told.items())
    assert told
    assert "last" in texts.values(), "never killed amid its work"


def test_a_process_killed_while_it_finishes_leaves_one_whole_pair_of_files(folder: Path, open_store: Reopen) -> None:
    rng = random.Random(2)
    for _ in range(8):
        told = kill_amid(folder, "finish", rng, most_lines=4)
        store = open_store()
        assert_no_orphans(store, folder)
        for id in told:
            if id != "recorded":
                assert store.batch(id).status is Status.EXPIRED
        for batch in store.unfinished():
            if batch.status is Status.VALIDATING:
                accept(store, batch)
            if batch.status is Status.FINALIZING:
                store.finish(batch.id, Status.COMPLETED)  # what it had been told first stands
            else:
                store.record([result(batch, n, n % 3 == 1) for n in range(1, LINES + 1) if n % 3])
                store.finish(batch.id, Status.EXPIRED, LATE)
        for batch in store.batches(limit=1000):
            assert batch.status is Status.EXPIRED
            good, bad = entries(store, batch.output_file_id), entries(store, batch.error_file_id)
            assert [entry["custom_id"] for entry in good] == [f"r{n}" for n in range(1, LINES + 1, 3)]
            assert [entry["custom_id"] for entry in bad] == [f"r{n}" for n in range(1, LINES + 1) if n % 3 != 1]
            assert [entry["error"]["code"] for entry in bad if "error" in entry] == ["batch_expired"] * (LINES // 3)
        assert len(store.files("batch_output")) == 2 * len(store.batches(limit=1000))
        assert_no_orphans(store, folder)
        store.close()


def fill_up(store: Store) -> None:
    """Let the database grow no further."""
    pages = store._rows("PRAGMA page_count")[0][0]
    store._rows(f"PRAGMA max_page_count = {pages}")


def test_results_that_find_no_room_are_all_left_out_and_the_batch_can_fail(store: Store) -> None:
    batch = accept(store, add_batch(store, lines=50))
    fill_up(store)
    with pytest.raises(StoreError, match="disk is full") as failure:
        store.record([result(batch, number, text="x" * 5000) for number in range(1, 51)])
    assert failure.value.code == INSUFFICIENT_STORAGE
    assert store.batch(batch.id).counts == Counts(50, 0, 0)
    assert len(store.pending(batch.id, 0, 100)) == 50
    assert store.fail(batch.id, failure.value.code, failure.value.message).errors[0].code == INSUFFICIENT_STORAGE


def test_a_file_whose_row_finds_no_room_is_not_kept(store: Store, folder: Path) -> None:
    fill_up(store)
    with pytest.raises(StoreError) as failure:
        [store.add_file([b"x"], "x" * 100, "batch") for _ in range(1000)]
    assert failure.value.code == INSUFFICIENT_STORAGE
    assert_no_orphans(store, folder)


def run_with_small_files(folder: Path, body: str) -> None:
    """Run `body` in a process that may write `limit` bytes to a file, once it says so; it stands for a full disk."""
    code = f"""
import resource
from pathlib import Path
import pytest
from jobs.errors import StoreError
from jobs.records import Status
from jobs.store import Store
from tests.jobs.conftest import *
folder = Path({str(folder)!r})
store = Store(folder)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
{textwrap.dedent(body)}
store.close()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_file_that_finds_no_room_is_refused_and_nothing_stays(folder: Path) -> None:
    run_with_small_files(
        folder,
        """
        limit(1 << 20)
        with pytest.raises(StoreError, match="disk is full") as failure:
            store.add_file([b"x" * 100_000] * 20, "some", "batch")
        assert failure.value.code == "insufficient_storage"
        assert store.files() == []
        assert_no_orphans(store, folder)
        assert store.add_file([b"x" * 100_000], "smaller", "batch").bytes == 100_000
        """,
    )


@pytest.mark.parametrize(("ending", "meanwhile"), [("EXPIRED", "FINALIZING"), ("CANCELLED", "CANCELLING")])
def test_a_batch_whose_files_find_no_room_can_be_finished_once_there_is(folder: Path, ending: str, meanwhile: str) -> None:
    run_with_small_files(
        folder,
        f"""
        batch = accept(store, add_batch(store, lines=100))
        store.record([result(batch, n, ok=n <= 5, text="x" * 10_000) for n in range(1, 100)])
        store._rows("PRAGMA wal_checkpoint(TRUNCATE)")
        if Status.{ending} is Status.CANCELLED:
            store.cancel(batch.id)
        limit(200_000)  # room for the output file, not for the error file
        for _ in range(2):
            with pytest.raises(StoreError, match="disk is full"):
                store.finish(batch.id, Status.{ending}, ("batch_expired", "late"))
            assert store.batch(batch.id).status is Status.{meanwhile}
            assert_no_orphans(store, folder)
        store.record([result(batch, 100)])
        assert store.batch(batch.id).counts.completed == 5
        limit(resource.RLIM_INFINITY)
        batch = store.finish(batch.id, Status.{ending}, ("batch_expired", "late"))
        assert len(entries(store, batch.output_file_id)) == 5
        assert len(entries(store, batch.error_file_id)) == 95
        assert_no_orphans(store, folder)
        """,
    )
