"""Bounds the time that a policy takes: one that loops for ever would hang every client, and nobody could switch it off.

A thread looks now and then at who is asked something. What takes longer than the limit is stopped by an exception raised in its
thread (`PyThreadState_SetAsyncExc`), which ends a loop of Python code. A call into C gets it only when it returns, and a policy
may swallow it: then `on_stuck` is told, and the thread, should it ever come back, is ended by `Abandoned`. Beside `loop.py` the
only module of this room that starts threads and reads the clock.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from batching import blame
from batching.view import Overdue

T = TypeVar("T")
ATTEMPTS = 4  # to stop it, before it is given up
LOOKS = 4  # within a limit


class Stopped(BaseException):
    """Raised in the policy's code when its time is over; `except Exception` does not catch it."""


class Abandoned(BaseException):
    """Raised in a thread that has been given up: another one has gone on in its place."""


@dataclass
class Asked:
    """What is under way: in which thread, since when. `attempts`: how often it was told to stop."""

    thread: int
    since: float
    attempts: int = 0
    place: str | None = None
    trace: str = ""
    over: bool = False


class Watchdog:
    """`watchdog(ask)` is `ask()`, but for Overdue where that takes too long, and Abandoned where it had been given up. For one
    thread."""

    def __init__(self, limit_s: float, on_stuck: Callable[[Overdue], None] = lambda error: None) -> None:
        """`on_stuck` is called, in the watchdog's thread, with what could not be stopped. Then the watchdog ends."""
        self.limit_s = limit_s
        self._on_stuck = on_stuck
        self._lock = threading.Lock()
        self._asked: Asked | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def __call__(self, ask: Callable[[], T]) -> T:
        self._asked = asked = Asked(threading.get_ident(), time.monotonic())
        try:
            try:
                return ask()
            finally:
                self._leave(asked)
        except Stopped:  # it arrived when the policy had just answered
            self._leave(asked)
            raise

    def _leave(self, asked: Asked) -> None:
        while not asked.over:
            try:
                with self._lock:  # from here on nothing more is raised
                    self._asked = None
                if asked.attempts:
                    _raise_in(asked.thread, None)  # nor what was, and is still to arrive
                asked.over = True
            except Stopped:
                continue
        if asked.attempts > ATTEMPTS:
            raise Abandoned
        if asked.attempts:
            raise self._overdue(asked)

    def _watch(self) -> None:
        while not self._stopped.wait(self.limit_s / LOOKS):
            with self._lock:
                asked = self._asked
                if asked is None or time.monotonic() - asked.since < self.limit_s:
                    continue
                asked.attempts += 1
                if asked.attempts == 1:
                    frame = sys._current_frames().get(asked.thread)
                    asked.place, asked.trace = blame.place_in(frame), blame.stack_of(frame)
                if asked.attempts <= ATTEMPTS:
                    _raise_in(asked.thread, Stopped)
                    continue
            self._on_stuck(self._overdue(asked))
            return

    def _overdue(self, asked: Asked) -> Overdue:
        return Overdue("a policy answers in time", f"it took longer than {self.limit_s:g} s", asked.place, asked.trace)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """None takes back what was to be raised there and has not been yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))
