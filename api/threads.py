"""Threads that come when there is work and go again when there has been none for a while; the standard library's pool keeps the
most that it ever had."""

import logging
import threading
from collections import deque
from collections.abc import Callable

IDLE_S = 5.0

log = logging.getLogger("batchlab")


class Threads:
    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._count = 0
        self._num_idle = 0

    def submit(self, work: Callable[[], None]) -> None:
        """To be done at once, or as soon as one of the threads is free."""
        with self._changed:
            self._work.append(work)
            begin = len(self._work) > self._num_idle and self._count < self._most
            self._count += begin
            self._changed.notify()
        if begin:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_idle += 1
                self._changed.wait_for(lambda: self._work, IDLE_S)
                self._num_idle -= 1
                if not self._work:
                    self._count -= 1
                    return
                work = self._work.popleft()
            try:
                work()
            except Exception:
                log.exception("in thread %s", threading.current_thread().name)
