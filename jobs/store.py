"""Files and batches that survive whatever ends the process: contents in a folder, everything else in SQLite beside it.

A result is recorded once, whoever sends it again; an output file is there complete or not at all. Has no thread of its own and
may be used from many. Must not know flask or the engine: who runs the lines, and when, is not decided here.
"""

import json
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from jobs.errors import STORAGE_FAILED, Conflict, DamagedLine, NotFound, StoreError, storage_errors
from jobs.folder import Folder
from jobs.records import UNFINISHED, Batch, BatchError, Counts, File, Line, Result, Status

VERSION = 1  # of the schema
SCHEMA = (
    """CREATE TABLE files (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL,
        filename TEXT NOT NULL, purpose TEXT NOT NULL)""",
    # No references to files: a finished batch keeps the ids of files that were deleted since.
    # ending, leftover: what `finish` was told to make of the batch, so that an interrupted one goes on with it.
    """CREATE TABLE batches (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, endpoint TEXT NOT NULL, model TEXT, input_file_id TEXT NOT NULL,
        completion_window TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at REAL NOT NULL,
        in_progress_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER,
        cancelling_at INTEGER, cancelled_at INTEGER, output_file_id TEXT, error_file_id TEXT,
        errors TEXT NOT NULL DEFAULT '[]', metadata TEXT NOT NULL, ending TEXT, leftover TEXT,
        total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE lines (
        batch_id TEXT NOT NULL REFERENCES batches (id), number INTEGER NOT NULL, custom_id TEXT NOT NULL,
        offset INTEGER NOT NULL, length INTEGER NOT NULL, crc32 INTEGER NOT NULL,
        PRIMARY KEY (batch_id, number)) WITHOUT ROWID""",
    """CREATE TABLE results (
        batch_id TEXT NOT NULL, number INTEGER NOT NULL, ok INTEGER NOT NULL, entry TEXT NOT NULL,
        PRIMARY KEY (batch_id, number),
        FOREIGN KEY (batch_id, number) REFERENCES lines (batch_id, number) ON DELETE CASCADE)""",
)
AS_STORED = [field.name for field in fields(Batch) if field.name not in ("status", "errors", "metadata", "counts")]
ENDS_FROM = {  # the states in which `finish` may be asked for one
    Status.COMPLETED: (Status.IN_PROGRESS,),
    Status.EXPIRED: (Status.VALIDATING, Status.IN_PROGRESS),
    Status.CANCELLED: (Status.CANCELLING,),
}
BUSY_TIMEOUT_S = 10  # somebody looks into the database with a tool of theirs
ENTRIES_A_READ = 256  # while files are written; others get their turn in between


