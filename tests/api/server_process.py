"""The real server as a process of its own on a free port of 127.0.0.1, and a raw connection to it that can hang up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60  # importing torch on a machine with other work
STOP_TIMEOUT_S = 35  # gunicorn's graceful_timeout is 30


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """What `condition` gives as soon as it is true; fails after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without the server's settings. One torch thread: the machine may have other work."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHLAB_")}
    return own | {"OMP_NUM_THREADS": "1"} | extra


class ServerProcess:
    """`python app.py MODE --port N flags...`; what it prints goes to files in `folder`, or to the `terminal`
    (a descriptor) in which it runs."""

    def __init__(
        self,
        folder: Path,
        mode: str,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        own_group: bool = False,
        terminal: int | None = None,
        to_terminal: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_dir = folder / "data"
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                self.command(mode, *flags),
                cwd=ROOT,
                env=clean_environment(**(environment or {})),
                stdin=terminal,
                stdout=terminal if to_terminal else out,
                stderr=terminal if to_terminal else err,
                start_new_session=own_group,
            )

    def command(self, mode: str, *flags: str) -> list[str]:
        return [sys.executable, "app.py", mode, "--port", str(self.port), "--data-dir", str(self.data_dir), *flags]

    @property
    def stdout(self) -> list[str]:
        return self._out.read_text().splitlines()

    @property
    def stderr(self) -> list[str]:
        return self._err.read_text().splitlines()

    @property
    def ready_line(self) -> str:
        return next((line for line in self.stdout if line.startswith("ready: ")), "")

    def wait_until_ready(self) -> "ServerProcess":
        def ready() -> str:
            assert self.is_running, self.stderr
            return self.ready_line

        wait_for(ready, START_TIMEOUT_S, "the line that starts with 'ready: '")
        return self

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """SIGKILL for gunicorn's master and its worker at once; nobody gets to say anything."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self.process.kill()

    def ask(self, **fields: Any) -> requests.Response:
        return requests.post(self.url + "/inference", json=fields, timeout=60)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = requests.get(self.url + "/stats", timeout=10).json()
        return stats

    def wait_for_load(self, running: int, queue_depth: int, timeout_s: float = 10) -> None:
        def reached() -> bool:
            stats = self.stats()
            return (stats["running"], stats["queue_depth"]) == (running, queue_depth)

        wait_for(reached, timeout_s, f"{running} running and {queue_depth} waiting")


class RawRequest:
    """A POST /inference over a bare socket, sent and not yet read: leaving the block hangs up."""

    def __init__(self, server: ServerProcess, **fields: Any) -> None:
        body = json.dumps(fields).encode()
        head = f"POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._socket.sendall(head.encode() + body)

    def __enter__(self) -> "RawRequest":
        return self

    def __exit__(self, *error: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        self._socket.close()

    def status(self) -> int:
        """The status of the answer, once it is there."""
        with self._socket.makefile("rb") as answer:
            return int(answer.readline().split()[1])

    def outcome(self) -> str:
        """The status, if the answer came and its JSON is whole."""
        try:
            with self._socket.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
            json.loads(body)
        except (OSError, ValueError):
            return "none"
        return head.split()[1].decode()
