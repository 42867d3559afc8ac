"""Clients that close their connection, or half of it, in whatever state it is, on the real server."""

import http.client
import json
import socket
from collections.abc import Callable, Iterator

import pytest

from .server_process import ServerProcess

Start = Callable[..., ServerProcess]
SLOW = ("--model", "distilgpt2", "--weights", "random", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "1")
FREED_WITHIN_S = 3  # the server promises 2; one more for a loaded machine, where a step itself may take a while
HANG_GUARD_S = 60
LASTS = 150  # tokens, which take longer than the server waits before it looks whether the client is still there


@pytest.fixture(scope="module")
def process(start_process: Start) -> ServerProcess:
    return start_process("dynamic", *SLOW).wait_until_ready()


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    process.wait_for_load(running=0, queue_depth=0)
    yield process
    process.wait_for_load(running=0, queue_depth=0)


def ask(server: ServerProcess, path: str, version: str = "1.1", **fields: object) -> socket.socket:
    """A connection over which this was asked, once it runs or waits."""
    body = json.dumps(fields).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=HANG_GUARD_S)
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


LONG = [
    ("/inference", {"prompt": "hello", "num_tokens": 1000}),
    ("/v1/completions", {"model": "distilgpt2", "prompt": "hello", "max_tokens": 1000, "ignore_eos": True}),
    ("/v1/completions", {"model": "distilgpt2", "prompt": "hello", "max_tokens": 1000, "ignore_eos": True, "stream": True}),
]
SHORT = [
    ("/inference", {"prompt": "hello", "num_tokens": LASTS}),
    ("/v1/completions", {"model": "distilgpt2", "prompt": "hello", "max_tokens": LASTS, "ignore_eos": True}),
    ("/v1/completions", {"model": "distilgpt2", "prompt": "hello", "max_tokens": LASTS, "ignore_eos": True, "stream": True}),
]


@pytest.mark.parametrize("first", [b"", b"\n", b"GET / HTTP/1.1\r\n"], ids=["nothing", "a stray byte", "half a request"])
@pytest.mark.parametrize(("path", "fields"), LONG, ids=["inference", "completions", "streamed"])
def test_who_closes_the_connection_frees_the_slot_whatever_was_sent_before(
    server: ServerProcess, first: bytes, path: str, fields: dict[str, object]
) -> None:
    sock = ask(server, path, **fields)
    server.wait_for_load(running=1, queue_depth=0)
    sock.sendall(first)
    sock.close()
    server.wait_for_load(running=0, queue_depth=0, timeout_s=FREED_WITHIN_S)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(("path", "fields"), SHORT, ids=["inference", "completions", "streamed"])
def test_who_closes_only_its_half_gets_its_answer_whole(
    server: ServerProcess, version: str, path: str, fields: dict[str, object]
) -> None:
    with ask(server, path, version, **fields) as sock:
        sock.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        body = answer.read()
    assert answer.status == 200
    if "stream" in fields:
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body).get("num_tokens", LASTS) == LASTS


def test_who_closes_half_and_then_all_of_it_frees_its_place_in_the_queue(server: ServerProcess) -> None:
    with ask(server, *LONG[0][:1], **LONG[0][1]):  # type: ignore[arg-type]
        server.wait_for_load(running=1, queue_depth=0)
        waiting = ask(server, *LONG[0][:1], **LONG[0][1])  # type: ignore[arg-type]
        waiting.shutdown(socket.SHUT_WR)
        server.wait_for_load(running=1, queue_depth=1)
        waiting.settimeout(HANG_GUARD_S)
        assert waiting.recv(1) == b"H"  # what shows whether it is still there
        waiting.close()
        server.wait_for_load(running=1, queue_depth=0, timeout_s=3 * FREED_WITHIN_S)
