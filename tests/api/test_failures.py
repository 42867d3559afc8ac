"""What goes wrong inside: a step, a policy, a deadline, a full queue, the end of the server. Others are not affected."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from werkzeug.test import TestResponse

from batching import policy_file
from batching.loop import BatchingLoop, Engine, Health
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policy import Limits, Plan, View
from batching.policy_file import mode_named
from batching.request import Request

from .conftest import PATIENCE_S, SETTINGS, Gate, Server
from .server_process import wait_for


def outcome(future: "Future[TestResponse]") -> tuple[int, str | None]:
    response = future.result(PATIENCE_S)
    return response.status_code, response.get_json().get("error", {}).get("code")


def test_an_exception_inside_a_step_fails_its_requests_and_the_server_goes_on(server: Server, gate: Gate) -> None:
    gate.close()
    first = server.later(num_tokens=50)
    server.wait_for_load(running=1, queue_depth=0)
    second = server.later(num_tokens=50)
    server.wait_for_load(running=1, queue_depth=1)
    gate.failure = RuntimeError("the device is on fire")
    gate.open()
    assert outcome(first) == outcome(second) == (500, "step_failed")
    assert "the device is on fire" in first.result().get_json()["error"]["message"]
    gate.reset()
    assert server.ask(num_tokens=5).status_code == 200
    stats = server.stats()
    assert stats["errors"] == {"step_failed": 2}
    assert (stats["running"], stats["queue_depth"], stats["kv_use"]) == (0, 0, 0)


def test_a_failed_step_changes_no_later_text(server: Server, gate: Gate) -> None:
    before = server.ask(num_tokens=20, seed=3).get_json()["completion"]
    gate.failure = MemoryError("no more")
    assert server.ask(num_tokens=20).status_code == 500
    gate.reset()
    assert server.ask(num_tokens=20, seed=3).get_json()["completion"] == before


def test_a_running_request_whose_deadline_passes_gets_504(server: Server, gate: Gate) -> None:
    gate.seconds_a_step = 0.01
    response = server.ask(num_tokens=500, deadline_s=0.1)
    assert response.status_code == 504
    assert response.get_json()["error"]["param"] == "deadline_s"
    assert server.ask().status_code == 200
    assert server.stats()["kv_use"] == 0


def test_a_waiting_request_whose_deadline_passes_gets_504_while_others_run(serve: Callable[..., Server], gate: Gate) -> None:
    server = serve(max_batch_size=1)
    gate.seconds_a_step = 0.01
    running = server.later(num_tokens=400)
    wait_for(lambda: server.loop.stats()["running"], PATIENCE_S, "one running")
    assert outcome(server.later(num_tokens=1, deadline_s=0.1)) == (504, "deadline_exceeded")
    assert not running.done()
    gate.reset()
    assert outcome(running) == (200, None)


def test_a_deadline_wakes_a_batch_that_waits_to_fill_up(serve: Callable[..., Server]) -> None:
    server = serve("static", batch_timeout_ms=60_000)
    assert outcome(server.later(num_tokens=1, deadline_s=0.05)) == (504, "deadline_exceeded")


def test_a_full_queue_is_429_with_retry_after(serve: Callable[..., Server], gate: Gate) -> None:
    server = serve(max_batch_size=1, max_queue=2)
    gate.close()
    taken = [server.later()]
    server.wait_for_load(running=1, queue_depth=0)
    for depth in (1, 2):
        taken.append(server.later())
        server.wait_for_load(running=1, queue_depth=depth)
    refused = server.ask()
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.get_json()["error"]["code"] == "queue_full"
    assert "2" in refused.get_json()["error"]["message"]
    gate.open()
    assert [outcome(future) for future in taken] == [(200, None)] * 3
    assert server.stats()["errors"] == {"queue_full": 1}


class Raises(Dynamic):
    def schedule(self, view: View, now: float) -> Plan:
        if view.resident:
            raise ZeroDivisionError("an exercise gone wrong")
        return super().schedule(view, now)


class RunsTwice(Dynamic):
    def schedule(self, view: View, now: float) -> Plan:
        plan = super().schedule(view, now)
        for req in view.resident:
            plan.run(req)
        return plan


class PlansNothing(Dynamic):
    def schedule(self, view: View, now: float) -> Plan:
        return Plan(view) if view.resident else super().schedule(view, now)


class ReturnsNothing(Dynamic):
    def schedule(self, view: View, now: float) -> Plan:
        return None if view.resident else super().schedule(view, now)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("policy", "said"),
    [(Raises, "an exercise"), (RunsTwice, "one decision"), (PlansNothing, "must be planned"), (ReturnsNothing, "None")],
)
def test_a_policy_that_fails_is_named_and_the_last_good_one_goes_on(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, policy: type[Dynamic], said: str
) -> None:
    monkeypatch.setitem(POLICIES, "exercise", policy)
    server = serve("mixed")
    assert server.client.put("/mode", json={"mode": "exercise"}).get_json()["mode"] == "exercise"
    response = server.ask(num_tokens=20)
    assert (response.status_code, response.get_json()["error"]["code"]) == (500, "policy_failed")
    for message in (response.get_json()["error"]["message"], server.stats()["last_policy_failure"]):
        assert "exercise" in message
        assert said in message
    assert server.client.get("/mode").get_json()["mode"] == "mixed"
    answers = [server.later(num_tokens=20) for _ in range(3)]
    assert [outcome(future) for future in answers] == [(200, None)] * 3
    assert server.stats()["kv_use"] == 0


class CannotBeMade(Dynamic):
    def __init__(self, params: object = None) -> None:
        raise ZeroDivisionError("an exercise gone wrong")


class IsNeverMade(Dynamic):
    def __init__(self, params: object = None) -> None:
        while True:
            pass


@pytest.mark.parametrize(
    ("policy", "said"), [(CannotBeMade, "exercise cannot be made: ZeroDivisionError"), (IsNeverMade, "in time")]
)
def test_a_policy_that_cannot_be_made_is_a_400_and_the_modes_go_on_being_shown(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, policy: type[Dynamic], said: str
) -> None:
    monkeypatch.setitem(POLICIES, "exercise", policy)
    server = serve("mixed")
    server.loop._policy_limit_s = 0.4
    response = server.client.put("/mode", json={"mode": "exercise"})
    assert response.status_code == 400
    told = response.get_json()["error"]["message"]
    assert said in told
    assert "(test_failures.py, line " in told
    shown = server.client.get("/mode").get_json()
    assert shown["mode"] == "mixed"
    assert "exercise" in shown["modes"]
    assert server.client.put("/mode", json={"mode": "orca"}).get_json()["mode"] == "orca"


def test_a_mode_out_of_a_file_is_named_by_it_and_no_file_is_loaded_over_http(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_file, "FILES", {})
    monkeypatch.setitem(POLICIES, "mine", None)  # so that what comes in is taken out again
    del POLICIES["mine"]
    mine = tmp_path / "mine.py"
    mine.write_text("from batching.policies.dynamic import Dynamic\nclass Mine(Dynamic): pass\n")
    server = serve(mode_named(str(mine)))
    assert server.client.get("/mode").get_json()["mode"] == "mine"
    assert server.ask().get_json()["mode"] == "mine"
    assert server.client.put("/mode", json={"mode": "orca"}).status_code == 200
    assert server.client.put("/mode", json={"mode": "mine"}).get_json()["mode"] == "mine"
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit\n")
    for name in ("other", str(other)):
        response = server.client.put("/mode", json={"mode": name})
        assert (response.status_code, response.get_json()["error"]["param"]) == (400, "mode")


class RefusalRaises(Dynamic):
    def refuses(self, req: Request, limits: Limits) -> str | None:
        raise ZeroDivisionError("an exercise gone wrong")


def test_a_policy_whose_refusal_raises_as_it_takes_over_does_not_end_the_server(
    serve: Callable[..., Server], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "exercise", RefusalRaises)
    server = serve(max_batch_size=1)
    gate.close()
    running = server.later(num_tokens=3)
    server.wait_for_load(running=1, queue_depth=0)
    waiting = server.later(num_tokens=3)
    server.wait_for_load(running=1, queue_depth=1)
    switching = server.put_mode_later("exercise")
    wait_for(lambda: len(server.loop._inbox) == 2, PATIENCE_S, "the switch is on its way")
    gate.open()
    assert outcome(running) == (200, None)
    assert outcome(waiting) in ((200, None), (500, "policy_failed"))
    switching.result(PATIENCE_S)
    assert server.loop.health is Health.READY
    assert "exercise" in server.stats()["last_policy_failure"]
    assert server.ask().status_code == 200


def test_switches_at_the_same_time_are_each_answered_with_their_own_mode(server: Server, gate: Gate) -> None:
    gate.close()
    running = server.later(num_tokens=3)
    server.wait_for_load(running=1, queue_depth=0)
    modes = ["static", "orca", "mixed", "static", "nobatch"]
    switching = [server.put_mode_later(mode) for mode in modes]
    wait_for(lambda: len(server.loop._inbox) == len(modes), PATIENCE_S, "all switches are on their way")
    gate.open()
    assert outcome(running) == (200, None)
    assert [future.result(PATIENCE_S).get_json()["mode"] for future in switching] == modes
    assert server.client.get("/mode").get_json()["mode"] in modes


def test_draining_ends_what_waits_and_lets_finish_what_runs(serve: Callable[..., Server], gate: Gate) -> None:
    server = serve(max_batch_size=1)
    gate.close()
    running = server.later(num_tokens=10)
    server.wait_for_load(running=1, queue_depth=0)
    waiting = server.later(num_tokens=10)
    server.wait_for_load(running=1, queue_depth=1)
    server.loop.drain("the lesson is over")

    health = server.client.get("/health")
    assert (health.status_code, health.get_json()) == (503, {"status": "draining", "reason": "the lesson is over"})
    late = server.ask()
    assert (late.status_code, late.get_json()["error"]["code"]) == (503, "draining")
    assert late.headers["Retry-After"]
    assert server.client.put("/mode", json={"mode": "static"}).status_code == 503
    assert server.client.get("/stats").status_code == 200

    gate.open()
    assert outcome(waiting) == (503, "draining")
    assert outcome(running) == (200, None)
    assert server.loop.join(PATIENCE_S)


def test_a_switch_that_waits_while_the_server_drains_is_answered(server: Server, gate: Gate) -> None:
    gate.close()
    running = server.later(num_tokens=3)
    server.wait_for_load(running=1, queue_depth=0)
    switched = server.loop.switch(SETTINGS.make_policy("static", {}))
    server.loop.drain("the lesson is over")
    gate.open()
    assert outcome(running) == (200, None)
    assert server.loop.join(PATIENCE_S)
    assert switched.wait(1), "the caller of PUT /mode would wait until it is killed"


def test_while_the_model_loads_calls_are_503_with_the_reason(engine: Engine) -> None:
    may_load = threading.Event()

    def load() -> Engine:
        may_load.wait(PATIENCE_S)
        return engine

    loop = BatchingLoop(Dynamic(), load)
    loop.start()
    server = Server(loop, SETTINGS)
    for method, path in (("GET", "/health"), ("POST", "/inference"), ("GET", "/stats"), ("PUT", "/mode")):
        body = {"prompt": "a", "num_tokens": 1} if path == "/inference" else {"mode": "static"}
        response = server.client.open(path, method=method, json=body)
        assert response.status_code == 503
        assert "the model is loading" in response.get_data(as_text=True)
    may_load.set()
    wait_for(lambda: server.client.get("/health").status_code == 200, PATIENCE_S, "ready")
    assert server.ask().status_code == 200
    server.stop()


def test_a_ready_line_that_cannot_be_written_leaves_no_request_hanging(engine: Engine, gate: Gate) -> None:
    """`./server.sh dynamic | head -0`: the reader of the ready line is gone."""

    def broken_pipe(engine: Engine) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    failures: list[BaseException] = []
    limits = replace(engine.limits, max_queue=4)
    loop = BatchingLoop(
        Dynamic(), lambda: engine._replace(limits=limits), on_ready=broken_pipe, on_failed=lambda error: failures.append(error)
    )
    loop.start()
    wait_for(lambda: loop.health is not Health.LOADING, PATIENCE_S, "loaded")
    loop.join(1)
    if loop.health is Health.READY:
        ticket = loop.submit(Request(id="a", tokens=[1, 2, 3], max_tokens=2))
        assert ticket.event.wait(2), "the server calls itself ready, and nobody answers"
        loop.drain("the test is over")
    else:
        assert failures
