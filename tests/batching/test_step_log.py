"""The step records of runs whose every step is known: cells, seats, and what readers get."""

import json
import threading
from typing import Any

import pytest

from batching import step_log
from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed, MixedParams
from batching.policies.static import Static
from batching.policy import Limits, Plan, Policy, View
from batching.request import Priority, Request, RequestError
from batching.scheduler import Scheduler
from batching.step import StepResult
from batching.step_log import StepLog
from simulator.virtual import VirtualClock, VirtualExecutor

LIMITS = {
    "max_batch_size": 2,
    "token_budget": 64,
    "max_prefill_tokens": 64,
    "max_context": 64,
    "block_size": 4,
    "num_blocks": 64,
}


def make(policy: Policy, depth: int = 1, failing: tuple[int, ...] = (), **changes: Any) -> tuple[Driver, VirtualExecutor]:
    clock = VirtualClock()
    driver = Driver(Scheduler(policy, Limits(**LIMITS | changes)), clock, lambda req: None)
    return driver, VirtualExecutor(clock, lambda step: 0.5, depth, failing)


def run(policy: Policy, requests: list[Request], **setup: Any) -> list[dict[str, Any]]:
    """The records of serving `requests`, all there at the start, to the last."""
    driver, executor = make(policy, **setup)
    for req in requests:
        driver.submit(req)
    while driver.iterate(executor) is not None:
        pass
    return records(driver.steps)


def records(log: StepLog, after: int = 0) -> list[dict[str, Any]]:
    return [json.loads(text) for text in log.read(after, 1000)[1]]


def cells(records: list[dict[str, Any]]) -> list[str]:
    return [record["cells"] for record in records]


def test_a_record_has_what_the_contract_says():
    a, b = Request("a", [0] * 3, 2), Request("b", [0] * 5, 1, Priority.DEFERRED)
    first, second = run(Dynamic(), [a, b])
    assert first == {
        "id": 1, "end": 0.5, "ms": 500.0, "mode": "dynamic", "cells": "pp",
        "new": [[0, 1, "i", "a"], [1, 2, "d", "b"]], "gone": [],
        "queue": 0, "running": 2, "kv": round(3 / 64, 4), "computed": 8, "cached": 0, "tokens": 2, "padding": 0,
        "first_step": 1, "padding_share": 0.0,
        "load": [8, 0, 0, 34], "why": [],
        "done": [["d", 500.0, None, 500.0, 1]],
    }  # fmt: skip
    assert second["gone"] == [[1, "f"]]
    assert second["cells"] == "d"
    assert second["end"] == 1.0
    assert second["done"] == [["i", 500.0, 500.0, 1000.0, 2]]


def test_a_finished_row_of_a_static_batch_shows_as_padding_until_the_batch_ends():
    steps = run(Static(), [Request("short", [0] * 2, 1), Request("long", [0] * 6, 3), Request("next", [0], 1)])
    assert cells(steps) == ["pp", "xd", "xd", "p"]
    assert [step["padding"] for step in steps] == [4, 1, 1, 0]
    assert steps[3]["gone"] == [[0, "f"], [1, "f"]]
    assert steps[2]["done"] == [["i", 500.0, None, 1500.0, 1], ["i", 500.0, 500.0, 1500.0, 3]]


def test_a_newcomer_takes_the_lowest_free_slot():
    requests = [Request("a", [0], 3), Request("b", [0], 1), Request("c", [0], 2), Request("d", [0], 2), Request("e", [0], 9)]
    steps = run(Dynamic(), requests, max_batch_size=3)
    assert [step["new"] for step in steps[:4]] == [
        [[0, 1, "i", "a"], [1, 2, "i", "b"], [2, 3, "i", "c"]],
        [[1, 4, "i", "d"]],
        [[2, 5, "i", "e"]],
        [],
    ]
    assert [step["gone"] for step in steps[1:4]] == [[[1, "f"]], [[2, "f"]], [[0, "f"], [1, "f"]]]
    assert cells(steps)[:4] == ["ppp", "dpd", "ddp", "..d"]


def test_a_preempted_request_leaves_its_slot_and_computes_again_under_its_own_number():
    steps = run(Dynamic(), [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)], num_blocks=4)
    assert cells(steps)[:6] == ["pp", "dd", "d", "d", "d", "r"]
    assert steps[2]["gone"] == [[1, "p"]]
    assert steps[2]["why"] == [["B", "preempted: others need its KV blocks"]]
    assert steps[5]["gone"] == [[0, "f"]]
    assert steps[5]["new"] == [[0, 2, "i", "B"]]
    assert cells(steps)[6:] == ["d", "d"]


def test_a_prompt_that_gets_no_tokens_waits_in_its_slot():
    requests = [Request("d", [0], 9), Request("P", [0] * 30, 1), Request("Q", [0] * 9, 1)]
    steps = run(Dynamic(), requests, max_batch_size=3, token_budget=8)
    assert cells(steps)[:6] == ["pp", "dp", "dp", "dp", "dpp", "d.p"]


class EveryOther(Policy):
    """Skips each request in every second step."""

    turn = 0

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        self.turn += 1
        for place, req in enumerate([*view.resident, *view.waiting]):
            if (place + self.turn) % 2 or not view.resident:
                plan.run(req)
        return plan


