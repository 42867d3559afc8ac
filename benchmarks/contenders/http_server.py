"""A server program as a process of its own on a free port of 127.0.0.1, and as many clients at once as there are requests."""

import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import requests

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 40


class HttpServer:
    def __init__(self, command: Callable[[int], Sequence[str]], environment: Mapping[str, str]) -> None:
        """`command` for a port. Returns when GET /health answers 200."""
        with closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(command(port), env=environment, stdout=subprocess.DEVNULL)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def get(self, path: str) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between us
            return session.get(self._url + path, timeout=10)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers to `bodies`, each sent from a thread and over a connection of its own."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self._post(path, body), bodies))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with requests.Session() as session:
            session.trust_env = False
            response = session.post(self._url + path, json=body)
            if not response.ok:
                raise RuntimeError(f"{path} answered {response.status_code}: {response.text[:200]}")
            answer: dict[str, Any] = response.json()
            return answer

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            try:
                if self.get("/health").status_code == 200:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server was not ready within {START_TIMEOUT_S} s")
