"""A process that works on a store until it is killed: `python -m tests.jobs.victim FOLDER WORK`. It prints what it has been
told is on the disk."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobs.records import Status
from jobs.store import Store

from .conftest import accept, add_batch, result

LINES = 600
LATE = ("batch_expired", "the window closed")


def hold(store: Store) -> None:
    print("open", flush=True)
    time.sleep(60)


def add_files(store: Store) -> None:
    while True:
        file = store.add_file((bytes([number]) * 10_000 for number in range(100)), "some", "batch")
        print(file.id, flush=True)


def record(store: Store) -> None:
    """Results of one batch, three at a time; the text says which process had it."""
    (batch,) = store.unfinished() or [accept(store, add_batch(store, LINES))]
    print("started", flush=True)
    done = 0
    while lines := store.pending(batch.id, done, 3):
        store.record([result(batch, line.number, line.number % 3 > 0, str(os.getpid())) for line in lines])
        for line in lines:
            print(f"{line.number} {os.getpid()}", flush=True)
        done = lines[-1].number


def finish(store: Store) -> None:
    """Batch after batch, a third of its lines ok, a third failed, a third without a result."""
    while True:
        batch = accept(store, add_batch(store, LINES))
        store.record([result(batch, n, n % 3 == 1) for n in range(1, LINES + 1) if n % 3])
        print("recorded", flush=True)
        print(store.finish(batch.id, Status.EXPIRED, LATE).id, flush=True)


WORK: dict[str, Callable[[Store], None]] = {work.__name__: work for work in (hold, add_files, record, finish)}

if __name__ == "__main__":
    WORK[sys.argv[2]](Store(Path(sys.argv[1])))
