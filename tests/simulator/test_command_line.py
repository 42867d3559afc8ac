"""`python -m simulator run` from its arguments to its files, and what it says to arguments that will not do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.__main__ import main

CLIENT = Path(__file__).parents[2] / "client" / "client.py"
RUN = ["run", "--requests", "40", "--rate", "50", "--output", "4-12", "--model", "T4:gpt2"]


def test_several_policies_are_compared_on_one_plan(tmp_path: Path, capsys):
    assert main([*RUN, "--policy", "nobatch,static,dynamic", "--deferred", "0.5", "--report", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "roofline of gpt2" in said
    assert "40 requests, 50% deferred; 50 a second" in said
    written = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    assert [mode["mode"] for mode in written["modes"]] == ["nobatch", "static", "dynamic"]
    plans = [[(a["planned_s"], a["prompt_tokens"], a["output_tokens"]) for a in mode["answers"]] for mode in written["modes"]]
    assert plans[0] == plans[1] == plans[2] != []
    assert (tmp_path / "report" / "results.png").stat().st_size > 10_000


def test_a_policys_argument_reaches_it_and_a_limit_the_engine(capsys):
    def e2el(*more: str) -> float:
        assert main([*RUN, "--policy", "static", *more]) == 0
        return float(capsys.readouterr().out.splitlines()[-1].split()[-4])

    assert e2el("--policy-arg", "batch_timeout_ms=500") > e2el("--policy-arg", "batch_timeout_ms=0") + 0.2
    assert e2el("--limit", "max_batch_size=1", "--limit", "max_queue=2", "--policy-arg", "batch_timeout_ms=0") < 0.2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--policy fifo", "--policy: there is no 'fifo'; there are nobatch, static"),
        ("--policy static,static", "--policy: a name stands there twice"),
        ("--policy dynamic --policy-arg batch_timeout_ms=5", "no such parameter of dynamic; there are: none"),
        ("--policy static --policy-arg batch_timeout_ms=long", "--policy-arg: batch_timeout_ms: must be a number, not 'long'"),
        ("--policy static --policy-arg batch_timeout_ms=-1", "must lie between 0 and 60000"),
        ("--policy static --policy-arg batch_timeout_ms", "--policy-arg: must be name=value"),
        ("--policy static --limit slots=3", "--limit: slots: no such limit; there are max_batch_size"),
        ("--policy static --limit max_batch_size=1.5", "--limit: max_batch_size: must be a whole number, not '1.5'"),
        ("--policy static --limit max_batch_size=600", "--limit: token_budget: must be at least max_batch_size"),
        ("--policy static --limit prefix_caching=2", "--limit: prefix_caching: must be 0 or 1, not '2'"),
        ("--policy static --model ceng523 --limit max_batch_size=65", "max_batch_size: the table ends at batches of 64"),
        ("--policy static --model ceng523:communication_ms", "there is no such variant; there are llm_1_ms"),
        ("--policy static --rate 0", "argument --rate: must be a rate above 0, not '0'"),
        ("--policy static --rate fast", "argument --rate: must be a rate above 0, not 'fast'"),
        ("--policy static --deferred 2", "argument --deferred: must be a number from 0 to 1"),
        ("--policy static --prompt 9-3", "argument --prompt: must be a number of tokens such as 64"),
        ("--policy static --replicas 0", "argument --replicas: must be a whole number of at least 1"),
        ("--policy static --router random", "argument --router: invalid choice: 'random'"),
        ("--policy static --plan plan.json", "give either --plan or --requests"),
        ("--policy static --model gpt5", "--model gpt5: there is no such file"),
        ("", "the following arguments are required: --policy"),
    ],
)
def test_what_will_not_do_is_one_line_that_names_it(arguments: str, told: str, capsys):
    assert main([*RUN, *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("simulator: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("validate --log run.jsonl --policy static", "--log: the log says which policy"),
        ("validate --engine demo --url http://127.0.0.1:1 --requests 5", "--url goes with --log"),
        ("validate --engine demo", "give either --plan or --requests"),
        ("validate --engine demo --policy static,dynamic --requests 5", "--policy: one is validated at a time"),
        ("validate --engine gpt5 --requests 5", "--engine gpt5: "),
        ("validate --engine demo --requests 5 --limit block_size=8", "--limit: block_size: --engine finds it out by itself"),
        ("calibrate --engine demo --limit lanes=2 --out m.json", "--limit: lanes: --engine finds it out by itself"),
        ("calibrate --log run.jsonl --limit max_queue=9 --out m.json", "--limit goes with --engine"),
        ("validate --log none.jsonl --model T4:gpt2", "--model T4:gpt2: must be a law that `calibrate` wrote"),
        ("calibrate --out m.json", "one of the arguments --url --log --engine is required"),
        ("calibrate --url http://127.0.0.1:1 --out m.json", "--url: http://127.0.0.1:1/steps?limit=10000: "),
    ],
)
def test_calibrate_and_validate_refuse_in_one_line_too(arguments: str, told: str, capsys):
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_the_client_makes_its_page_of_what_was_simulated(tmp_path: Path):
    assert main([*RUN, "--policy", "static,dynamic", "--deferred", "0.5", "--report", str(tmp_path)]) == 0
    command = [sys.executable, str(CLIENT), "--results", str(tmp_path / "results.json"), "--report", str(tmp_path / "page")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "roofline of gpt2" in said
    assert (tmp_path / "page" / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2 * 6, (
        "light and dark"
    )
    assert (tmp_path / "page" / "slots.png").exists()
    simulated = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["modes"]
    shown = json.loads((tmp_path / "page" / "results.json").read_text(encoding="utf-8"))["modes"]
    for one, other in zip(simulated, shown, strict=True):
        for group, figures in one["groups"].items():
            for name, value in figures.items():
                if isinstance(value, float):
                    assert other["groups"][group][name] == pytest.approx(value, rel=1e-4), name
                elif isinstance(value, dict) and name != "errors":
                    assert other["groups"][group][name] == pytest.approx(value, rel=1e-3, abs=2e-6), name


def test_a_plan_that_is_not_there_is_one_line(capsys, tmp_path: Path):
    assert main(["run", "--policy", "static", "--model", "T4:gpt2", "--plan", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"simulator: {tmp_path / 'none.json'}: No such file or directory\n"


def test_repeats_have_plans_of_their_own_and_each_mode_the_same_ones(tmp_path: Path, capsys):
    assert main([*RUN, "--policy", "static,dynamic", "--repeat", "3", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "seed 0, and the 2 after it" in said
    modes = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["modes"]
    plans = {(m["mode"], m["repeat"]): [a["planned_s"] for a in m["answers"]] for m in modes}
    assert len(plans) == 6
    for n in (1, 2, 3):
        assert plans["static", n] == plans["dynamic", n]
    assert plans["static", 1] != plans["static", 2] != plans["static", 3]
    rates = sorted(m["groups"]["all"]["request_throughput"] for m in modes if m["mode"] == "dynamic")
    line = next(line for line in said.splitlines() if line.startswith("dynamic") and "%)" in line)
    assert f"{rates[1]:.2f} ({(rates[2] - rates[0]) / (sum(rates) / 3):.0%})" in line


def test_a_plan_of_a_file_is_not_repeated(capsys, tmp_path: Path):
    assert main(["run", "--policy", "static", "--model", "T4:gpt2", "--plan", str(tmp_path / "p.json"), "--repeat", "2"]) == 2
    assert capsys.readouterr().err.startswith("simulator: --repeat goes with --requests")
