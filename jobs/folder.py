"""The data folder: one process at a time has it, and a file in it is there whole or not at all, also after a power cut.

Knows names and bytes only; what a file is for stands in the database.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from jobs.errors import StoreError, TooLarge, storage_errors

OURS = re.compile(r"file-[0-9a-f]{24}(\.part)?")

LETTING_GO_S, LOOK_S = 3.0, 0.05  # a server that was just killed takes a moment to give up its memory, and then the lock


class Folder:
    def __init__(self, path: Path) -> None:
        """Create the folder where it is not there yet, and take it. Raises StoreError, also if another process has it.
        What is in it is nobody else's to read."""
        self.files = path / "files"
        with storage_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.files.mkdir(exist_ok=True)
            self.files.chmod(0o700)
            _sync_directory(path)
            _sync_directory(path.parent)
            self._lock = open(path / "lock", "a+", encoding="ascii", opener=_private)  # noqa: SIM115 - open as long as we have it
            try:
                self._take(path)
            except BaseException:
                self._lock.close()
                raise

    def _take(self, path: Path) -> None:
        until = time.monotonic() + LETTING_GO_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    self._lock.seek(0)
                    holder = self._lock.read(20).strip() or "unknown"
                    raise StoreError("in_use", f"{path}: in use by another server (process {holder})") from None
                time.sleep(LOOK_S)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def make_private(self, path: Path) -> None:
        """A file beside ours, empty if it is not there yet. Raises OSError."""
        os.close(_private(path, os.O_RDWR | os.O_CREAT))
        path.chmod(0o600)  # one that is older

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def write(self, name: str, chunks: Iterable[bytes], limit_bytes: int | None = None) -> int:
        """Make the file `name` of `chunks`; its size in bytes once it is on the disk. On whatever goes wrong nothing is left of
        it. Raises StoreError (also for an OSError of `chunks`), TooLarge, and what else `chunks` raises."""
        part, size = f"{name}.part", 0
        try:
            with storage_errors(self.files):
                with open(self.files / part, "wb", opener=_private) as file:
                    for chunk in chunks:
                        size += len(chunk)
                        if limit_bytes is not None and size > limit_bytes:
                            raise TooLarge("file_too_large", f"file: may be at most {limit_bytes} bytes", "file")
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                (self.files / part).rename(self.files / name)
                _sync_directory(self.files)
        except BaseException:
            self.remove(part)
            self.remove(name)
            raise
        return size

    def open(self, name: str) -> BinaryIO:
        """Raises OSError."""
        return (self.files / name).open("rb")

    def remove(self, name: str) -> None:
        """Nobody knows of it any more: what cannot be removed now is swept at the next start."""
        with contextlib.suppress(OSError):
            (self.files / name).unlink()

    def sweep(self, known: Collection[str]) -> None:
        """Remove what a crash left: files half written, and files of ours that nobody knows of. Raises StoreError."""
        with storage_errors(self.files):
            for path in self._ours():
                if path.name not in known:
                    path.unlink()

    def is_empty(self) -> bool:
        """Whether no file of ours is there. Raises StoreError."""
        with storage_errors(self.files):
            return not self._ours()

    def _ours(self) -> list[Path]:
        return [path for path in self.files.iterdir() if OURS.fullmatch(path.name)]


def _private(path: str | Path, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_directory(path: Path) -> None:
    """A rename is on the disk only once its directory is."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
