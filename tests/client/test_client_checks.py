"""A run that is not what its label says: another client switched the mode, or two servers stand behind the address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.answers import Answer, ModeRun
from client.checks import doubts, label
from client.main import main
from client.shared.plan import PlannedRequest
from tests.client.client_stub import Stub


def answers(*modes: str, instances: str = "") -> list[Answer]:
    requests = (PlannedRequest(i, 0.0, "Once", 3, "immediate", i) for i in range(len(modes)))
    return [
        Answer(request, 0.0, 1.0, tokens=3, mode=mode, instance=instances[i : i + 1])
        for i, (request, mode) in enumerate(zip(requests, modes, strict=True))
    ]


def stats(mode: str = "static", **more: Any) -> dict[str, Any]:
    return {
        "mode": mode,
        "params": {"batch_timeout_ms": 50},
        "policy_changes": 3,
        "requests_finished": 0,
        "instance": "a",
    } | more


def run(given: list[Answer], **changes: Any) -> ModeRun:
    usual = {"params": {"batch_timeout_ms": 50}, "before": stats(), "stats": stats(requests_finished=len(given))}
    return ModeRun("static", given, **usual | changes)


def test_a_run_that_is_what_was_asked_for_has_no_doubts() -> None:
    assert doubts(run(answers("static", "static"))) == []
    assert label(run(answers("static"))) == "static"


def test_a_server_that_tells_nothing_of_itself_is_not_doubted() -> None:
    assert doubts(ModeRun("static", answers("", ""))) == []
    lost = Answer(PlannedRequest(0, 0.0, "Once", 3, "immediate", 0), 0.0, 1.0, error="503")
    assert doubts(run([lost], stats=stats())) == []


def test_answers_in_other_modes_are_counted_by_mode() -> None:
    found = run(answers(*["static"] * 7, *["dynamic"] * 20, *["mixed"] * 5))
    assert doubts(found) == ["25 of 32 requests were answered in another mode (20 in dynamic, 5 in mixed)"]
    assert label(found) == "static !"


def test_the_mode_that_stats_tell_before_and_after_the_run_counts_too() -> None:
    found = run(answers("static"), before=stats("orca"), stats=stats("mixed", requests_finished=1))
    assert doubts(found) == ["before the run the server was in mode orca", "after the run the server was in mode mixed"]


def test_other_parameters_than_those_asked_for_are_named() -> None:
    found = run(answers("static"), stats=stats(params={"batch_timeout_ms": 1000}, requests_finished=1))
    (told,) = doubts(found)
    assert told == "after the run the mode's parameters were not those asked for: batch_timeout_ms 1000 instead of 50"


def test_a_switch_there_and_back_is_noticed() -> None:
    assert doubts(run(answers("static"), stats=stats(policy_changes=5, requests_finished=1))) == [
        "the policy was changed 2 times during the run"
    ]


def test_two_servers_behind_one_address_are_named() -> None:
    found = run(answers("static", "static", "static", instances="aba"), instances=["a"], stats=stats(requests_finished=2))
    (told,) = doubts(found)
    assert told.startswith("2 servers answered, or one that was started anew: a (2 of the requests), b (1 of the requests)")
    assert told.endswith("the server's figures are a's alone")


def test_a_server_that_answered_only_the_calls_around_the_run_is_named() -> None:
    (told,) = doubts(run(answers("static", instances="a"), instances=["a", "b"]))
    assert "a (1 of the requests), b (0 of the requests)" in told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (0, 9, "are of 9 requests, 7 of which are not this run's"),
        (5, 7, "are of 7 requests, 5 of which are not this run's"),
        (0, 1, "somebody reset the statistics during the run"),
    ],
)
def test_the_servers_figures_of_more_or_fewer_requests_are_doubted(before: int, after: int, told: str) -> None:
    given = answers("static", "static")
    (found,) = doubts(run(given, before=stats(requests_finished=before), stats=stats(requests_finished=after)))
    assert told in found


# ---- against a server


def go(stub: Stub, out: Path, *flags: str) -> None:
    line = ["--url", stub.url, "--out", str(out), "--numsamples", "8", "--wait", "0.002", "--numtokens_range", "3"]
    assert main([*line, *flags]) == 0


def saved(folder: Path) -> list[dict[str, Any]]:
    modes: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["modes"]
    return modes


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_switch_by_somebody_else_marks_table_page_and_results(stub: Stub, tmp_path: Path, capsys: Any, stream: str) -> None:
    def switch(count: int) -> None:
        if stub.mode == "static" and count == 3:
            stub.mode = "dynamic"

    stub.on_request = switch
    go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path), stream)
    out = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    static, mixed = saved(tmp_path)
    others = static["answered_modes"]["dynamic"]
    said = f"{others} of 8 requests were answered in another mode ({others} in dynamic)"
    assert others >= 1
    assert static["doubts"] == [said]
    assert mixed["doubts"] == []
    assert f"warning: static: {said}" in out
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith(("static ", "mixed "))]
    assert rows[:2] == [["static", "!"], ["mixed", "8"]]
    assert "<h1>Do not compare: the figures of static are not what the name says</h1>" in page
    assert f"<p class=warning>static: {said}</p>" in page
    assert page.count("<td class=apart>static !</td>") == 2, "in both tables of figures"

    again = tmp_path / "again"
    assert main(["--results", str(tmp_path / "results.json"), "--report", str(again)]) == 0
    assert saved(again)[0]["doubts"] == [said], "it is still known when the results are shown again"


def test_two_servers_behind_one_address_mark_every_mode(stub: Stub, tmp_path: Path, capsys: Any) -> None:
    stub.instances = ["one", "two"]
    go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path))
    assert capsys.readouterr().out.count("2 servers answered, or one that was started anew: ") == 2
    for mode in saved(tmp_path):
        assert mode["instances"] == ["one", "two"]
        assert {answer["answered_by"] for answer in mode["answers"]} == {"one", "two"}


def test_two_servers_whose_step_records_overlap_do_not_hold_the_client_up(stub: Stub, tmp_path: Path) -> None:
    stub.instances = ["one", "two"]
    cells = {"end": 100.0, "ms": 1.0, "cells": "d", "new": [], "gone": [], "queue": 0, "running": 1}
    stub.steps = [cells | {"id": 5}]
    stub.first_again = True
    go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path))
    assert [mode["steps"] for mode in saved(tmp_path)] == [None, None]
    assert "no step records (GET /steps) of a single server" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_as_asked_for_is_marked_nowhere(stub: Stub, tmp_path: Path, capsys: Any) -> None:
    go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path))
    assert " !" not in capsys.readouterr().out
    assert "Do not compare" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [mode["doubts"] for mode in saved(tmp_path)] == [[], []]


def test_of_several_arrivals_the_page_says_it_at_its_top(stub: Stub, tmp_path: Path) -> None:
    stub.instances = ["one", "two"]
    line = ["--url", stub.url, "--numsamples", "4", "--arrivals", "low", "high", "--duration", "0.1", "--modes", "static"]
    assert main([*line, "--report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Do not compare: the figures of static are not what the name says</h1>" in page
    assert page.count("<td class=apart>static !</td>") == 2 * 2
