"""The server under everything at once for a long time: requests of all lengths, clients that hang up, streams that are read to
their end or left, viewers, switches of the mode, batches, bursts that are called off, uploads. Prints a line a minute and, when
the load is over, whether sequence slots, KV blocks, threads and open files are back to the start, and how memory grew after the
first ten minutes. As a script:

    python -m tests.api.soak --minutes 60
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from .footprint import is_back, state
from .server_process import RawRequest, ServerProcess, wait_for

FLAGS = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8", "--max-queue", "200")
MODES = ("static", "orca", "mixed", "nobatch", "sarathi", "dynamic")
WARM_UP_S = 600
GROWTH = 0.02  # of memory, after the first ten minutes
IDLE_WITHIN_S = 60
TEXT = "It was late in the afternoon when the carriage came up the lane. "


class Load:
    """Threads that each do one thing again and again, and count how it went."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        self._over = threading.Event()
        jobs: list[Callable[[random.Random], str]] = [self.ask] * 6 + [self.hang_up] * 3 + [self.stream] * 3
        jobs += [self.leave_a_stream, self.watch, self.switch, self.run_batch, self.burst, self.refused]
        rngs = [random.Random(seed + i) for i in range(len(jobs))]
        self._threads = [threading.Thread(target=self._repeat, args=job) for job in zip(jobs, rngs, strict=True)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, job: Callable[[random.Random], str], rng: random.Random) -> None:
        while not self._over.is_set():
            try:
                outcome = job(rng)
            except (requests.RequestException, OSError, AssertionError) as error:
                outcome = type(error).__name__
            self.counts[f"{job.__name__}: {outcome}"] += 1
            self._over.wait(rng.uniform(0, 0.2))

    def ask(self, rng: random.Random) -> str:
        return str(self.server.ask(prompt=TEXT * rng.randint(1, 8), num_tokens=rng.randint(1, 150)).status_code)

    def hang_up(self, rng: random.Random) -> str:
        with RawRequest(self.server, prompt=TEXT * rng.randint(1, 8), num_tokens=300):
            self._over.wait(rng.uniform(0, 2))
        return "done"

    def _stream(self, rng: random.Random, most: int) -> str:
        body = {
            "model": "demo",
            "prompt": TEXT,
            "max_tokens": rng.randint(1, 200),
            "stream": True,
            "logprobs": rng.choice([None, 3]),
        }
        with requests.post(self.server.url + "/v1/completions", json=body, stream=True, timeout=60) as answer:
            for i, _ in enumerate(answer.iter_lines()):
                if i == most:
                    break
        return str(answer.status_code)

    def stream(self, rng: random.Random) -> str:
        return self._stream(rng, -1)

    def leave_a_stream(self, rng: random.Random) -> str:
        return self._stream(rng, rng.randint(0, 40))

    def watch(self, rng: random.Random) -> str:
        with requests.get(self.server.url + "/events", stream=True, timeout=60) as events:
            for i, _ in enumerate(events.iter_lines()):
                if i > rng.randint(1, 100) or self._over.is_set():
                    break
        for path in ("/stats", "/metrics", "/steps?limit=100", "/", "/mode"):
            requests.get(self.server.url + path, timeout=60)
        return str(events.status_code)

    def switch(self, rng: random.Random) -> str:
        self._over.wait(10)
        return str(requests.put(self.server.url + "/mode", json={"mode": rng.choice(MODES)}, timeout=120).status_code)

    def run_batch(self, rng: random.Random) -> str:
        def line(i: int) -> dict[str, Any]:
            body = {"model": "demo", "prompt": TEXT, "max_tokens": rng.randint(1, 60)}
            return {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}

        url, content = self.server.url, "\n".join(json.dumps(line(i)) for i in range(40))
        sent = requests.post(url + "/v1/files", files={"file": ("lines", content)}, data={"purpose": "batch"}, timeout=60)
        asked = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = requests.post(url + "/v1/batches", json=asked, timeout=60).json()["id"]
        if rng.random() < 0.3:
            requests.post(f"{url}/v1/batches/{batch}/cancel", timeout=60)

        def ended() -> Any:
            found = requests.get(f"{url}/v1/batches/{batch}", timeout=60).json()
            return found if found["status"] in ("completed", "cancelled", "failed") else None

        found = wait_for(ended, 600, "the batch ends")
        for file in (found["input_file_id"], found["output_file_id"], found["error_file_id"]):
            if file is not None:
                requests.delete(f"{url}/v1/files/{file}", timeout=60)
        return str(found["status"])

    def burst(self, rng: random.Random) -> str:
        body = {"requests": rng.randint(1, 60), "prompt_tokens": [4, 100], "num_tokens": [5, 100], "deferred": 0.5}
        status = requests.post(self.server.url + "/burst", json=body, timeout=60).status_code
        self._over.wait(rng.uniform(0, 10))
        requests.delete(self.server.url + "/burst", timeout=60)
        return str(status)

    def refused(self, rng: random.Random) -> str:
        body = rng.choice([b"{", b"x" * 3_000_000, b'{"prompt": 1}', b"\xff"])
        return str(requests.post(self.server.url + "/inference", data=body, timeout=60).status_code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), "dynamic", *FLAGS, own_group=True).wait_until_ready()
        try:
            good = run(server, args.minutes, args.seed)
        finally:
            server.kill_group()
    sys.exit(not good)


def run(server: ServerProcess, minutes: float, seed: int) -> bool:
    """Whether all was given back, and memory was flat."""
    server.ask(prompt="The king", num_tokens=1)
    before = state(server)
    print(json.dumps({"minute": 0} | before), flush=True)
    load, begun, warm = Load(server, seed), time.monotonic(), before
    for minute in range(1, int(minutes) + 1):
        time.sleep(max(0.0, begun + 60 * minute - time.monotonic()))
        now = state(server)
        warm = now if 60 * minute <= WARM_UP_S else warm
        print(json.dumps({"minute": minute} | now), flush=True)
    time.sleep(max(0.0, begun + 60 * minutes - time.monotonic()))
    load.stop()
    with suppress(AssertionError):
        wait_for(lambda: is_back(before, state(server)), IDLE_WITHIN_S, "idle")
    after = state(server)
    growth = after["memory, MB"] / warm["memory, MB"] - 1
    flat = growth <= GROWTH or 60 * minutes <= WARM_UP_S
    server_errors = {name: count for name, count in load.counts.items() if name.split(": ")[1].startswith("5")}
    print(
        json.dumps({"counts": dict(sorted(load.counts.items())), "after": after, "growth after ten minutes": round(growth, 3)})
    )
    print(json.dumps({"all given back": is_back(before, after), "memory flat": flat, "5xx": server_errors}))
    return is_back(before, after) and flat and not server_errors


if __name__ == "__main__":
    main()