def test_a_resident_that_is_passed_over_waits_in_its_slot():
    steps = run(EveryOther(), [Request("a", [0], 3), Request("b", [0], 3)])
    assert cells(steps)[:4] == ["pp", "wd", "dw", "wd"]


def test_a_promotion_is_told_whether_the_request_waits_or_sits():
    policy = Mixed(MixedParams(tbt_slo_ms=1))
    requests = [Request("now", [0], 9), Request("later", [0] * 9, 9, Priority.DEFERRED, due=10.0)]
    steps = run(policy, requests, max_batch_size=1)
    assert [new for step in steps for new in step["new"]] == [[0, 1, "i", "now"], [0, 2, "m", "later"]]

    sits = Request("sits", [0], 30, Priority.DEFERRED, deadline=12.0)
    steps = run(Mixed(), [sits, Request("now", [0], 30)])
    told = [new for step in steps for new in step["new"] if new[3] == "sits"]
    assert told == [[1, 2, "d", "sits"], [1, 2, "m", "sits"]]


@pytest.mark.parametrize("depth", [1, 2])
def test_with_two_steps_under_way_the_cells_are_the_same(depth: int):
    requests = [Request("a", [0] * 3, 4), Request("b", [0] * 3, 2), Request("c", [0] * 3, 3)]
    steps = run(Dynamic(), requests, depth=depth)
    assert cells(steps) == ["pp", "dd", "dp", "dd", ".d"]
    assert [step["id"] for step in steps] == [1, 2, 3, 4, 5]
    assert [step["tokens"] for step in steps] == [2, 2, 2, 2, 1]
    assert sorted(done[4] for step in steps for done in step["done"]) == [2, 3, 4]


def test_who_is_cancelled_or_fails_leaves_with_an_error():
    driver, executor = make(Dynamic(), failing=(3,))
    for name in "ab":
        driver.submit(Request(name, [0], 9))
    driver.iterate(executor)
    driver.cancel("a", RequestError("cancelled", "gone"))
    driver.iterate(executor)
    driver.submit(Request("c", [0], 1))
    driver.iterate(executor)  # fails b and c
    driver.submit(Request("d", [0], 1))
    while driver.iterate(executor) is not None:
        pass
    steps = records(driver.steps)
    assert [step["gone"] for step in steps] == [[], [[0, "e"]], [], [[0, "e"], [1, "e"]]]
    assert cells(steps) == ["pp", ".d", "pd", "p"]
    assert [step["tokens"] for step in steps] == [2, 1, 0, 1]


class Clears(Policy):
    """Preempts the whole batch in a step that computes nothing, then runs it."""

    turn = 0

    def schedule(self, view: View, now: float) -> Plan:
        plan = Plan(view)
        plan.release(*view.done)
        self.turn += 1
        if self.turn == 2:
            for req in view.resident:
                plan.preempt(req)
            return plan
        for req in [*view.resident, *view.waiting]:
            plan.run(req)
        return plan


def test_a_preemption_in_a_plan_without_a_step_is_told_by_the_next_one():
    steps = run(Clears(), [Request("a", [0] * 3, 3), Request("b", [0] * 3, 3)])
    assert steps[1]["gone"] == [[0, "p"], [1, "p"]]
    assert [new[1] for new in steps[1]["new"]] == [2, 1], "the last one preempted is the first in the queue"
    assert cells(steps) == ["pp", "rr", "dd"]


def test_a_policy_with_a_reason_for_everybody_is_cut_short():
    log = StepLog(2)
    driver, _ = make(Dynamic())
    driver.submit(Request("a", [0], 1))
    step = driver.next_step()
    assert step is not None
    plan = driver.scheduler.plan
    assert plan is not None
    plan._refused = {f"{n}": "waits" for n in range(1000)}
    log.on_plan(plan)
    log.on_step(step, [row.req for row in step.rows], "dynamic", 0, 0.0, {})
    log.on_result(StepResult(1, 0.0, 1.0), 1)
    log.publish()
    assert len(records(log)[0]["why"]) == step_log.MAX_REASONS


def filled(steps: int) -> StepLog:
    driver, executor = make(Dynamic())
    driver.submit(Request("a", [0], steps))
    while driver.iterate(executor) is not None:
        pass
    return driver.steps


def test_readers_get_what_came_after_the_id_they_know():
    log = filled(5)
    assert log.last == 5
    assert [record["id"] for record in records(log, after=3)] == [4, 5]
    assert log.read(0, 2)[0] == 2
    assert log.read(5, 10) == (5, [])
    assert log.wait(4, 10, timeout=0)[0] == 5


def test_an_id_from_before_a_restart_gets_everything():
    assert [record["id"] for record in records(filled(3), after=900)] == [1, 2, 3]
    assert StepLog(2).wait(900, 10, timeout=0) == (0, [])


def test_the_oldest_records_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_log, "KEPT", 4)
    log = filled(9)
    assert [record["id"] for record in records(log)] == [6, 7, 8, 9]


def test_a_waiting_reader_wakes_with_the_next_record():
    driver, executor = make(Dynamic())
    driver.submit(Request("a", [0], 2))
    found: list[tuple[int, list[str]]] = []
    reader = threading.Thread(target=lambda: found.append(driver.steps.wait(1, 10, timeout=20)))
    driver.iterate(executor)
    reader.start()
    while driver.iterate(executor) is not None:
        pass
    reader.join(20)
    assert found[0][0] == 2
