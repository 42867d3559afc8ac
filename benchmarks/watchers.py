"""What watching costs the server: the share of one processor that step records and their viewers take.

    python -m benchmarks.watchers --slots 256 --steps-per-s 50 --viewers 0,1,8,64

A server under gunicorn with every slot decoding, in steps that compute nothing but come at the given rate, and viewers who read
/events. Counted is the processor's time in what the batching thread does for the records, and all that of all other threads
of the server, which have nothing to do but to serve the viewers.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from flask import Flask

from api import watching
from batching.driver import Driver
from batching.loop import BatchingLoop, Engine
from batching.policies.dynamic import Dynamic
from batching.policy import Limits
from batching.request import Request
from batching.step import Step, StepResult
from batching.step_log import StepLog
from benchmarks.program import arguments

SETTLE_S, MEASURE_S = 1.5, 8.0


class Metronome:
    """An executor whose steps end at a steady rate."""

    depth = 1

    def __init__(self, steps_per_s: float) -> None:
        self._period = 1 / steps_per_s

    def submit(self, step: Step) -> None:
        self._step, self._started = step, time.monotonic()

    def collect(self) -> StepResult:
        time.sleep(max(0.0, self._started + self._period - time.monotonic()))
        tokens = {row.req.id: 0 for row in self._step.rows if row.samples}
        return StepResult(self._step.id, self._started, time.monotonic(), tokens)


class TimedLog(StepLog):
    """Counts the processor's time that it takes, in seconds."""

    seconds = 0.0

    def on_step(self, *args: Any) -> None:
        begun = time.thread_time()
        super().on_step(*args)
        self.seconds += time.thread_time() - begun

    def on_result(self, *args: Any) -> None:
        begun = time.thread_time()
        super().on_result(*args)
        self.seconds += time.thread_time() - begun

    def publish(self) -> None:
        begun = time.thread_time()
        super().publish()
        self.seconds += time.thread_time() - begun


def application() -> Flask:
    """What gunicorn serves: /events over a loop whose every slot decodes."""
    slots, rate = int(os.environ["SLOTS"]), float(os.environ["RATE"])
    limits = Limits(
        max_batch_size=slots, token_budget=max(512, slots), max_prefill_tokens=1 << 20, max_context=1 << 20,
        num_blocks=1 << 20, max_queue=slots + 1,
    )  # fmt: skip
    loop = BatchingLoop(Dynamic(), lambda: Engine(Metronome(rate), limits, None, {}))
    loop.start()
    while loop.engine is None or loop.health.value != "ready":
        time.sleep(0.01)
    driver: Driver = loop._driver  # type: ignore[assignment]
    driver.steps = log = TimedLog(slots)
    for i in range(slots):
        loop.submit(Request(f"request-{i:032}", [0], 100_000, arrival=loop.clock()))
    batching = next(thread for thread in threading.enumerate() if thread.name == "batching")
    app = Flask("watchers")
    app.extensions["batching"] = loop
    app.register_blueprint(watching.blueprint)
    app.add_url_rule("/cpu", view_func=lambda: json.dumps([log.seconds, others(batching.native_id)]))
    return app


def others(batching: int | None) -> float:
    """Processor seconds of all threads of this process but the batching thread."""
    folders = [path for path in Path("/proc/self/task").iterdir() if path.name != str(batching)]
    return sum(int((path / "schedstat").read_text(encoding="utf-8").split()[0]) for path in folders) / 1e9


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--steps-per-s", type=float, default=50)
    parser.add_argument("--viewers", default="0,1,8,64", help="numbers of them, separated by commas")
    args = parser.parse_args()
    print(f"{args.slots} slots, {args.steps_per_s:g} steps/s; share of one processor")
    for viewers in map(int, args.viewers.split(",")):
        records, threads = shares(args, viewers)
        print(
            f"{viewers:2} viewers: records {records:.2%}, serving {threads:.2%}, together {records + threads:.2%}", flush=True
        )


def shares(args: argparse.Namespace, viewers: int) -> tuple[float, float]:
    """Of making the records, and of all other threads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {"SLOTS": str(args.slots), "RATE": str(args.steps_per_s)}
    flags = ["-k", "gthread", "--threads", "100", "-b", f"127.0.0.1:{port}", "--log-level", "error"]
    command = [sys.executable, "-m", "gunicorn", *flags, "benchmarks.watchers:application()"]
    server = subprocess.Popen(command, env=environment)
    reader = None
    try:
        while True:
            try:
                cpu(port)
                break
            except OSError:
                time.sleep(0.1)
        reader = subprocess.Popen([sys.executable, "-c", READER, str(port), str(viewers)])  # its time is not the server's
        time.sleep(SETTLE_S)
        begun, before = time.monotonic(), cpu(port)
        time.sleep(MEASURE_S)
        after, passed = cpu(port), time.monotonic() - begun
        return (after[0] - before[0]) / passed, (after[1] - before[1]) / passed
    finally:
        for process in (reader, server):
            if process:
                process.kill() if process is reader else process.terminate()
                process.wait()


def cpu(port: int) -> list[float]:
    """Seconds so far: making the records, and all other threads."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /cpu HTTP/1.0\r\n\r\n")
        with connection.makefile("rb") as answer:
            seconds: list[float] = json.loads(answer.read().rsplit(b"\r\n", 1)[-1])
            return seconds


READER = """
import selectors, socket, sys
port, viewers = int(sys.argv[1]), int(sys.argv[2])
waiting = selectors.DefaultSelector()
for _ in range(viewers):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"GET /events HTTP/1.1\\r\\nHost: here\\r\\n\\r\\n")
    waiting.register(connection, selectors.EVENT_READ)
while True:
    for key, _ in waiting.select():
        key.fileobj.recv(1 << 20)
"""


if __name__ == "__main__":
    main()
