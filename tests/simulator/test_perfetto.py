"""The trace of a run: its format, and what stands on its tracks, counted by hand."""

from pathlib import Path

import pytest

from batching.policies import POLICIES
from batching.policies.static import Static, StaticParams
from batching.policy import Limits
from batching.request import Priority, Request
from client.shared.perfetto import write_trace
from simulator.__main__ import main
from simulator.plans import Plan
from simulator.results import traced
from simulator.simulation import run
from simulator.step_times import Linear, Model
from tests.trace_format import read_trace, slices, tracks

LIMITS = Limits(max_batch_size=2)
A_SECOND = Model(Linear((1.0, 0.0, 0.0, 0.0, 0.0)), LIMITS, "a second a step")


def plan_of(*outputs: int) -> Plan:
    return Plan(len(outputs), lambda: (Request(str(i), [i], n, Priority.IMMEDIATE) for i, n in enumerate(outputs)))


def test_slots_are_tracks_with_the_request_around_what_each_step_gave_it(tmp_path: Path):
    ran = run(lambda: Static(StaticParams(batch_timeout_ms=0)), A_SECOND, plan_of(3, 1, 2), watched=True)
    write_trace(tmp_path / "trace.json", [traced(ran)], "by hand")
    events = read_trace(tmp_path / "trace.json")
    assert sorted(tracks(events).values()) == ["slot 0", "slot 1", "steps"]
    # The first batch takes three seconds; its second row has its only token after one, and keeps its slot for two more.
    assert slices(events, "slot 0") == [
        ("request 1", 0, 3), ("prefill", 0, 1), ("decode", 1, 3),
        ("request 3", 3, 5), ("prefill", 3, 4), ("decode", 4, 5),
    ]  # fmt: skip
    assert slices(events, "slot 1") == [("request 2", 0, 3), ("prefill", 0, 1), ("wasted", 1, 3)]
    assert [end for _, _, end in slices(events, "steps")] == [1, 2, 3, 4, 5]
    sizes = [event["args"]["rows"] for event in events if event["name"] == "batch size"]
    assert sizes == [2, 2, 2, 1, 1, 0]
    requests = [(e["ph"], e["ts"] / 1e6) for e in events if e.get("id") == "1-2"]
    assert requests == [("b", 0), ("b", 0), ("e", 4), ("b", 4), ("e", 5), ("e", 5)], "first token after 4 s, answer after 5"


@pytest.mark.parametrize("mode", POLICIES)
def test_every_mode_gives_a_trace_that_keeps_the_format(mode: str, tmp_path: Path):
    trace = tmp_path / "trace.json"
    arguments = f"run --policy {mode} --requests 40 --rate 200 --prompt 8-300 --output 2-30 --deferred 0.4 --model T4:gpt2"
    limits = ["--limit", "max_batch_size=4", *(["--limit", "lanes=2"] if mode == "flover" else [])]
    assert main([*arguments.split(), *limits, "--perfetto", str(trace)]) == 0
    events = read_trace(trace)
    assert sum(e["ph"] == "b" and e["name"].endswith("request") for e in events) == 40
    assert {"steps", "slot 0" if mode == "nobatch" else "slot 3"} <= set(tracks(events).values())
    assert ("steps, lane 2" in tracks(events).values()) == (mode == "flover")


def test_who_is_preempted_is_marked_in_its_slot(tmp_path: Path):
    trace = tmp_path / "trace.json"
    arguments = "run --policy dynamic --requests 12 --rate inf --prompt 60 --output 100 --model T4:gpt2 --limit num_blocks=30"
    assert main([*arguments.split(), "--perfetto", str(trace)]) == 0
    events = read_trace(trace)
    assert any(e["ph"] == "i" and e["name"] == "preempted" for e in events)
    assert any(e["ph"] == "X" and e["name"] == "computed again" for e in events)


def test_of_several_engines_it_has_the_requests_and_says_so(tmp_path: Path, capsys):
    trace = tmp_path / "trace.json"
    arguments = "run --policy dynamic --requests 12 --rate 100 --model T4:gpt2 --replicas 2"
    assert main([*arguments.split(), "--perfetto", str(trace)]) == 0
    assert {e["ph"] for e in read_trace(trace)} == {"M", "b", "e"}
    assert "requests only" in capsys.readouterr().err
