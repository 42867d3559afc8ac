"""Threads that come when there is work and go again when there has been none for a while; the standard library's pool keeps the
most that it ever had."""

import logging
import threading
from collections import deque
from collections.abc import Callable

IDLE_S = 5.0

log = logging.getLogger("batchlab")


class _Idle:
    """A thread that waits for work."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.work: Callable[[], None] | None = None


class Threads:
    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._work: deque[Callable[[], None]] = deque()  # for which there is no thread yet
        self._idle: list[_Idle] = []  # the last one is called first, so that the others can go
        self._count = 0

    def submit(self, work: Callable[[], None]) -> None:
        """To be done at once, or as soon as one of the threads is free."""
        with self._lock:
            if self._idle:
                idle = self._idle.pop()
                idle.work = work
                idle.called.set()
                return
            if self._count == self._most:
                self._work.append(work)
                return
            self._count += 1
        try:
            threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True).start()
        except RuntimeError as error:  # the system gives no more for now: those that there are will come to it
            log.warning("no further thread %s: %s", self._name, error)
            with self._lock:
                self._count -= 1
                self._work.append(work)

    def _run(self, work: Callable[[], None] | None) -> None:
        while work:
            try:
                work()
            except Exception:
                log.exception("in thread %s", threading.current_thread().name)
            work = self._next()

    def _next(self) -> Callable[[], None] | None:
        """None where there has been nothing to do for so long that the thread is to end."""
        idle = _Idle()
        with self._lock:
            if self._work:
                return self._work.popleft()
            self._idle.append(idle)
        idle.called.wait(IDLE_S)
        with self._lock:
            if idle.work is None:
                self._idle.remove(idle)
                self._count -= 1
            return idle.work