class Store:
    """All methods may raise StoreError; those that take an id raise NotFound where there is none such."""

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        """Open the store in `folder`, a new one if there is none, and remove what a crash left half done. Raises StoreError
        where another process has it open, or where it cannot be read."""
        self._wall = wall
        self._lock = threading.RLock()
        self._path = folder / "batchlab.sqlite3"
        self._folder = Folder(folder)
        try:
            with storage_errors(self._path):
                self._folder.make_private(self._path)  # SQLite's log takes it over from the database
                self._db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
                self._folder.sweep({row["id"] for row in self._rows("SELECT id FROM files")})
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self._folder.close()
            raise
        self._forget_lines()

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._rows(f"PRAGMA {pragma}")
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                newer = f"{self._path}: written by a newer version of this server (schema {version}, this one knows {VERSION})"
                raise StoreError(STORAGE_FAILED, newer)
            if version == 0:
                if not self._folder.is_empty():  # which would all be swept away
                    lost = (
                        f"{self._path}: has nothing about the files in {self._folder.files}: bring it back, or move them away"
                    )
                    raise StoreError(STORAGE_FAILED, lost)
                for statement in SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Whoever calls the store from now on gets a StoreError."""
        with self._lock:
            self._db.close()
            self._folder.close()

    # Files.

    def add_file(self, chunks: Iterable[bytes], filename: str, purpose: str, limit_bytes: int | None = None) -> File:
        """Keep a file; it is on the disk when this returns. Raises TooLarge, and what `chunks` raises; nothing stays then."""
        file = self._write(chunks, filename, purpose, limit_bytes)
        try:
            with self._transaction() as db:
                _insert_file(db, file)
        except BaseException:
            self._folder.remove(file.id)
            raise
        return file

    def _write(self, chunks: Iterable[bytes], filename: str, purpose: str, limit_bytes: int | None = None) -> File:
        id = f"file-{secrets.token_hex(12)}"
        size = self._folder.write(id, chunks, limit_bytes)
        return File(id, size, self._now(), filename, purpose)

    def file(self, id: str) -> File:
        return _file(self._row("files", id))

    def files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> list[File]:
        """The files of a purpose, or all; `order` is `asc` (oldest first) or `desc`; from the one that follows `after`."""
        where, values = ("purpose = ?", (purpose,)) if purpose is not None else ("TRUE", ())
        return [_file(row) for row in self._page("files", after, limit, order, where, values)]

    def open_file(self, id: str) -> BinaryIO:
        """The content, to be closed by the caller; it can be read to its end even if the file is deleted meanwhile."""
        self.file(id)
        with storage_errors(self._folder.files / id):
            return self._folder.open(id)

    def delete_file(self, id: str) -> None:
        """Raises Conflict while a batch that is not finished reads it."""
        with self._transaction() as db:
            self._row("files", id)
            marks, values = _any_of(UNFINISHED)
            user = self._rows(f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({marks})", (id, *values))
            if user:
                raise Conflict("file_in_use", f"file {id} is the input of {user[0]['id']}, which is not finished")
            db.execute("DELETE FROM files WHERE id = ?", (id,))
        self._folder.remove(id)

    # Batches.

    def create_batch(
        self, input_file_id: str, endpoint: str, completion_window: str, window_s: float, metadata: Mapping[str, str]
    ) -> Batch:
        """A batch to be validated. Raises NotFound for its file."""
        id, now = f"batch_{secrets.token_hex(12)}", self._wall()
        new = {
            "id": id,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "status": Status.VALIDATING.value,
            "created_at": int(now),
            "expires_at": now + window_s,
            "metadata": json.dumps(dict(metadata)),
        }
        with self._transaction() as db:
            self._row("files", input_file_id)
            db.execute(f"INSERT INTO batches ({', '.join(new)}) VALUES ({', '.join('?' * len(new))})", tuple(new.values()))
            return self.batch(id)

    def batch(self, id: str) -> Batch:
        return _batch(self._row("batches", id))

    def batches(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """Newest first, from the one that follows `after`."""
        return [_batch(row) for row in self._page("batches", after, limit, "desc", "TRUE", ())]

    def unfinished(self) -> list[Batch]:
        """Whatever still needs somebody's attention, oldest first."""
        marks, values = _any_of(UNFINISHED)
        return [_batch(row) for row in self._rows(f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY seq", values)]

    def accept(self, batch_id: str, lines: Sequence[Line], model: str) -> Batch:
        """The input file is good: keep where its lines are, and begin. Raises Conflict unless it is being validated."""
        changes = {"status": Status.IN_PROGRESS.value, "in_progress_at": self._now(), "model": model, "total": len(lines)}
        with self._transaction() as db:
            batch = self._move(batch_id, (Status.VALIDATING,), changes)
            db.executemany(
                "INSERT INTO lines (batch_id, number, custom_id, offset, length, crc32) VALUES (?, ?, ?, ?, ?, ?)",
                ((batch_id, line.number, line.custom_id, line.offset, line.length, line.crc32) for line in lines),
            )
        return batch

    def reject(self, batch_id: str, errors: Sequence[BatchError]) -> Batch:
        """The input file is no good. Raises Conflict unless it is being validated."""
        return self._fail(batch_id, (Status.VALIDATING,), errors)

    def fail(self, batch_id: str, code: str, message: str) -> Batch:
        """Give the whole batch up; results it had are lost. Raises Conflict if it is finished."""
        return self._fail(batch_id, UNFINISHED, [BatchError(code, message)])

    def _fail(self, batch_id: str, allowed: Sequence[Status], errors: Sequence[BatchError]) -> Batch:
        listed = json.dumps([asdict(error) for error in errors])
        changes = {"status": Status.FAILED.value, "failed_at": self._now(), "errors": listed}
        with self._transaction():
            batch = self._move(batch_id, allowed, changes)
        self._forget_lines()
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """Ask for the end; a second time changes nothing. Raises Conflict if it is finished, or its files are being written."""
        with self._transaction():
            batch = self.batch(batch_id)
            if batch.status is Status.CANCELLING:
                return batch
            changes = {"status": Status.CANCELLING.value, "cancelling_at": self._now()}
            return self._move(batch_id, (Status.VALIDATING, Status.IN_PROGRESS), changes)

    # Lines and their results.

    def pending(self, batch_id: str, after_number: int, limit: int) -> list[Line]:
        """Lines without a result, in the file's order, from the one that follows `after_number`."""
        rows = self._rows(
            "SELECT lines.* FROM lines LEFT JOIN results USING (batch_id, number) WHERE lines.batch_id = ? "
            "AND lines.number > ? AND results.number IS NULL ORDER BY lines.number LIMIT ?",
            (batch_id, after_number, limit),
        )
        return [Line(row["number"], row["custom_id"], row["offset"], row["length"], row["crc32"]) for row in rows]

    def read_line(self, batch: Batch, line: Line) -> bytes:
        """The line as it was when the batch was accepted. Raises DamagedLine if the file has changed under it."""
        path = self._folder.files / batch.input_file_id
        with storage_errors(path):
            try:
                with self._folder.open(batch.input_file_id) as file:
                    file.seek(line.offset)
                    raw = file.read(line.length)
            except FileNotFoundError:
                raise DamagedLine("damaged_line", f"line {line.number}: the input file {path} is gone") from None
        if len(raw) < line.length:
            raise DamagedLine("damaged_line", f"line {line.number}: the input file {path} was cut short")
        if zlib.crc32(raw) != line.crc32:
            raise DamagedLine("damaged_line", f"line {line.number}: the input file {path} was changed")
        return raw

    def record(self, results: Sequence[Result]) -> None:
        """Keep results, all or none; they are on the disk when this returns. The first result of a line stands, and a batch
        whose files are being written, or were, takes none."""
        open_states, values = _any_of((Status.IN_PROGRESS, Status.CANCELLING))
        is_open = f"EXISTS (SELECT 1 FROM batches WHERE id = ? AND ending IS NULL AND status IN ({open_states}))"
        with self._transaction() as db:
            for result in results:
                new = db.execute(
                    f"INSERT OR IGNORE INTO results (batch_id, number, ok, entry) SELECT ?, ?, ?, ? WHERE {is_open}",
                    (result.batch_id, result.number, result.ok, result.entry, result.batch_id, *values),
                ).rowcount
                counted = "completed" if result.ok else "failed"
                db.execute(f"UPDATE batches SET {counted} = {counted} + ? WHERE id = ?", (new, result.batch_id))

    # The end of a batch.

    def finish(self, batch_id: str, status: Status, leftover: tuple[str, str] | None = None) -> Batch:
        """Write the output and the error file, and end the batch as completed, expired or cancelled.

        `leftover` is the code and message of the error that lines without a result get. Interrupted at any point, it can be
        called again, in a later process too; what the first call was told stands. Raises Conflict if the batch is in a state
        that does not end so, for instance completed when it has just been cancelled.
        """
        with self._transaction():
            row = self._row("batches", batch_id)
            if row["ending"] is None:
                self._decide(batch_id, status, leftover)
            elif row["status"] == row["ending"]:
                return _batch(row)
            else:
                status, leftover = Status(row["ending"]), json.loads(row["leftover"])
        written: dict[str, File] = {}
        try:
            for kind, ok in (("output", True), ("error", False)):
                entries = self._entries(batch_id, ok, leftover)
                if (first := next(entries, None)) is not None:
                    chunks = (f"{entry}\n".encode() for entry in chain((first,), entries))
                    written[kind] = self._write(chunks, f"{batch_id}_{kind}.jsonl", "batch_output")
            changes = {"status": status.value, f"{status.value}_at": self._now()}
            changes |= {f"{kind}_file_id": file.id for kind, file in written.items()}
            with self._transaction() as db:
                batch = self._move(batch_id, (Status.FINALIZING, Status.CANCELLING), changes)
                for file in written.values():
                    _insert_file(db, file)
        except BaseException:
            for file in written.values():
                self._folder.remove(file.id)
            raise
        self._forget_lines()
        return batch

    def _decide(self, batch_id: str, status: Status, leftover: tuple[str, str] | None) -> None:
        if leftover is None and self.pending(batch_id, 0, 1):
            raise ValueError(f"batch {batch_id} has lines without a result, and no leftover error for them")
        changes: dict[str, Any] = {"ending": status.value, "leftover": json.dumps(leftover)}
        if status is not Status.CANCELLED:  # which has no such state: it stays cancelling
            changes |= {"status": Status.FINALIZING.value, "finalizing_at": self._now()}
        self._move(batch_id, ENDS_FROM[status], changes)

    def _entries(self, batch_id: str, ok: bool, leftover: Sequence[str] | None = None) -> Iterator[str]:
        """Entries of the lines that are ok, or of those that are not or have no result, in the file's order."""
        number = 0
        while rows := self._rows(
            "SELECT lines.number, custom_id, entry FROM lines LEFT JOIN results USING (batch_id, number) "
            "WHERE lines.batch_id = ? AND coalesce(ok, FALSE) = ? AND lines.number > ? ORDER BY lines.number LIMIT ?",
            (batch_id, ok, number, ENTRIES_A_READ),
        ):
            for row in rows:
                yield row["entry"] if row["entry"] is not None else _leftover_entry(row["custom_id"], leftover)
            number = rows[-1]["number"]

    def _forget_lines(self) -> None:
        """Lines of finished batches are in their files. No harm if there is no room to do it: it is tried again."""
        marks, values = _any_of([status for status in Status if status not in UNFINISHED])
        with suppress(StoreError):
            self._rows(f"DELETE FROM lines WHERE batch_id IN (SELECT id FROM batches WHERE status IN ({marks}))", values)

    # The database.

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing, and on the disk when it ends."""
        with self._lock, storage_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, storage_errors(self._path):
            return self._db.execute(sql, values).fetchall()

    def _row(self, table: str, id: str) -> sqlite3.Row:
        rows = self._rows(f"SELECT * FROM {table} WHERE id = ?", (id,))
        if not rows:
            kind = {"files": "file", "batches": "batch"}[table]
            raise NotFound("not_found", f"no such {kind}: {id[:100]!r}")
        return rows[0]

    def _page(
        self, table: str, after: str | None, limit: int, order: str, where: str, values: Sequence[Any]
    ) -> list[sqlite3.Row]:
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        if after is not None:
            where, values = f"{where} AND seq {beyond} ?", (*values, self._row(table, after)["seq"])
        return self._rows(f"SELECT * FROM {table} WHERE {where} ORDER BY seq {direction} LIMIT ?", (*values, limit))

    def _move(self, batch_id: str, allowed: Sequence[Status], changes: Mapping[str, Any]) -> Batch:
        """Change a batch that is in one of the states allowed; inside a transaction. Raises Conflict."""
        marks, values = _any_of(allowed)
        columns = ", ".join(f"{name} = ?" for name in changes)
        update = f"UPDATE batches SET {columns} WHERE id = ? AND status IN ({marks})"
        moved = self._db.execute(update, (*changes.values(), batch_id, *values)).rowcount
        batch = self.batch(batch_id)
        if not moved:
            need = " or ".join(status.value for status in allowed)
            raise Conflict("wrong_status", f"batch {batch_id} is {batch.status.value}; for this it would have to be {need}")
        return batch

    def _now(self) -> int:
        return int(self._wall())


def _any_of(statuses: Sequence[Status]) -> tuple[str, tuple[str, ...]]:
    """The marks and the values of `IN (...)`."""
    return ", ".join("?" * len(statuses)), tuple(status.value for status in statuses)


def _insert_file(db: sqlite3.Connection, file: File) -> None:
    db.execute(
        "INSERT INTO files (id, bytes, created_at, filename, purpose) VALUES (:id, :bytes, :created_at, :filename, :purpose)",
        asdict(file),
    )


def _file(row: sqlite3.Row) -> File:
    return File(row["id"], row["bytes"], row["created_at"], row["filename"], row["purpose"])


def _batch(row: sqlite3.Row) -> Batch:
    return Batch(
        **{name: row[name] for name in AS_STORED},
        status=Status(row["status"]),
        errors=tuple(BatchError(**error) for error in json.loads(row["errors"])),
        metadata=json.loads(row["metadata"]),
        counts=Counts(row["total"], row["completed"], row["failed"]),
    )


def _leftover_entry(custom_id: str, leftover: Sequence[str] | None) -> str:
    assert leftover is not None  # since `_decide`
    error = dict(zip(("code", "message"), leftover, strict=True))
    return json.dumps({"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": None, "error": error})
