"""Malformed requests to all routes: damaged heads, lengths and chunks, JSON and forms of wrong types, bytes flipped, requests
cut off, answers not waited for. Nothing may be answered with 5xx or not at all, and afterwards the server has to be as it was.
As a script, with as many as asked for:

    python -m tests.api.fuzz --requests 10000
"""

import argparse
import json
import random
import socket
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from .footprint import is_back, state
from .server_process import ServerProcess, wait_for

FLAGS = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8")
# fmt: off
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/inference"): {"prompt": "The king", "num_tokens": 2, "temperature": 1, "top_k": 4, "seed": 1, "stop": ["a"]},
    ("POST", "/v1/completions"): {
        "model": "demo", "prompt": ["a", "b"], "max_tokens": 2, "n": 2, "stream": True, "logprobs": 1,
        "stop": "x", "top_p": 0.5,
    },
    ("POST", "/v1/batches"): {"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"},
    ("POST", "/v1/files"): {},
    ("POST", "/v1/chat/completions"): {"messages": []},
    ("PUT", "/mode"): {"mode": "orca", "params": {}},
    ("POST", "/burst"): {"requests": 2, "prompt_tokens": [1, 2], "num_tokens": 2, "deferred": 0.5, "seed": 1},
    ("DELETE", "/burst"): {},
    ("POST", "/stats/reset"): {},
    ("POST", "/login"): {},
    ("POST", "/logout"): {},
}
PATHS = [
    "/", "/health", "/stats", "/mode", "/metrics", "/steps?after=0&limit=5", "/events", "/login", "/session",
    "/dashboard/main.js", "/dashboard/plotly.js", "/v1/models", "/v1/models/demo", "/v1/files?limit=2",
    "/v1/files/file-0/content",
    "/v1/batches/batch_0", "/v1/batches?after=%00", "/v1/batches/batch_0/cancel",
]
METHODS = ["GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "G@T", ""]
VALUES: list[Any] = [
    None, True, -1, 0, 1, 0.5, 1e308, 10**400, "", "x", "\ud800", "\x00", "é" * 50, [], [[]], [None], {},
    {"a": {"b": []}}, [1] * 40,
]
HEADERS = [
    "Origin: http://[::1", "Origin: null", "Origin: http://evil.example", "Host: [::1", "Host: evil.example", "Host: ",
    "Authorization: Bearer", "Authorization: Bearer \xe9", "Cookie: batchlab=x", "Cookie: =;;=", "Content-Length: -1",
    "Content-Length: 5", "Content-Length: 99999999999999", "Content-Length: x", "Transfer-Encoding: chunked", "X_Y: 1",
    "Expect: 100-continue", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked", "Content-Encoding: gzip",
    "Content-Type: application/json", "Content-Type: multipart/form-data", "Content-Type: multipart/form-data; boundary=b",
    "Content-Type: ;;;", "Content-Type: application/x-www-form-urlencoded", "Range: bytes=5-1", "Range: bytes=0-1,3-",
    "If-Modified-Since: x", "Last-Event-ID: -1", "Accept-Encoding: \x01", "Connection: close", "Connection: upgrade",
    "Upgrade: h2c", "No colon", " folded", "X-Forwarded-For: x", "Accept: */*;q=x", "Content-Type: text/plain; charset=nothing",
]
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{}\r\n--b--\r\n'
)
CHUNKS = [
    b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n\r\n", b"5\r\nhel", b"-1\r\n", b"5\r\nhello!\r\n0\r\n\r\n", 
    b"0\r\nX: \x00\r\n\r\n", b"fffffffff\r\n",
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(FORM), FORM),
]
# fmt: on
CLIENTS, HANG_S = 4, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), "dynamic", *FLAGS, own_group=True).wait_until_ready()
        try:
            print(json.dumps(run(server, args.requests, args.seed)))
        finally:
            server.kill_group()


def run(server: ServerProcess, number: int, seed: int) -> dict[str, Any]:
    """How they were answered, and what the server had before and has after."""
    requests.get(server.url + "/health", timeout=HANG_S)
    before = state(server)
    with ThreadPoolExecutor(CLIENTS) as clients:
        outcomes = list(clients.map(lambda i: _send(server, made(random.Random(seed + i)), i), range(number)))
    answers = Counter(outcome for outcome, _ in outcomes)
    bad = [repr(sent[:300]) for outcome, sent in outcomes if outcome.startswith("5") or outcome == "hangs"]
    with suppress(AssertionError):  # who asked sees it
        wait_for(lambda: is_back(before, state(server)), HANG_S, f"back to {before}")
    return {"answers": dict(answers), "bad": bad[:20], "before": before, "after": state(server)}


def made(rng: random.Random) -> bytes:
    """A request that has, most often, something wrong."""

    def seldom(probability: float) -> bool:
        return rng.random() < probability

    (method, path), fields = rng.choice(list(BODIES.items()))
    if seldom(0.3):
        method, path, fields = rng.choice(METHODS), rng.choice(PATHS), {}
    if seldom(0.1):
        path = rng.choice(
            [path + "%", path + "?after=%00&limit=x", path + "/\xff", "//" + path, "*", "http://a" + path, path * 500]
        )
    fields = dict(fields)
    for _ in range(rng.randrange(3)):
        fields[rng.choice([*fields, "x"])] = rng.choice(VALUES)
    body = json.dumps(fields).encode()
    headers = ["Host: localhost"]
    if path == "/v1/files":
        body, headers = FORM, [*headers, "Content-Type: multipart/form-data; boundary=b"]
    if seldom(0.1):
        body = rng.choice([FORM, b"key=%ff&key", rng.randbytes(rng.randrange(200)), b"[" * 5000, b"--b\r\n" * 3000])
    if seldom(0.3):
        headers.append(rng.choice(HEADERS))
    if seldom(0.1):
        headers.append("Transfer-Encoding: chunked")
        body = rng.choice(CHUNKS)
    elif not seldom(0.05):
        headers.append(f"Content-Length: {len(body) + seldom(0.05) - seldom(0.05)}")
    rng.shuffle(headers)
    version = rng.choice(["1.0", "2.0", "x"]) if seldom(0.05) else "1.1"
    head = f"{method} {path} HTTP/{version}\r\n" + "\r\n".join(headers) + "\r\n\r\n"
    sent = bytearray(head.encode("latin-1", "replace") + body)
    if seldom(0.1):
        for _ in range(rng.randrange(1, 5)):
            sent[rng.randrange(len(sent))] = rng.randrange(256)
    return bytes(sent[: rng.randrange(len(sent))] if seldom(0.05) else sent)


def _send(server: ServerProcess, sent: bytes, number: int) -> tuple[str, bytes]:
    """The status; whether it was closed without one, or not within HANG_S; and what was sent. Every tenth does not wait."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S) as sock:
        try:
            sock.sendall(sent)
            if number % 10 == 0:
                return "not waited for", sent
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while b"\r\n" not in answer and (data := sock.recv(4096)):
                answer += data
        except TimeoutError:
            return "hangs", sent
        except OSError:
            return "reset", sent
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    return (answer.split()[1].decode() if answer[:5] == b"HTTP/" else "closed" if not answer else "no HTTP"), sent


if __name__ == "__main__":
    main()
