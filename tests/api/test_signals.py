"""What a terminal, an operator and a restart do to the real server. Signals come through a pseudo-terminal, since a test that
signals gunicorn's master alone cannot see what they do to the worker."""

import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from app import _open_log

from .server_process import ServerProcess
from .signals import CASES, run

Start = Callable[..., ServerProcess]
DEMO = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8")
SPAWNED_WITHIN_S = 5  # a second worker, if gunicorn were to start one


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_terminal_does_everybody_is_answered(tmp_path: Path, case: str) -> None:
    outcome = run(tmp_path / "server", case, seed=1, clients=24)
    assert sum(outcome["answers"].values()) == 24
    assert set(outcome["answers"]) <= ({"200"} if "nohup" in case else {"200", "503"})
    assert outcome["exit status"] == 0


def test_a_second_worker_or_master_is_never_started(start_process: Start) -> None:
    server = start_process("dynamic", *DEMO).wait_until_ready()
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
        server.process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(SPAWNED_WITHIN_S)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert len(children) == 1
    assert server.ask(prompt="The king", num_tokens=1).status_code == 200


def test_a_clean_stop_leaves_no_log_of_the_database_beside_it(start_process: Start) -> None:
    server = start_process("dynamic", *DEMO).wait_until_ready()
    sent = requests.post(server.url + "/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"}, timeout=30)
    assert sent.status_code == 200
    log = server.data_dir / "batchlab.sqlite3-wal"
    assert log.stat().st_size > 0
    server.terminate()
    assert server.wait() == 0
    assert not log.exists()


def test_what_is_in_the_data_folder_is_nobody_elses_to_read(start_process: Start) -> None:
    server = start_process("dynamic", *DEMO).wait_until_ready()
    requests.post(server.url + "/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"}, timeout=30)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [server.data_dir, *server.data_dir.rglob("*")]}
    assert len(modes) > 4
    assert {path: mode for path, mode in modes.items() if mode & 0o077} == {}


def test_each_run_has_an_input_log_of_its_own_and_none_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for i in range(3):
        _open_log(str(path))({"run": i})
    assert [(tmp_path / name).read_text() for name in ("log.1", "log.2", "log")] == [f'{{"run": {i}}}\n' for i in range(3)]
    assert {stat.S_IMODE(log.stat().st_mode) for log in tmp_path.iterdir()} == {0o600}


def test_a_log_that_is_no_file_is_left_as_it_is() -> None:
    _open_log("/dev/null")({"a": 1})
    assert stat.S_IMODE(Path("/dev/null").stat().st_mode) == 0o666
