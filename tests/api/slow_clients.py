"""Thousands of clients that say nothing, stop in the middle of a request, or send a byte a second of its head or its body,
beside some honest ones. How long does /health take meanwhile, is every honest request answered, and what became of the others?
As a script, with as many as asked for:

    python -m tests.api.slow_clients --connections 2000 --seconds 40
"""

import argparse
import json
import resource
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from .server_process import ServerProcess

FLAGS = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8")
HEAD = b"POST /inference HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
KINDS = {  # what is sent at once, and what then, a byte a second
    "silent": (b"", b""),
    "half a request": (HEAD + b"Content-Length: 100\r\n\r\n{", b""),
    "slow head": (HEAD, b"X-Slow: " + b"x" * 1000),
    "slow body": (HEAD + b"Content-Length: 1000\r\n\r\n", b'{"prompt": "' + b"x" * 1000),
}
HONEST, PATIENCE_S = 4, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), "dynamic", *FLAGS, own_group=True).wait_until_ready()
        try:
            print(json.dumps(run(server, args.connections, args.seconds)))
        finally:
            server.kill_group()


def run(server: ServerProcess, connections: int, seconds: float) -> dict[str, Any]:
    """What was seen in so many seconds, with so many clients that are slow or silent, as many of each kind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(HONEST + 2) as threads:
        ended = threads.submit(_be_slow, server, connections, until)
        health = threads.submit(_watch_health, server, until)
        honest = [threads.submit(_ask, server, until) for _ in range(HONEST)]
        answers: Counter[str] = sum((future.result() for future in honest), Counter())
        seen = {"let go": dict(ended.result()), "honest": dict(answers)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    times = sorted(health.result())
    return seen | {
        "health": {
            "asked": len(times),
            "failed": times.count(float("inf")),
            "median_s": round(times[len(times) // 2], 3),
            "longest_s": round(times[-1], 3),
        },
    }


def _be_slow(server: ServerProcess, connections: int, until: float) -> Counter[str]:
    """By kind, how many the server has let go."""
    begun: list[tuple[str, socket.socket]] = []
    ended = Counter(dict.fromkeys(KINDS, 0))
    for i in range(connections):
        kind = list(KINDS)[i % len(KINDS)]
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
        sock.sendall(KINDS[kind][0])
        begun.append((kind, sock))
    second = 0
    while time.monotonic() < until:
        for kind, sock in list(begun):
            try:
                sock.sendall(KINDS[kind][1][second : second + 1])
                sock.setblocking(False)
                gone = not sock.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                begun.remove((kind, sock))
                ended[kind] += 1
                sock.close()
        second += 1
        time.sleep(max(0.0, min(1.0, until - time.monotonic())))
    for _, sock in begun:
        sock.close()
    return ended


def _watch_health(server: ServerProcess, until: float) -> list[float]:
    """How long each answer took, in seconds, over a connection of its own."""
    times = []
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            assert requests.get(server.url + "/health", timeout=PATIENCE_S).status_code == 200
            times.append(time.monotonic() - begun)
        except (requests.RequestException, AssertionError):
            times.append(float("inf"))
        time.sleep(0.1)
    return times


def _ask(server: ServerProcess, until: float) -> Counter[str]:
    """How requests over one connection were answered."""
    answers: Counter[str] = Counter()
    with requests.Session() as session:
        while time.monotonic() < until:
            try:
                asked = {"prompt": "The king", "num_tokens": 20}
                answers[str(session.post(server.url + "/inference", json=asked, timeout=PATIENCE_S).status_code)] += 1
            except requests.RequestException as error:
                answers[type(error).__name__] += 1
            threading.Event().wait(0.2)
    return answers


if __name__ == "__main__":
    main()
