"""What can go wrong with files and batches on disk, as types that a caller can tell apart.

Must not know HTTP: which status answers which error is api/errors.py's business.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSUFFICIENT_STORAGE, STORAGE_FAILED = "insufficient_storage", "storage_failed"
# EFBIG: the system's limit on the size of a file, for which more room helps just as it does on a full disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JobError(Exception):
    """What the store refuses or cannot do. `code` is stable, `message` is for people, `param` names the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class StoreError(JobError):
    """The disk or the database failed; `code` is `insufficient_storage` where there was no room left."""


class NotFound(JobError):
    """No file or batch has this id."""


class Conflict(JobError):
    """The file or batch is in a state in which this cannot be done."""


class TooLarge(JobError):
    """The content of a file is longer than allowed."""


class DamagedLine(JobError):
    """A line of an input file is not what it was when the batch was accepted."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Whatever the system or SQLite raises inside becomes a StoreError that names `path`."""
    try:
        yield
    except OSError as error:
        raise _store_error(path, error.strerror or str(error), error.errno in NO_ROOM) from error
    except sqlite3.Error as error:  # Python 3.10 has no error codes of SQLite
        raise _store_error(path, str(error), "disk is full" in str(error)) from error


def _store_error(path: Path, reason: str, no_room: bool) -> StoreError:
    if no_room:
        return StoreError(INSUFFICIENT_STORAGE, f"the disk is full: {path}: {reason}")
    return StoreError(STORAGE_FAILED, f"{path}: {reason}")
