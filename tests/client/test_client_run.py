"""The whole client against a stub server: what is sent, written and said, also when things go wrong."""

from __future__ import annotations

import csv
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.answers import Answer, ModeRun
from client.main import main
from client.shared.plan import PlannedRequest
from client.tables import table
from tests.client.client_stub import MODES, Stub
from tests.trace_format import read_trace, slices, tracks


def go(stub: Stub, out: Path, *flags: str) -> int:
    return main(["--url", stub.url, "--out", str(out), "--numsamples", "8", "--wait", "0.002", *flags])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_mode_gets_the_same_requests(stub: Stub, tmp_path: Path) -> None:
    assert go(stub, tmp_path, "--modes", ",".join(MODES), "--deferred", "0.25") == 0
    sent = [sorted(stub.bodies[mode], key=lambda body: body["seed"]) for mode in MODES]
    assert len(sent[0]) == 8
    assert all(bodies == sent[0] for bodies in sent)
    assert sum(body["priority"] == "deferred" for body in sent[0]) == 2


def test_each_mode_is_switched_to_reset_fired_and_read_in_turn(stub: Stub, tmp_path: Path) -> None:
    go(stub, tmp_path, "--modes", "static,mixed", "--numsamples", "1")
    one_mode = ["PUT /mode", "POST /stats/reset", "GET /stats", "POST /inference", "GET /stats"]
    assert stub.calls == ["GET /mode", *one_mode, *one_mode]


def test_without_modes_it_runs_once_in_the_mode_the_server_is_in(stub: Stub, tmp_path: Path) -> None:
    assert go(stub, tmp_path) == 0
    assert list(stub.bodies) == ["dynamic"]
    assert "PUT /mode" not in stub.calls


def test_table_csv_and_plot_are_written(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert go(stub, out, "--modes", "nobatch,mixed", "--deferred", "0.5") == 0
    shown = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in shown.out.splitlines() if line}
    assert lines["nobatch"][1:3] == ["8", "0"]
    assert lines["mixed"][-6:] == ["0.021", "0.043", "3.25", "12.5", "%", "7"]
    assert lines["immediate"][1:3] == lines["deferred"][1:3] == ["4", "0"]
    assert lines["deferred"][-2:] == ["-", "-"]
    assert "model demo" in shown.out
    assert "nobatch" in shown.err, "the progress bar goes to stderr"
    written = rows(out)
    assert [(row["mode"], int(row["request"])) for row in written] == [(m, i) for m in ("nobatch", "mixed") for i in range(8)]
    assert {row["status"] for row in written} == {"ok"}
    assert all(float(row["latency_s"]) > 0 for row in written)
    assert all(row["output_tokens"] == row["requested_tokens"] for row in written)
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_throughput_is_per_wall_clock_second_from_the_first_planned_send() -> None:
    first, second = (PlannedRequest(i, 0.0, "Once", 10, "immediate", i) for i in range(2))
    run = ModeRun("static", [Answer(first, 0.0, 4.0, tokens=10), Answer(second, 0.0, 5.0, tokens=10)])
    row = next(line.split() for line in table([run], {}).splitlines() if line.startswith("static"))
    assert row == ["static", "2", "0", "5.00", "4.0", "0.40", "4.50", "4.50", "4.99", *["-"] * 5]


def test_failed_requests_are_counted_by_kind_and_the_rest_is_kept(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.refuse = {2: 429, 3: 429, 5: 504}
    stub.drop = {7}
    assert go(stub, tmp_path) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("dynamic"))
    assert line.split()[1:3] == ["4", "4"]
    assert line.endswith("2 x 429, 1 x 504, 1 x connection lost") or "1 x connection lost, 1 x 504" in line
    assert "429: the queue is full" in shown
    statuses = sorted(row["status"] for row in rows(tmp_path))
    assert statuses == ["429", "429", "504", "connection lost", *["ok"] * 4]


