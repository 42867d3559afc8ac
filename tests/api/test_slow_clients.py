"""Clients that are slow, silent or many, beside honest ones, on the real server."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from .server_process import ServerProcess, wait_for
from .slow_clients import HEAD, KINDS, run

Start = Callable[..., ServerProcess]
DEMO = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8", "--max-queue", "80")
BODY = json.dumps({"prompt": "The king", "num_tokens": 1}).encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
HANG_GUARD_S = 20


@pytest.fixture(scope="module")
def server(start_process: Start) -> ServerProcess:
    return start_process("dynamic", *DEMO).wait_until_ready()


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANG_GUARD_S)


def answer(sock: socket.socket) -> tuple[int, Any]:
    """Status and JSON of the next answer on a connection."""
    with sock.makefile("rb") as file:
        status, length = int(file.readline().split()[1]), 0
        while (line := file.readline().lower()) != b"\r\n":
            length = int(line.split()[1]) if line.startswith(b"content-length:") else length
        return status, json.loads(file.read(length))


def worker_of(server: ServerProcess) -> int:
    return int(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text())


def threads_of(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{worker_of(server)}/task"))


def test_slow_and_silent_clients_are_let_go_and_the_others_do_not_notice_them(server: ServerProcess) -> None:
    before = threads_of(server)
    seen = run(server, 120, seconds=25)
    assert seen["let go"] == dict.fromkeys(KINDS, 30)
    assert list(seen["honest"]) == ["200"]
    assert seen["health"]["failed"] == 0
    wait_for(lambda: threads_of(server) <= before, HANG_GUARD_S, "as many threads as before")


def test_who_is_too_slow_is_told_so(server: ServerProcess) -> None:
    with connect(server) as half:
        half.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt"')
        half.settimeout(2 * HANG_GUARD_S)
        status, told = answer(half)
        assert (status, told["error"]["code"]) == (408, "too_slow")
        assert "9 bytes have come instead of 100" in told["error"]["message"]
        assert half.recv(1) == b""


def test_a_request_that_breaks_off_is_told_what_is_missing(server: ServerProcess) -> None:
    for sent, said in (
        (HEAD + b"Content-Length: 100\r\n\r\n{", "1 bytes have come instead of 100"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n", "5 bytes have come, and not its end"),
        (HEAD, f"{len(HEAD)} bytes have come, and not its end"),
    ):
        with connect(server) as sock:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            status, told = answer(sock)
            assert (status, told["error"]["code"]) == (400, "incomplete")
            assert said in told["error"]["message"]


def test_a_connection_is_kept_for_longer_than_clients_wait_with_the_next_request(server: ServerProcess) -> None:
    with connect(server) as sock:
        for pause_s in (0, 3):
            time.sleep(pause_s)
            sock.sendall(WHOLE)
            assert answer(sock)[0] == 200


def test_requests_that_come_at_once_are_answered_one_after_another(server: ServerProcess) -> None:
    with connect(server) as sock:
        sock.sendall(3 * WHOLE + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with sock.makefile("rb") as file:
            assert file.read().count(b"HTTP/1.1 200 OK") == 4


def test_who_expects_to_be_told_to_go_on_is_told_so(server: ServerProcess) -> None:
    head, _, body = WHOLE.partition(b"\r\n\r\n")
    with connect(server) as sock:
        sock.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert answer(sock)[0] == 200
    with connect(server) as sock:
        sock.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
        assert answer(sock)[0] == 413


def test_threads_go_when_a_burst_is_over(server: ServerProcess) -> None:
    before = threads_of(server)
    with ThreadPoolExecutor(80) as clients:
        asked = [clients.submit(server.ask, prompt="The king", num_tokens=100) for _ in range(80)]
        wait_for(lambda: threads_of(server) >= before + 60, HANG_GUARD_S, "a thread for most of them")
        assert {future.result().status_code for future in asked} == {200}
    wait_for(lambda: threads_of(server) <= before, HANG_GUARD_S, "as many threads as before")


def test_a_half_sent_request_does_not_hold_up_the_end(start_process: Start) -> None:
    server = start_process("dynamic", *DEMO).wait_until_ready()
    with connect(server) as half:
        half.sendall(HEAD)
        server.terminate()
        assert server.process.wait(HANG_GUARD_S) == 0


class FewFiles(ServerProcess):
    def command(self, mode: str, *flags: str) -> list[str]:
        return ["bash", "-c", 'ulimit -n 500; exec "$@"', "bash", *super().command(mode, *flags)]


def test_where_there_are_too_many_connections_the_slowest_go_first(tmp_path: Path) -> None:
    server = FewFiles(tmp_path, "dynamic", *DEMO).wait_until_ready()
    try:
        with requests.Session() as session:  # a connection that was used is kept
            assert session.get(server.url + "/health", timeout=HANG_GUARD_S).status_code == 200
            silent = [connect(server) for _ in range(400)]
            assert server.ask(prompt="The king", num_tokens=1).status_code == 200
            assert silent[0].recv(1) == b""
            silent[-1].sendall(WHOLE)
            assert answer(silent[-1])[0] == 200
            assert session.get(server.url + "/health", timeout=HANG_GUARD_S).status_code == 200
        for sock in silent:
            sock.close()
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
