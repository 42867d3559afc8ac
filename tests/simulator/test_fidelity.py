"""Calibrating and validating, against an engine whose law is known."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batching.driver import LOG_SCHEMA, Driver
from batching.policies import POLICIES
from batching.policy import Limits
from batching.request import Request, RequestError
from batching.scheduler import Scheduler
from batching.step import Step
from simulator.__main__ import main
from simulator.calibrate import LogError, busy_steps, make_again, read_log
from simulator.plans import Lengths, poisson_plan
from simulator.simulation import run
from simulator.step_times import Linear, Model, fit
from simulator.validate import Row, Validation, on_log, same_records
from simulator.virtual import OpenLoop, Replica, StepTimeOf, VirtualClock, VirtualExecutor, serve

LAW = Linear((0.004, 0.0003, 0.0009, 2e-6, 5e-7))
LIMITS = Limits(max_batch_size=8, token_budget=64, num_blocks=60)


class Log(list[dict[str, Any]]):
    """An input log as it comes back from its file."""

    def write(self, record: dict[str, Any]) -> None:
        self.append(json.loads(json.dumps(record)))


def law(step: Step) -> float:
    return LAW.seconds(step.load)


def logged_run(mode: str = "dynamic", count: int = 80, stop: bool = False) -> tuple[Log, Driver]:
    """A run on an engine that keeps LAW, with arrivals that leave it idle now and then."""
    requests = list(poisson_plan(count, 12.0, Lengths(2, 90), Lengths(1, 40), deferred=0.3, seed=4).draw())
    if stop:
        for req in requests[::3]:
            req.stop = lambda req: len(req.output) == 5
    return logged(mode, requests)


def logged(mode: str, requests: list[Request], limits: Limits = LIMITS, step_time: StepTimeOf = law) -> tuple[Log, Driver]:
    """Requests on an engine that has measured itself before, as a real one does."""
    log = Log()
    replica = Replica(POLICIES[mode](), limits, step_time, lambda req: None, log=log.write)
    for probe in Model(step_time, limits, "").probes():
        replica.driver.learn(probe)
    serve([replica], OpenLoop(requests))
    return log, replica.driver


def test_the_law_of_an_engine_comes_out_of_its_input_log():
    again = make_again(logged_run()[0])
    assert fit(again.seconds).coefficients == pytest.approx(LAW.coefficients, rel=1e-6)
    assert again.limits == LIMITS


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize("stop", [False, True], ids=["by length", "some stop"])
def test_with_the_right_law_a_log_is_simulated_as_it_was(mode: str, stop: bool):
    again = make_again(logged_run(mode, stop=stop)[0])
    checked = on_log(again, POLICIES[mode], LAW)
    assert checked.good
    assert max(abs(row.error) for row in checked.rows) < 1e-6
    assert max(checked.step_errors[0][1:]) < 1e-9


@pytest.mark.parametrize("mode", POLICIES)
def test_deadlines_of_a_log_are_kept_and_missed_in_the_simulation_as_they_were(mode: str):
    """On a clock that did not begin with the first arrival, as a server's does not."""
    requests = list(poisson_plan(80, 12.0, Lengths(2, 90), Lengths(1, 40), deferred=0.3, seed=5).draw())
    for place, req in enumerate(requests):
        req.arrival += 1000.0
        req.output_len = req.max_tokens
        if place % 2:
            req.deadline = req.arrival + 0.02 * (place % 9)
            req.due = req.deadline - 0.01
    again = make_again(logged(mode, requests)[0])
    missed = [req for req in again.answered if req.error]
    assert {"deadline_exceeded", "deadline_missed"} >= {req.error.code for req in missed if req.error}
    assert len(missed) > 3
    simulated = run(POLICIES[mode], Model(law, LIMITS, ""), again.plan())
    assert sum(simulated.errors.values()) == len(missed)
    assert max(abs(row.error) for row in on_log(again, POLICIES[mode], LAW).rows) < 1e-6


def test_a_request_of_a_log_comes_again_with_all_that_a_policy_may_look_at():
    req = Request("a", [1, 2], 3, arrival=7.0, deadline=9.0, due=8.5, output_len=2, prompt_logprobs=True)
    (again,) = make_again(logged("dynamic", [req])[0]).plan().draw()
    assert (again.arrival, again.deadline, again.due, again.output_len, again.prompt_logprobs) == (0.0, 2.0, 1.5, 2, True)