def test_a_run_in_which_every_request_fails_still_writes_everything_and_exits_1(stub: Stub, tmp_path: Path) -> None:
    stub.refuse = dict.fromkeys(range(1, 9), 503)
    stub.stats = {}
    assert go(stub, tmp_path) == 1
    assert {row["status"] for row in rows(tmp_path)} == {"503"}
    assert (tmp_path / "latency.png").exists()


def test_no_server_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for flags in (["--out", str(tmp_path / "none")], ["--prompt", "Once", "--numtokens", "3"]):
        assert main(["--url", f"http://127.0.0.1:{port}", *flags]) == 1
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert f"no server answers at http://127.0.0.1:{port}" in shown
    assert not (tmp_path / "none").exists()


def test_a_missing_key_is_one_line_that_says_where_to_set_it(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.api_key = "secret"
    assert go(stub, tmp_path) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "set API_KEY in client/.env" in shown


def test_the_key_is_sent_as_a_bearer_token(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.api_key = "secret"
    monkeypatch.setenv("API_KEY", "secret")
    assert go(stub, tmp_path) == 0
    assert {row["status"] for row in rows(tmp_path)} == {"ok"}


def test_an_unknown_mode_ends_in_the_servers_words_before_anything_is_fired(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(stub, tmp_path, "--modes", "static,turbo") == 1
    assert "no mode turbo; there are nobatch" in capsys.readouterr().err
    assert stub.bodies == {}


def test_a_key_that_may_not_reset_stats_still_measures_the_current_mode(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reset_status = 403
    assert go(stub, tmp_path) == 0
    assert "may not reset /stats" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "told"), [(None, "without a schema version"), (2, "newer than version 1")])
def test_step_records_of_another_version_are_left_out_with_a_note(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int | None, told: str
) -> None:
    stub.steps, stub.steps_schema = [step(1, "p", new=[[0, 1, "i", "a"]])], version
    assert go(stub, tmp_path, "--report", str(tmp_path)) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "measured without the server's step records" in note
    assert told in note
    assert results(tmp_path)["modes"][0]["steps"] is None


def test_a_trace_has_a_process_a_mode_with_its_steps_slots_and_requests(stub: Stub, tmp_path: Path) -> None:
    left = step(3, "d", new=[[0, 3, "i", "c"]], gone=[[0, "p"], [1, "f"]])
    stub.steps = quick([step(1, "pp", new=[[0, 1, "i", "a"], [1, 2, "d", "b"]]), step(2, "dx"), left])
    flags = ["--modes", "static,mixed", "--perfetto", str(tmp_path / "trace.json"), "--stream"]
    assert go(stub, tmp_path, *flags) == 0
    events = read_trace(tmp_path / "trace.json")
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["static", "mixed"]
    assert list(tracks(events).values()) == ["steps", "slot 0", "slot 1"]
    shown = [name for name, _, _ in slices(events, "slot 0")]
    assert shown == ["request 1", "prefill", "decode", "request 3", "decode"]
    assert [name for name, _, _ in slices(events, "slot 1")] == ["request 2", "prefill", "wasted"]
    assert any(e["ph"] == "i" and e["name"] == "preempted" for e in events)
    for pid in (1, 2):
        assert sum(e["ph"] == "b" and e["pid"] == pid and e["name"] == "immediate request" for e in events) == 8


def test_a_trace_can_be_made_of_results_that_were_written(stub: Stub, tmp_path: Path, capsys) -> None:
    stub.steps = quick([step(1, "pp", new=[[0, 1, "i", "a"], [1, 2, "d", "b"]]), step(2, "dx")])
    assert go(stub, tmp_path, "--report", str(tmp_path), "--perfetto", str(tmp_path / "first.json")) == 0
    assert main(["--results", str(tmp_path / "results.json"), "--perfetto", str(tmp_path / "again.json")]) == 0
    first, again = read_trace(tmp_path / "first.json"), read_trace(tmp_path / "again.json")
    assert slices(again, "slot 1") == slices(first, "slot 1")
    assert len(again) == len(first)
    assert main(["--results", str(tmp_path / "results.json"), "--perfetto", str(tmp_path / "no" / "trace.json")]) == 1
    assert "--perfetto" in capsys.readouterr().err


def test_a_server_that_dies_half_way_is_one_line_and_what_came_is_kept(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.die_at = 5
    assert go(stub, tmp_path, "--modes", "static,dynamic", "--wait", "0.04") == 1
    shown = capsys.readouterr()
    assert "went away in mode static, after 4 of 8 answers" in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err
    assert [row["status"] for row in rows(tmp_path)].count("ok") == 4
    assert (tmp_path / "latency.png").exists()


def test_ctrl_c_keeps_what_came(stub: Stub, tmp_path: Path) -> None:
    """The program itself: in here the interrupt could fall into a callback of the tests' own libraries, and be lost there."""
    script = Path(__file__).parents[2] / "client" / "client.py"
    flags = ["--url", stub.url, "--out", tmp_path, "--numsamples", "200", "--wait", "0.1"]
    with subprocess.Popen(
        [sys.executable, script, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        stub.on_request = lambda count: run.send_signal(signal.SIGINT) if count == 4 else None
        _, shown = run.communicate(timeout=60)
    assert run.returncode == 1
    assert shown.splitlines()[-1] == "client: stopped by Ctrl-C; what came is kept"
    assert 1 <= len(rows(tmp_path)) < 200


def test_a_reader_who_stops_reading_the_tables_costs_no_results(stub: Stub, tmp_path: Path) -> None:
    """As `| head` does, at the first byte."""
    script = Path(__file__).parents[2] / "client" / "client.py"
    flags = ["--url", stub.url, "--report", tmp_path, "--numsamples", "4", "--wait", "0", "--no-stream"]
    with subprocess.Popen([sys.executable, script, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        shown = run.stderr.read()
    assert run.returncode == 0
    assert "Error" not in shown
    assert (tmp_path / "report.html").exists()
    assert len(rows(tmp_path)) == 4


def test_results_that_cannot_be_written_are_still_shown(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.csv").mkdir()
    assert go(stub, tmp_path) == 1
    shown = capsys.readouterr()
    assert "output" in shown.out
    assert "cannot write the results" in shown.err


def test_a_folder_that_cannot_be_made_is_one_line_before_anything_is_fired(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert go(stub, tmp_path / "file") == 1
    assert "--out" in capsys.readouterr().err
    assert stub.bodies == {}


def test_a_single_prompt_prints_its_completion_and_its_times(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", stub.url, "--prompt", "Once upon a time", "--numtokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Once upon a time was quiet.\n")
    assert "3 tokens in mode dynamic" in shown
    assert "server TTFT 0.010 s" in shown
    assert stub.bodies["dynamic"] == [{"prompt": "Once upon a time", "num_tokens": 3, "priority": "immediate", "seed": 0}]


def test_a_refused_single_prompt_says_why(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.refuse = {1: 429}
    assert main(["--url", stub.url, "--prompt", "Once", "--numtokens", "3"]) == 1
    assert "429: the queue is full" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["", "client"])
def test_it_runs_as_a_script_from_the_repository_root_and_from_its_own_folder(stub: Stub, folder: str) -> None:
    root = Path(__file__).parents[2]
    script = Path("client.py") if folder else Path("client", "client.py")
    flags = ["--url", stub.url, "--prompt", "Once", "--numtokens", "3"]
    done = subprocess.run([sys.executable, script, *flags], cwd=root / folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Once was quiet.")


def results(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return value


def test_streamed_answers_have_the_times_that_their_pieces_came_at(stub: Stub, tmp_path: Path) -> None:
    stub.seconds_a_token = 0.01
    flags = ["--numtokens_range", "5", "--prompt-lengths", "fixed:tokens=9", "--modes", "dynamic"]
    assert go(stub, tmp_path, *flags, "--report", str(tmp_path)) == 0
    body = stub.bodies["dynamic"][0]
    assert body.keys() >= {"model", "prompt", "seed", "priority", "stream_options"}
    assert (body["stream"], body["max_tokens"], body["ignore_eos"], body["temperature"], body["top_k"]) == (
        True,
        5,
        True,
        0.6,
        40,
    )
    for answer in results(tmp_path)["modes"][0]["answers"]:
        times = answer["piece_times_s"]
        assert (len(times), answer["output_tokens"], answer["prompt_tokens"]) == (5, 5, 9)
        assert answer["planned_s"] + 0.01 < times[0] < times[-1] <= answer["answered_s"]
        assert answer["tpot_s"] == pytest.approx((times[-1] - times[0]) / 4, abs=1e-5)
        assert answer["completion"] == " quiet" * 5


def test_a_stream_that_breaks_off_is_an_error_of_that_request_alone(stub: Stub, tmp_path: Path) -> None:
    stub.break_stream_at = 3
    assert go(stub, tmp_path, "--stream", "--numtokens_range", "4") == 0
    assert sorted(row["status"] for row in rows(tmp_path)) == ["connection lost", *["ok"] * 7]


def test_a_server_that_cannot_stream_is_one_line_before_anything_is_fired(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.models = []
    assert go(stub, tmp_path, "--stream") == 1
    assert "try --no-stream" in capsys.readouterr().err
    assert stub.bodies == {}


def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does(stub: Stub, tmp_path: Path) -> None:
    stub.seconds_a_token = 0.02
    flags = ["--url", stub.url, "--out", str(tmp_path), "--numsamples", "8", "--numtokens_range", "5"]
    assert main([*flags, "--arrivals", "at-once"]) == 0
    assert stub.most_at_once == 8
    stub.most_at_once = 0
    assert main([*flags, "--users", "3"]) == 0
    assert stub.most_at_once == 3
    sent = sorted(rows(tmp_path), key=lambda row: float(row["planned_s"]))
    assert [int(row["request"]) for row in sent] == list(range(8))
    assert float(sent[0]["planned_s"]) >= 0
    assert float(sent[3]["planned_s"]) > 0.1, "a user's request is due when the one before was answered"


def test_a_plan_is_sent_unchanged_in_every_mode(stub: Stub, tmp_path: Path) -> None:
    made = ["--arrivals", "high", "--duration", "0.2", "--numsamples", "12", "--deferred", "0.5", "--numtokens_range", "2", "7"]
    assert main([*made, "--plan-only", "--out", str(tmp_path)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    wanted = sorted((r["seed"], r["prompt"], r["num_tokens"], r["priority"]) for r in plan["requests"])
    flags = [
        "--url",
        stub.url,
        "--plan",
        str(tmp_path / "plan.json"),
        "--out",
        str(tmp_path / "run"),
        "--modes",
        "static,mixed",
    ]
    assert main(flags) == 0
    for mode in ("static", "mixed"):
        assert sorted((b["seed"], b["prompt"], b["num_tokens"], b["priority"]) for b in stub.bodies[mode]) == wanted
    assert json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["requests"] == plan["requests"]


def step(id: int, cells: str, **more: Any) -> dict[str, Any]:
    record = {"id": id, "end": 100 + id / 10, "ms": 100.0, "mode": "static", "cells": cells, "new": [], "gone": []}
    return record | {"queue": 2, "running": 1, "kv": 0.5, "computed": 1, "tokens": 1, "padding": 0, "why": []} | more


def quick(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a millisecond each, so that the stub's run is longer than they are."""
    return [record | {"end": 100 + record["id"] / 1e3, "ms": 1.0} for record in steps]


def test_a_report_is_one_page_without_network_or_script_with_every_picture_in_it(stub: Stub, tmp_path: Path) -> None:
    stub.steps = [step(1, "pp", new=[[0, 1, "i", "a"], [1, 2, "d", "b"]]), step(2, "dd"), step(3, "dx")]
    flags = ["--modes", "static,mixed", "--deferred", "0.5", "--goodput", "ttft:5", "tpot:1", "--report", str(tmp_path)]
    assert go(stub, tmp_path, *flags) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * 6, "light and dark"
    assert not re.search(r"<script|<link|https?://(?!127\.0\.0\.1)", page)
    for name in ("throughput", "slots", "queue", "cdf", "latency", "plan"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("results.csv", "results.json", "plan.json"):
        assert (tmp_path / name).exists()
    found = results(tmp_path)["modes"][0]
    assert found["slots"] == 4
    assert [record["id"] for record in found["steps"]] == [1, 2, 3]
    assert found["groups"]["all"]["goodput"] == pytest.approx(found["groups"]["all"]["request_throughput"])
    assert found["groups"].keys() == {"all", "immediate", "deferred"}


def test_results_that_were_written_are_shown_again_without_a_server(stub: Stub, tmp_path: Path, capsys) -> None:
    stub.steps = [step(1, "pp", new=[[0, 1, "i", "a"], [1, 2, "d", "b"]]), step(2, "dd"), step(3, "dx")]
    first, again = tmp_path / "first", tmp_path / "again"
    assert go(stub, tmp_path, "--modes", "static,mixed", "--deferred", "0.5", "--report", str(first)) == 0
    stub.stop()
    assert main(["--results", str(first / "results.json"), "--report", str(again)]) == 0

    def about(answer: dict[str, Any]) -> dict[str, Any]:
        """TPOT and latency are made of times that were rounded when they were written."""
        return {key: pytest.approx(value, abs=5e-6) if isinstance(value, float) else value for key, value in answer.items()}

    for one, other in zip(results(first)["modes"], results(again)["modes"], strict=True):
        assert other["answers"] == [about(answer) for answer in one["answers"]]
        assert other["steps"] == one["steps"]
        assert other["groups"]["all"]["errors"] == one["groups"]["all"]["errors"] == {}
    assert (again / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2 * 6, "light and dark"


def as_the_simulator_writes_them(out: Path, **changes: Any) -> Path:
    """The results of a run, without what only a server and a network give."""
    found = results(out)
    for mode in found["modes"]:
        mode |= changes
        for answer in mode["answers"]:
            answer["prompt"] = ""
    (out / "simulated.json").write_text(json.dumps(found))
    return out / "simulated.json"


def test_the_page_of_a_simulated_run_says_nothing_of_a_server(stub: Stub, tmp_path: Path, capsys) -> None:
    stub.steps = [step(1, "p", new=[[0, 1, "i", "a"]]), step(2, "d")]
    assert go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path)) == 0
    path = as_the_simulator_writes_them(tmp_path)
    capsys.readouterr()
    assert main(["--results", str(path), "--report", str(tmp_path / "page"), "--goodput", "ttft:5"]) == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for text in (page, capsys.readouterr().out):
        assert "virtual" in text
        assert not re.search(r"server's|: sent |planned send|seen from here|not recorded", text)
    assert results(tmp_path / "page")["modes"][0]["beside_the_server"] == []


def test_requests_that_the_simulator_refused_are_counted(stub: Stub, tmp_path: Path, capsys) -> None:
    assert go(stub, tmp_path, "--report", str(tmp_path)) == 0
    path = as_the_simulator_writes_them(tmp_path, groups={"all": {"errors": {"queue_full": 5}}})
    capsys.readouterr()
    assert main(["--results", str(path), "--report", str(tmp_path / "page")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dynamic"))
    assert line.split()[1:3] == ["8", "5"]
    assert line.endswith("5 x queue_full")


def test_the_page_of_several_simulated_engines_says_why_it_has_no_timeline(stub: Stub, tmp_path: Path) -> None:
    assert go(stub, tmp_path, "--report", str(tmp_path)) == 0
    path = as_the_simulator_writes_them(tmp_path, steps=None, slots=0)
    assert main(["--results", str(path), "--report", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "several engines in virtual time" in page
    assert "GET /steps" not in page


def test_the_page_says_from_when_on_a_long_simulated_runs_steps_are_recorded(stub: Stub, tmp_path: Path) -> None:
    assert go(stub, tmp_path, "--modes", "static,mixed", "--report", str(tmp_path)) == 0
    steps = [step(id, "d") | {"end_s": id / 10} for id in (41, 42)]
    path = as_the_simulator_writes_them(tmp_path, steps=steps, slots=4)
    assert main(["--results", str(path), "--report", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "They begin at: static 4.0 s, mixed 4.0 s." in page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "is no results.json"),
        ("", "is no results.json"),
        ("{}", "is no results.json"),
        ('{"schema": 1, "modes": [{}]}', "is no results.json"),
        ('{"modes": []}', "results without a schema version, from before there were any; this program reads version 1"),
        ('{"schema": 2, "modes": []}', "results of schema version 2, newer than version 1, which this program reads"),
        ('{"schema": "1", "modes": []}', "schema must be a whole number"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_in_a_line(tmp_path: Path, capsys, text: str, told: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    assert main(["--results", str(path), "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert told in said
    assert said.count("\n") == 1


def test_without_step_records_the_report_says_so_and_leaves_the_timeline_out(stub: Stub, tmp_path: Path) -> None:
    assert go(stub, tmp_path, "--report", str(tmp_path)) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no step records (GET /steps)" in page
    assert page.count("data:image/png;base64,") == 2 * 5, "light and dark"
    assert not (tmp_path / "slots.png").exists()
    assert results(tmp_path)["modes"][0]["steps"] is None


def test_a_server_that_dies_half_way_leaves_a_report_of_what_came(stub: Stub, tmp_path: Path) -> None:
    stub.die_at = 5
    assert go(stub, tmp_path, "--modes", "static,dynamic", "--wait", "0.04", "--report", str(tmp_path)) == 1
    assert "went away in mode static" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [row["status"] for row in rows(tmp_path)].count("ok") == 4


def test_figures_more_than_five_percent_from_the_servers_are_named(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.stats["latency"]["all"]["server_ttft"]["p50"] = 100.0  # far from it on any machine
    assert go(stub, tmp_path, "--stream") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "of the server's own" in line)
    assert "TTFT since sent p50" in line
    assert "the server's 100 (-100%" in line


def test_several_arrivals_by_several_modes_are_one_report(stub: Stub, tmp_path: Path) -> None:
    flags = ["--url", stub.url, "--numsamples", "6", "--arrivals", "low", "medium", "high", "--duration", "0.1"]
    flags += ["--numtokens_range", "3", "--modes", "nobatch,static", "--report", str(tmp_path)]
    assert main(flags) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 * 10
    plans = [
        json.loads((tmp_path / name / "plan.json").read_text(encoding="utf-8"))["requests"]
        for name in ("low", "medium", "high")
    ]
    assert len({json.dumps(plan) for plan in plans}) == 3
    assert [len(rows(tmp_path / name)) for name in ("low", "medium", "high")] == [12, 12, 12]
    assert len(stub.bodies["static"]) == 18


def test_repeats_take_turns_and_the_table_has_their_medians_and_how_far_they_are_apart(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(stub, tmp_path, "--modes", "static,mixed", "--repeat", "3", "--report", str(tmp_path)) == 0
    found = results(tmp_path)["modes"]
    assert sorted((mode["mode"], mode["repeat"]) for mode in found) == [(m, n) for m in ("mixed", "static") for n in (1, 2, 3)]
    assert len(rows(tmp_path)) == 2 * 3 * 8
    assert [len(stub.bodies[mode]) for mode in ("static", "mixed")] == [24, 24]
    shown = capsys.readouterr().out
    for mode in ("static", "mixed"):
        rates = sorted(one["groups"]["all"]["output_token_throughput"] for one in found if one["mode"] == mode)
        spread = (rates[-1] - rates[0]) / (sum(rates) / 3)
        assert re.search(rf"^{mode}\W+3 +{rates[1]:.1f} \({spread:.0%}\)", shown, re.MULTILINE), shown
    assert main(["--results", str(tmp_path / "results.json"), "--report", str(tmp_path / "again")]) == 0
    assert len(results(tmp_path / "again")["modes"]) == 6


def test_modes_are_repeated_backwards_every_other_time(stub: Stub, tmp_path: Path) -> None:
    switched: list[str] = []
    stub.on_request = lambda count: switched.append(stub.mode)
    assert go(stub, tmp_path, "--modes", "nobatch,static,mixed", "--repeat", "2", "--numsamples", "1") == 0
    assert switched == ["nobatch", "static", "mixed", "mixed", "static", "nobatch"]
