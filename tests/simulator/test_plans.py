"""Where the simulator's requests come from: the client's file, as the client wrote it, and what is drawn here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batching.policies.dynamic import Dynamic
from batching.policy import Limits
from batching.request import Priority
from client.shared.plan import PlanError
from simulator.plans import Lengths, Words, poisson_plan, read_plan
from simulator.results import Results
from simulator.simulation import run
from simulator.step_times import Linear, Model
from simulator.virtual import OpenLoop, Replica, serve

CLIENT = Path(__file__).parents[2] / "client" / "client.py"
SECOND_A_STEP = Model(Linear((1.0, 0.0, 0.0, 0.0, 0.0)), Limits(max_batch_size=2), "a second a step")


def client_plan(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, str(CLIENT), "--plan-only", "--report", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder / "plan.json"


def test_a_plan_that_the_client_wrote_is_read_as_it_is(tmp_path: Path):
    path = client_plan(
        tmp_path, "--arrivals", "high", "--numsamples", "40", "--deferred", "0.25",
        "--prompt-lengths", "uniform:low=5,high=90", "--output-lengths", "uniform:low=2,high=30",
    )  # fmt: skip
    written = json.loads(path.read_text(encoding="utf-8"))
    plan = read_plan(path)
    requests = list(plan.draw())
    assert plan.users is None
    assert plan.made == written["made"]
    found = [(req.arrival, len(req.tokens), req.max_tokens, req.priority.value) for req in requests]
    entries = sorted(written["requests"], key=lambda entry: entry["at_s"])
    assert found == [(e["at_s"], e["prompt_tokens"], e["num_tokens"], e["priority"]) for e in entries]
    assert [len(Words()(e["prompt"])) for e in entries] == [e["prompt_tokens"] for e in entries]
    assert {req.priority for req in requests} == set(Priority)


def test_each_user_of_a_closed_loop_sends_its_next_request_when_the_one_before_is_answered(tmp_path: Path):
    path = client_plan(tmp_path, "--users", "2", "--numsamples", "6", "--numtokens_range", "3")
    results = run(Dynamic, SECOND_A_STEP, read_plan(path)).columns
    assert sorted(results.arrival) == [0, 0, 3, 3, 6, 6]
    assert sorted(results.answered) == [3, 3, 6, 6, 9, 9]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"at_s": -1}, "at_s must be a number of seconds from 0 on, not '-1'"),
        ({"at_s": True}, "at_s must be"),
        ({"prompt": ""}, "prompt must be a text"),
        ({"num_tokens": 0}, "num_tokens must be a whole number from 1 to 1000000"),
        ({"priority": "urgent"}, "priority must be immediate or deferred, not 'urgent'"),
        ({"prompt_tokens": 1.5}, "prompt_tokens must be null or a whole number"),
    ],
)
def test_a_plan_that_will_not_do_is_named_with_request_and_field(tmp_path: Path, change: dict, told: str):
    good = {"at_s": 0.0, "prompt": "The end", "num_tokens": 5, "priority": "immediate", "prompt_tokens": None}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"plan": 1, "users": None, "requests": [good, good | change]}))
    with pytest.raises(PlanError, match="request 2: ") as raised:
        read_plan(path)
    assert told in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "is no plan"),
        ('{"plan": 1, "requests": []}', "is no plan"),
        ('{"plan": 2, "requests": [{}]}', '"plan": 1'),
        ('{"plan": 1, "requests": [{}], "users": 0}', "users must be null or a whole number of at least 1, not 0"),
        ('{"plan": 1, "requests": [7]}', "request 1: must be an object, not int"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_a_line(tmp_path: Path, text: str, told: str):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as raised:
        read_plan(path)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_seed_draws_one_plan_within_its_bounds_at_its_rate():
    plan = poisson_plan(4000, 50.0, Lengths(3, 9), Lengths.read("7"), deferred=0.3, seed=5)
    requests, again = list(plan.draw()), list(plan.draw())
    assert [(r.arrival, r.tokens, r.max_tokens, r.priority) for r in requests] == [
        (r.arrival, r.tokens, r.max_tokens, r.priority) for r in again
    ]
    assert {len(req.tokens) for req in requests} == set(range(3, 10))
    assert {req.max_tokens for req in requests} == {7}
    assert requests[-1].arrival == pytest.approx(4000 / 50, rel=0.1)
    assert sum(req.priority is Priority.DEFERRED for req in requests) == pytest.approx(1200, abs=120)
    firsts = [req.tokens[0] for req in requests]
    assert len(set(firsts)) == len(firsts), "no two prompts share a prefix"


@pytest.mark.parametrize("text", ["0", "9-3", "-4", "many", "3-", "1e3", ""])
def test_lengths_that_will_not_do_are_refused(text: str):
    with pytest.raises(ValueError, match="such as 64, or a range"):
        Lengths.read(text)


def test_requests_are_drawn_only_as_they_come_and_let_go_when_they_are_answered():
    drawn = []

    def draw():
        for req in poisson_plan(500, 0.5, Lengths(4, 4), Lengths(2, 2)).draw():
            drawn.append(req.id)
            yield req

    results, most = Results(), 0

    def answered(req) -> None:
        nonlocal most
        results.add(req)
        most = max(most, len(drawn) - len(results.columns().index))

    serve([Replica(Dynamic(), Limits(), lambda step: 0.1, answered)], OpenLoop(draw()))
    assert len(drawn) == 500
    assert most < 10
