"""A policy of each bad kind on the running loop: others are answered, the cause is named with file and line, nothing leaks, and
the mode can be switched."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batching.loop import BatchingLoop, Engine, Health
from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Limits, Plan, Policy, RequestView, View
from batching.replay import replay
from batching.request import Lane, Request
from batching.step import Step
from batching.view import Overdue
from batching.watchdog import ATTEMPTS, Stopped, Watchdog
from tests.batching.test_loop import Device

LIMITS = Limits(max_batch_size=4, token_budget=64, max_prefill_tokens=256, max_context=128, num_blocks=64, max_queue=200)
PATIENCE_S = 60
LIMIT_S = 0.4
HERE = Path(__file__).name


class Hostile(Dynamic):
    """Behaves until it is asked about the request `bad`."""

    def schedule(self, view: View, now: float) -> Plan:
        plan = super().schedule(view, now)
        live = {req.id: req for req in (*view.waiting, *view.resident)}
        return self.attack(plan, live["bad"]) if "bad" in live else plan

    def attack(self, plan: Plan, req: RequestView) -> Plan:
        raise NotImplementedError


def hostile(attack: Callable[[Plan, RequestView], object]) -> Policy:
    class Kind(Hostile):
        def attack(self, plan: Plan, req: RequestView) -> Plan:
            return attack(plan, req)  # type: ignore[return-value]

    return Kind()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class Equal:
    """Claims to be whatever it is compared with."""

    def __init__(self, like: object) -> None:
        self._hash = hash(like)

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return self._hash


def loops_for_ever(plan: Plan, req: RequestView) -> Plan:
    while True:
        pass


def sleeps(plan: Plan, req: RequestView) -> Plan:
    time.sleep(8)
    return plan


def swallows_everything(plan: Plan, req: RequestView) -> Plan:
    end = time.monotonic() + 8
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                pass
        except BaseException:
            pass
    return plan


def exits(plan: Plan, req: RequestView) -> Plan:
    sys.exit()


def runs_out_of_memory(plan: Plan, req: RequestView) -> Plan:
    raise MemoryError


def recurses(plan: Plan, req: RequestView) -> Plan:
    return recurses(plan, req)


def interrupts(plan: Plan, req: RequestView) -> Plan:
    raise KeyboardInterrupt


def is_unspeakable(plan: Plan, req: RequestView) -> Plan:
    raise Unspeakable


def has_no_end(plan: Plan, req: RequestView) -> Plan:
    raise ValueError("x" * 10_000_000)


def generates(plan: Plan, req: RequestView) -> Iterator[Plan]:
    yield plan


def writes_state(plan: Plan, req: RequestView) -> None:
    req.state = None  # type: ignore[assignment]


def writes_blocks(plan: Plan, req: RequestView) -> None:
    req.blocks.pop()  # type: ignore[attr-defined]


RAISES = [
    (exits, "raised: SystemExit", HERE),
    (interrupts, "raised: KeyboardInterrupt", HERE),
    (runs_out_of_memory, "raised: MemoryError", HERE),
    (recurses, "raised: RecursionError", HERE),
    (is_unspeakable, "raised: Unspeakable", HERE),
    (has_no_end, "raised: ValueError: xxx", HERE),
    (writes_state, "a policy only reads requests: state of request bad", HERE),
    (writes_blocks, "raised: AttributeError", HERE),
    (lambda plan, req: plan.because(req, object()), "a reason is a string", HERE),
    (lambda plan, req: plan.run(Equal(req)), "the requests of its view", HERE),
    (lambda plan, req: Plan(plan._view).run_exactly(req, True), "a whole number of tokens", HERE),
    (lambda plan, req: Plan(plan._view).run(req, reserve=2.5), "whole numbers of columns", HERE),
    (lambda plan, req: plan.wait_until("soon"), "raised: TypeError", HERE),
    (lambda plan, req: None, "a policy returns the plan that it filled: not NoneType", ""),
    (generates, "a policy returns the plan that it filled: not generator", ""),
    (lambda plan, req: (setattr(plan, "variant", 1.0), plan)[1], "a variant that there is", ""),
    (lambda plan, req: (setattr(plan, "lane", "main"), plan)[1], "a lane computes one step", ""),
]
HANGS = [
    (loops_for_ever, f"a policy answers in time: it took longer than {LIMIT_S:g} s", HERE),
    (sleeps, f"a policy answers in time: it took longer than {LIMIT_S:g} s", HERE),
    (swallows_everything, f"a policy answers in time: it took longer than {LIMIT_S:g} s", HERE),
]


class NoLanes(Policy):
    lanes = ()


class LanesThatRaise(Policy):
    @property
    def lanes(self) -> tuple[Lane, ...]:  # type: ignore[override]
        raise ZeroDivisionError


class WaitsForAges(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.wait_until(now + 1e9)
        return plan


class RefusesWithAnObject(Dynamic):
    def refuses(self, req: RequestView, limits: Limits) -> str | None:
        return object()  # type: ignore[return-value]


class ThinksForEverAboutRefusing(Dynamic):
    def refuses(self, req: RequestView, limits: Limits) -> str | None:
        while True:
            pass


class SleepsWhenRefusing(Dynamic):
    def refuses(self, req: RequestView, limits: Limits) -> str | None:
        time.sleep(8)
        return None


class EqualsEverything(Dynamic):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    def schedule(self, view: View, now: float) -> Plan:
        raise ZeroDivisionError


class ShowsNoParameters(Dynamic):
    def __init__(self) -> None:
        super().__init__()
        self.params = object()

    def schedule(self, view: View, now: float) -> Plan:
        return Plan(view)


class KeepsForEver(Dynamic):
    """Lets finished requests compute padding for ever."""

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.done:
            plan.keep(req)
        for req in (*view.resident, *view.waiting):
            plan.run(req, reserve=128)
        return plan


class PreemptsForEver(Dynamic):
    """Lets everybody begin, and nobody go on."""

    turn = 0

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        for req in view.resident:
            plan.preempt(req)
        if not view.resident:
            for req in view.waiting:
                plan.run_exactly(req, 1)
        return plan


class ReleasesAgain(Dynamic):
    def __init__(self) -> None:
        super().__init__()
        self.known: list[RequestView] = []

    def schedule(self, view: View, now: float) -> Plan:
        plan = super().schedule(view, now)
        for req in self.known:
            plan.release(req)
        self.known.extend(view.done)
        return plan


WHOLE = [
    (NoLanes(), "a policy plans for one lane at least"),
    (LanesThatRaise(), "raised: ZeroDivisionError"),
    (WaitsForAges(), "something must be planned within 120 s"),
    (RefusesWithAnObject(), "refuses says why or None"),
    (ThinksForEverAboutRefusing(), "a policy answers in time"),
    (SleepsWhenRefusing(), "a policy answers in time"),
    (EqualsEverything(), "raised: ZeroDivisionError"),
    (ShowsNoParameters(), "something must be planned"),
    (KeepsForEver(), "something must be planned"),
    (PreemptsForEver(), "something must be planned"),
    (ReleasesAgain(), "only finished requests are released or kept"),
]


class Noting(Device):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple] = []

    def submit(self, step: Step) -> None:
        self.made.append(step.values())
        super().submit(step)


def running(limit_s: float = LIMIT_S, log: list | None = None) -> BatchingLoop:
    ready = threading.Event()
    engine = Engine(Noting(), LIMITS, None, {})
    write = None if log is None else log.append
    loop = BatchingLoop(Dynamic(), lambda: engine, on_ready=lambda engine: ready.set(), input_log=write, policy_limit_s=limit_s)
    loop.start()
    assert ready.wait(PATIENCE_S)
    return loop


def live_through(policy: Policy, log: list | None = None) -> tuple[BatchingLoop, dict[str, Request]]:
    """Requests under a good policy, under `policy`, and under another good one: all are answered, and nothing leaks."""
    loop = running(log=log)
    assert loop.switch(policy).wait(PATIENCE_S)
    tickets = [loop.submit(Request(name, [0] * 20, 16 + len(name), arrival=loop.clock())) for name in ("first", "bad", "last")]
    for ticket in tickets:
        assert ticket.event.wait(PATIENCE_S), ticket.request
    assert loop.health is Health.READY
    assert loop.switch(NoBatch()).wait(PATIENCE_S)
    after = loop.submit(Request("after", [0], 2, arrival=loop.clock()))
    assert after.event.wait(PATIENCE_S)
    assert (after.request.error, after.request.mode) == (None, "nobatch")
    assert loop.stats()["kv_use"] == 0
    loop.drain("the test is over")
    assert loop.join(PATIENCE_S)
    return loop, {ticket.request.id: ticket.request for ticket in (*tickets, after)}


def check(loop: BatchingLoop, requests: dict[str, Request], rule: str, place: str) -> None:
    told = loop.stats()["last_policy_failure"]
    assert rule in told
    assert len(told) < 600
    assert (f"({place}, line " in told) == bool(place), told
    for req in requests.values():
        assert req.error is None or req.error.code == "policy_failed"


@pytest.mark.parametrize(("attack", "rule", "place"), RAISES, ids=[rule for _, rule, _ in RAISES])
def test_whatever_it_does_in_a_plan_others_are_answered(attack, rule: str, place: str, caplog: pytest.LogCaptureFixture):
    loop, requests = live_through(hostile(attack))
    check(loop, requests, rule, place)
    assert len(caplog.records) == 1, "nothing floods the log"
    if place:
        assert f'{HERE}", line' in caplog.text


@pytest.mark.parametrize(("attack", "rule", "place"), HANGS, ids=[attack.__name__ for attack, _, _ in HANGS])
def test_whatever_keeps_it_busy_it_is_stopped_or_left_behind(attack, rule: str, place: str):
    log: list[dict] = []
    loop, requests = live_through(hostile(attack), log)
    check(loop, requests, rule, place)
    assert requests["after"].error is None


@pytest.mark.parametrize(("policy", "rule"), WHOLE, ids=[type(policy).__name__ for policy, _ in WHOLE])
def test_whatever_kind_of_policy_it_is_others_are_answered(policy: Policy, rule: str):
    loop, requests = live_through(policy)
    told = loop.stats()["last_policy_failure"]
    assert rule in told
    assert type(policy).__name__ in told
    assert all(req.error is None or req.error.code == "policy_failed" for req in requests.values())


def test_a_switch_is_not_held_up_by_a_policy_that_waits_with_nobody_running():
    loop = running()
    loop.switch(WaitsForAlmostTooLong()).wait(PATIENCE_S)
    ticket = loop.submit(Request("a", [0], 1, arrival=loop.clock()))
    assert not ticket.event.wait(0.1)
    assert loop.switch(NoBatch()).wait(PATIENCE_S)
    assert ticket.event.wait(PATIENCE_S)
    assert ticket.request.error is None
    loop.drain("the test is over")
    assert loop.join(PATIENCE_S)


class WaitsForAlmostTooLong(Policy):
    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.wait_until(now + 100)
        return plan


# The watchdog by itself.


def test_it_gives_back_what_was_answered_in_time_and_passes_on_what_was_raised():
    watchdog = Watchdog(LIMIT_S)
    assert watchdog(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        watchdog(lambda: 1 // 0)
    watchdog.stop()


def test_what_is_stopped_is_named_with_its_line_and_the_thread_goes_on():
    watchdog = Watchdog(LIMIT_S)
    for _ in range(2):
        with pytest.raises(Overdue, match=rf"longer than {LIMIT_S} s \({HERE}, line ") as caught:
            watchdog(lambda: loops_for_ever(None, None))  # type: ignore[arg-type]
        assert "while True" in caught.value.trace or "pass" in caught.value.trace
    end = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < end:
        pass  # nothing arrives here any more
    watchdog.stop()


def test_the_limit_holds_for_one_question_not_for_all_together():
    watchdog = Watchdog(LIMIT_S)
    for _ in range(8):
        watchdog(lambda: time.sleep(LIMIT_S / 4))
    watchdog.stop()


def test_an_answer_that_comes_after_it_was_told_to_stop_does_not_count():
    def swallows_once() -> int:
        try:
            loops_for_ever(None, None)  # type: ignore[arg-type]
        except Stopped:
            return 5
        return 6

    watchdog = Watchdog(LIMIT_S)
    with pytest.raises(Overdue):
        watchdog(swallows_once)
    watchdog.stop()


def test_what_cannot_be_stopped_is_told_of_once():
    told: list[Overdue] = []
    watchdog = Watchdog(LIMIT_S / 4, told.append)
    ended = threading.Event()

    def ask() -> None:
        try:
            watchdog(lambda: time.sleep(LIMIT_S / 4 * (ATTEMPTS + 8) / 2))
        except BaseException as error:
            told.append(error)  # type: ignore[arg-type]
        ended.set()

    threading.Thread(target=ask).start()
    assert ended.wait(PATIENCE_S)
    assert [type(error).__name__ for error in told] == ["Overdue", "Abandoned"]


# A policy that took too long is in the input log.


@pytest.mark.parametrize("attack", [loops_for_ever, sleeps])
def test_a_run_with_a_policy_that_took_too_long_replays_to_the_same_steps_without_waiting_for_it(attack):
    log: list[dict] = []
    loop, _ = live_through(hostile(attack), log)
    assert [record["kind"] for record in log].count("overdue") == 1
    assert [record["told"] for record in log if record["kind"] == "overdue"] == [f"it took longer than {LIMIT_S:g} s"]
    for record in log:  # by a name that the replay knows
        if record["kind"] == "switch" and record["mode"] == "Kind":
            record["mode"] = "dynamic"
    assert loop.engine is not None
    assert replay(log) == loop.engine.executor.made  # type: ignore[attr-defined]
