"""The batching thread with real threads and a virtual device: every Event set once, switches, hang-ups, drains, failures."""

import threading
import time
from collections import Counter

import pytest

from batching import loop as loop_module
from batching.loop import BatchingLoop, Engine, Health, Unavailable
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Limits
from batching.request import Refused, Request
from batching.step import Step, StepResult

LIMITS = Limits(max_batch_size=8, token_budget=64, max_prefill_tokens=256, max_context=128, num_blocks=64, max_queue=200)
PATIENCE_S = 20


class Device:
    """An executor on the wall clock; `gate`, where given, holds each step until it is opened."""

    depth = 1

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.steps = 0

    def submit(self, step: Step) -> None:
        self.step = step

    def collect(self) -> StepResult:
        if self.gate:
            assert self.gate.wait(PATIENCE_S)
        self.steps += 1
        tokens = {row.req.id: row.start + row.count for row in self.step.rows if row.samples}
        return StepResult(self.step.id, time.monotonic(), time.monotonic(), tokens)


def running(policy=None, gate: threading.Event | None = None, limits: Limits = LIMITS) -> BatchingLoop:
    ready = threading.Event()
    loop = BatchingLoop(
        policy or Dynamic(), lambda: Engine(Device(gate), limits, None, {}), on_ready=lambda engine: ready.set()
    )
    loop.start()
    assert ready.wait(PATIENCE_S)
    return loop


@pytest.fixture
def counted(monkeypatch):
    """How often each Event was set, by the Event."""
    times: Counter[threading.Event] = Counter()

    class CountingEvent(threading.Event):
        def set(self) -> None:
            times[self] += 1
            super().set()

    monkeypatch.setattr(loop_module.threading, "Event", CountingEvent)
    return times


def test_every_request_gets_its_event_set_once_while_the_mode_is_switched(counted):
    loop = running()
    answers: list = []

    def client(number: int) -> None:
        for i in range(5):
            ticket = loop.submit(Request(f"{number}-{i}", [0] * (number % 7 + 1), i + 1, arrival=time.monotonic()))
            assert ticket.event.wait(PATIENCE_S)
            answers.append(ticket)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for mode in list(POLICIES) * 4:
        assert loop.switch(POLICIES[mode]()).wait(PATIENCE_S)
        assert loop.mode["mode"] == mode
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(answers) == 100
    assert {counted[ticket.event] for ticket in answers} == {1}
    assert all(ticket.request.error is None for ticket in answers)
    assert all(len(ticket.request.output) == ticket.request.max_tokens for ticket in answers)
    assert loop.stats()["requests_finished"] == 100


def test_a_cancelled_request_frees_its_seat():
    gate = threading.Event()
    loop = running(NoBatch(), gate)
    first = loop.submit(Request("first", [0], 50))
    second = loop.submit(Request("second", [0], 1))
    loop.cancel(first)
    gate.set()
    assert first.event.wait(PATIENCE_S)
    assert first.request.error.code == "cancelled"
    assert second.event.wait(PATIENCE_S)
    assert second.request.error is None
    assert loop.stats()["kv_use"] == 0


def test_a_full_queue_is_refused_at_once_though_a_step_is_under_way():
    gate = threading.Event()
    limits = Limits(max_batch_size=1, token_budget=64, max_prefill_tokens=256, max_context=128, num_blocks=64, max_queue=3)
    loop = running(NoBatch(), gate, limits)
    first = loop.submit(Request("first", [0], 1))
    while not loop.stats()["running"]:
        time.sleep(0.005)
    tickets = [first, *(loop.submit(Request(str(i), [0], 1)) for i in range(3))]
    with pytest.raises(Refused, match="max_queue is 3"):
        loop.submit(Request("one too many", [0], 1))
    gate.set()
    assert all(ticket.event.wait(PATIENCE_S) for ticket in tickets)
    assert loop.stats()["errors"] == {"queue_full": 1}


def test_draining_answers_the_queue_with_503_finishes_what_runs_and_ends_the_thread():
    gate = threading.Event()
    loop = running(NoBatch(), gate)
    first = loop.submit(Request("running", [0], 5))
    while not loop.stats()["running"]:
        time.sleep(0.005)
    queued = loop.submit(Request("queued", [0], 5))
    loop.drain("going down")
    assert loop.health is Health.DRAINING
    with pytest.raises(Unavailable, match="going down"):
        loop.submit(Request("late", [0], 1))
    gate.set()
    assert loop.join(PATIENCE_S)
    assert first.request.error is None
    assert len(first.request.output) == 5
    assert queued.request.error.code == "draining"


def test_aborting_ends_what_still_runs():
    gate = threading.Event()
    loop = running(NoBatch(), gate)
    ticket = loop.submit(Request("long", [0], 100))
    loop.drain("going down")
    loop.abort("out of time")
    gate.set()
    assert loop.join(PATIENCE_S)
    assert ticket.request.error.code == "draining"


def test_a_load_that_fails_is_reported_and_nothing_is_taken():
    failures: list[BaseException] = []

    def load() -> Engine:
        raise ValueError("no such weights")

    loop = BatchingLoop(Dynamic(), load, on_failed=failures.append)
    loop.start()
    assert loop.join(PATIENCE_S)
    assert loop.health is Health.FAILED
    assert "no such weights" in loop.reason
    assert len(failures) == 1
    with pytest.raises(Unavailable):
        loop.submit(Request("a", [0], 1))


def test_a_thread_that_dies_answers_everyone():
    gate = threading.Event()
    failures: list[BaseException] = []
    device = Device(gate)
    device.collect = lambda: gate.wait(PATIENCE_S) and 1 / 0  # type: ignore[method-assign]
    ready = threading.Event()
    loop = BatchingLoop(
        Dynamic(), lambda: Engine(device, LIMITS, None, {}), on_ready=lambda _: ready.set(), on_failed=failures.append
    )
    loop.start()
    assert ready.wait(PATIENCE_S)
    tickets = [loop.submit(Request(str(i), [0], 5)) for i in range(3)]
    gate.set()
    assert all(ticket.event.wait(PATIENCE_S) for ticket in tickets)
    assert {ticket.request.error.code for ticket in tickets} == {"engine_failed"}
    assert len(failures) == 1


def test_an_idle_thread_sleeps_and_does_not_poll():
    loop = running()
    calls = []
    original = loop._driver.next_step
    loop._driver.next_step = lambda: calls.append(1) or original()
    time.sleep(0.3)
    assert not calls
    assert loop.submit(Request("a", [0], 3)).event.wait(PATIENCE_S)
    time.sleep(0.1)
    assert len(calls) <= 6, "one a token, one to release, and no more"