def test_with_a_wrong_law_the_validation_says_how_far_apart():
    slow = Linear(tuple(1.2 * b for b in LAW.coefficients))
    checked = on_log(make_again(logged_run()[0]), POLICIES["dynamic"], slow)
    assert not checked.good
    tpot = next(row for row in checked.rows if row.name == "TPOT p50, s")
    assert tpot.error > 0.19
    assert not tpot.within
    assert checked.step_errors[0].total == pytest.approx(0.2)
    assert "APART" in checked.text()


def test_time_between_steps_counts_but_not_the_time_in_which_nobody_was_there():
    """A host that takes a millisecond to enter a result and plan again."""
    log, clock = Log(), VirtualClock()
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock, lambda req: None, log.write)
    executor = VirtualExecutor(clock, law)
    for burst in range(30):
        clock.now = 10.0 * burst
        driver.submit(Request(f"{burst}", [0] * (5 + burst), 9))
        driver.submit(Request(f"{burst} too", [0] * (50 - burst), 3 + burst % 5))
        while driver.iterate(executor) is not None:
            clock.now += 0.001
    again = make_again(log)
    late = sum(step.seconds - LAW.seconds(step.load) for step in again.seconds)
    assert late == pytest.approx(0.001 * (len(again.plans) - 30))
    records = [json.loads(text) for text in driver.steps.read(0, 10_000)[1]]
    busy = busy_steps(records)
    first = [record["running"] == len(record["new"]) for record in records[1:]]  # with nobody resident before
    expected = [LAW.seconds(step.load) + (0.0 if begins else 0.001) for step, begins in zip(busy, first, strict=True)]
    assert [step.seconds for step in busy] == pytest.approx(expected, abs=2e-6)
    assert 29 <= sum(first) < len(busy) / 3


@pytest.mark.parametrize("mode", ["static", "sequence"])
def test_the_wait_for_a_batch_to_fill_is_no_part_of_its_first_step(mode: str):
    """A request comes while another is computed, which leaves it alone in the queue for a time-out of 50 ms."""
    requests = [Request(f"{i}", [0] * 5, 4, arrival=0.5 * (i // 2) + (0.06 if i % 2 else 0.0)) for i in range(20)]
    records = [json.loads(text) for text in make_again(logged(mode, requests)[0]).steps.read(0, 10_000)[1]]
    assert any(before["queue"] for before in records)
    assert all(step.seconds == pytest.approx(LAW.seconds(step.load), abs=2e-6) for step in busy_steps(records))


def test_the_plans_made_again_have_the_servers_own_step_records_and_others_are_noticed():
    log, _ = logged_run("mixed")
    watched = make_again(log)
    assert len(watched.plans) > 50
    records = [json.loads(text) for text in watched.steps.read(0, 10_000)[1]]
    assert same_records(watched, records) == len(records) == len(watched.plans)
    records[20]["cells"] += "p"
    with pytest.raises(ValueError, match=f"step {records[20]['id']} differs"):
        same_records(watched, records)


def test_a_log_with_a_cancel_is_made_again_but_not_simulated(tmp_path: Path, capsys):
    log, clock = Log(), VirtualClock()
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock, lambda req: None, log.write)
    driver.submit(Request("a", [0] * 5, 9))
    driver.next_step()
    driver.cancel("a", RequestError("cancelled", "gone"))
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, log)))
    assert main(["validate", "--log", str(path)]) == 2
    assert "has a cancel" in capsys.readouterr().err


def test_a_log_with_a_step_that_failed_is_not_simulated_either(tmp_path: Path, capsys):
    log, clock = Log(), VirtualClock()
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock, lambda req: None, log.write)
    executor = VirtualExecutor(clock, law, failing=[4])
    for i in range(12):
        driver.submit(Request(f"{i}", [0] * 5, 9))
    while driver.iterate(executor) is not None:
        pass
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, log)))
    assert main(["validate", "--log", str(path)]) == 2
    assert "has a failed step" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "validate"])
