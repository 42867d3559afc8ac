"""Threads come when there is work, no more than may be, and go again."""

import threading

import pytest

from api import threads as module
from api.threads import Threads

from .server_process import wait_for

PATIENCE_S = 20


def named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_work_is_done_by_so_many_threads_and_the_rest_of_it_after() -> None:
    threads, may_end, begun = Threads("three", 3), threading.Event(), []
    for i in range(5):
        threads.submit(lambda i=i: (begun.append(i), may_end.wait(PATIENCE_S)))
    wait_for(lambda: len(begun) == 3, PATIENCE_S, "three are at work")
    assert named("three") == 3
    may_end.set()
    wait_for(lambda: len(begun) == 5, PATIENCE_S, "all of it is done")
    assert sorted(begun) == [0, 1, 2, 3, 4]


def test_threads_without_work_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    threads, done = Threads("short", 50), threading.Barrier(51)
    for _ in range(50):
        threads.submit(lambda: done.wait(PATIENCE_S))
    done.wait(PATIENCE_S)
    wait_for(lambda: named("short") == 0, PATIENCE_S, "none is left")
    again = threading.Event()
    threads.submit(again.set)
    assert again.wait(PATIENCE_S)


def test_threads_go_although_there_is_always_a_little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.1)
    threads, done = Threads("little", 20), threading.Barrier(21)
    for _ in range(20):
        threads.submit(lambda: done.wait(PATIENCE_S))
    done.wait(PATIENCE_S)

    def only_one_after_a_little() -> bool:
        threads.submit(lambda: None)
        return named("little") == 1

    wait_for(only_one_after_a_little, PATIENCE_S, "one is left")


def test_work_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    threads, done = Threads("one", 1), threading.Event()
    threads.submit(lambda: 1 // 0)
    threads.submit(done.set)
    assert done.wait(PATIENCE_S)
    assert "ZeroDivisionError" in caplog.text


def test_where_the_system_gives_no_more_threads_those_that_there_are_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, may_end, done = Threads("few", 9), threading.Event(), threading.Event()
    threads.submit(lambda: may_end.wait(PATIENCE_S))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        threads.submit(done.set)
    assert not done.is_set()
    may_end.set()
    assert done.wait(PATIENCE_S)
