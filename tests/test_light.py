"""What requirements-light.txt brings is enough for a student's laptop: policies, simulator, contract test and client."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [f"tests/{room}" for room in ("batching", "client", "policies", "simulator")]


def run(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "tests.only_light", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins that the file did not bring
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_not_in_the_file_is_not_there() -> None:
    assert "No module named 'flask'" in run("app.py", "dynamic", status=1)


def test_the_contract_test_runs_on_a_policys_file() -> None:
    said = run("pytest", "tests/policies/test_contract.py", "--policy", "batching/policies/orca.py", "-q")
    assert "passed" in said
    assert "skipped" not in said


def test_the_tests_of_its_rooms_are_all_there() -> None:
    assert "tests collected" in run("pytest", "--collect-only", "-q", *ROOMS)


def test_the_simulator_compares_policies_and_draws_what_it_found(tmp_path: Path) -> None:
    plan = ["--requests", "20", "--rate", "50", "--model", "T4:gpt2", "--policy", "static,dynamic"]
    assert "TTFT" in run("simulator", "run", *plan, "--report", str(tmp_path / "report"))
    assert (tmp_path / "report" / "results.png").exists()


def test_the_client_says_in_one_line_that_no_server_is_there() -> None:
    said = run("client/client.py", "--url", "http://127.0.0.1:9", "--numsamples", "2", status=1)
    assert "127.0.0.1" in said