def test_one_law_is_not_fitted_to_several_variants_of_a_model(command: str, tmp_path: Path, capsys):
    path = tmp_path / "run.jsonl"
    log, _ = logged("dynamic", [Request("a", [0] * 5, 40)], replace(LIMITS, variants=("large", "small")))
    path.write_text("\n".join(map(json.dumps, log)))
    assert main([command, "--log", str(path), "--out", str(tmp_path / "out.json")]) == 2
    told = "variants: a law is that of one variant of a model, this engine has 2 (large, small)"
    assert capsys.readouterr().err == f"simulator: {path}: {told}\n"


@pytest.mark.parametrize(
    ("factors", "poor"),
    [((0.8, 1.0, 1.2), False), ((0.55, 1.65), True), ((1.0,) * 30 + (10.0,), True)],
    ids=["a little noise", "some three times as long as others", "here and there ten times as long"],
)
def test_calibrate_says_when_the_law_is_poor(factors: tuple[float, ...], poor: bool, tmp_path: Path, capsys):
    rng = random.Random(1)
    requests = list(poisson_plan(80, 12.0, Lengths(2, 90), Lengths(1, 40)).draw())
    log, _ = logged("dynamic", requests, step_time=lambda step: law(step) * rng.choice(factors))
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, log)))
    assert main(["calibrate", "--log", str(path), "--out", str(tmp_path / "model.json")]) == 0
    told = "the law is poor: it should be within 10% in all, and half of the steps within 30%\n"
    assert capsys.readouterr().err == (told if poor else "")


def test_a_figure_within_the_bound_only_because_the_machine_is_uneven_is_not_called_ok():
    def row(*real: float) -> Row:
        return Row("TPOT p50, s", real, 1.1, 0.05)

    assert (row(1.09, 1.11).verdict, row(1.09, 1.11).bound) == ("ok", 0.05)
    assert (row(0.95, 1.05).verdict, row(0.95, 1.05).bound) == ("ok", pytest.approx(0.15)), "10% apart"
    assert row(0.85, 1.15).verdict == "too uneven"
    assert row(0.95, 1.25).verdict == "ok", "30% apart, and met without it"
    assert row(0.99, 1.01).verdict == "APART"
    shown = Validation((row(0.85, 1.15),), (), ()).text()
    assert "bound" in shown
    assert "45.0%  too uneven" in shown


def test_a_run_in_which_nobody_was_served_cannot_be_compared():
    log, clock = Log(), VirtualClock()
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock, lambda req: None, log.write)
    driver.submit(Request("a", [0] * 5000, 9))
    with pytest.raises(LogError, match="nothing to compare"):
        on_log(make_again(log), POLICIES["dynamic"], LAW)


def test_a_log_whose_last_line_was_cut_off_is_read_and_one_with_a_bad_line_is_not(tmp_path: Path):
    lines = [json.dumps(record) for record in logged_run(count=5)[0]]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines)[:-9])
    assert len(read_log(path)) == len(lines) - 1
    path.write_bytes(("\ufeff" + "\r\n".join([*lines, '{"a": "one\u2028two"}', ""])).encode())
    assert len(read_log(path)) == len(lines) + 1
    path.write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(LogError, match="line 2: is not JSON"):
        read_log(path)
    with pytest.raises(LogError, match="No such file"):
        read_log(tmp_path / "none")
    with pytest.raises(LogError, match="is no input log"):
        make_again([{"kind": "submit"}])
    path.write_text("\n".join([lines[0], "5"]))
    with pytest.raises(LogError, match="is no input log"):
        make_again(read_log(path))


@pytest.mark.parametrize(
    ("schema", "told"),
    [(None, "it: an input log without a schema version"), (LOG_SCHEMA + 1, "newer than version"), ("one", "schema must be")],
)
def test_a_log_of_another_version_is_one_line(schema: object, told: str):
    first, *others = logged_run(count=3)[0]
    assert first["schema"] == LOG_SCHEMA
    first = {key: value for key, value in (first | {"schema": schema}).items() if value is not None}
    with pytest.raises(LogError, match=told) as raised:
        make_again([first, *others], "it")
    assert "\n" not in str(raised.value)
