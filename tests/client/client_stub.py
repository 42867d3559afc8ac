"""A real HTTP server on a free port of 127.0.0.1 that keeps the server's contract and computes nothing."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from client.shared import schema

MODES = ("nobatch", "static", "dynamic", "mixed")


class Stub:
    """Its public attributes say how it behaves and what it has seen."""

    def __init__(self) -> None:
        self.mode = "dynamic"
        self.bodies: dict[str, list[dict[str, Any]]] = {}  # by mode, as they came
        self.calls: list[str] = []
        self.api_key = ""
        self.refuse: dict[int, int] = {}  # status for the n-th request of a mode, counted from 1
        self.drop: set[int] = set()  # the n-th request of a mode gets no answer
        self.die_at: int | None = None  # the n-th request of a mode is the last this server sees
        self.reset_status = 200
        self.stats: dict[str, Any] = example_stats()
        self.seconds_a_token = 0.0
        self.instances = ["stub"]  # the ids of the servers behind this address, which answer in turn
        self.answers = 0
        self.steps: list[dict[str, Any]] | None = None  # records of GET /steps, which come while requests are answered
        self.slots = 4
        self.steps_schema: int | None = schema.STEPS
        self.first_again = False  # whether GET /steps begins anew each time, as that of a second server may
        self.models = [{"id": "demo"}]
        self.most_at_once = 0
        self.under_way = 0
        self.break_stream_at: int | None = None  # the n-th request's stream ends after its first piece
        self.on_request: Any = None  # called with n
        self.lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 would lose connections of its own


def example_stats() -> dict[str, Any]:
    times = {"server_ttft": {"mean": 0.02, "p50": 0.021, "p90": 0.03, "p99": 0.043}, "requests": 4}
    return {
        "model": "demo",
        "weights": "trained",
        "device": "cpu",
        "latency": {"all": times, "immediate": times, "deferred": {"server_ttft": None}},
        "mean_batch_size": 3.25,
        "padding_share": 0.125,
        "preemptions": 7,
    }


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._route()

        def do_POST(self) -> None:
            self._route()

        def do_PUT(self) -> None:
            self._route()

        def _route(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            call = f"{self.command} {self.path}"
            stub.calls.append(call)
            key_is_right = not stub.api_key or self.headers.get("Authorization") == f"Bearer {stub.api_key}"
            if call == "GET /health":
                self._answer(200, {})
            elif not key_is_right:
                self._answer(401, error("this server wants an API key"))
            elif call in ("POST /inference", "POST /v1/completions"):
                self._infer(body)
            elif call == "GET /v1/models":
                self._answer(200, {"object": "list", "data": stub.models})
            elif self.path.startswith("/steps"):
                self._steps()
            elif call == "PUT /mode" and body["mode"] not in MODES:
                self._answer(400, error(f"no mode {body['mode']}; there are {', '.join(MODES)}"))
            elif self.path == "/mode":
                stub.mode = body.get("mode", stub.mode)
                self._answer(200, {"mode": stub.mode, "params": {}, "modes": {mode: {} for mode in MODES}})
            elif call == "POST /stats/reset":
                self._answer(stub.reset_status, {} if stub.reset_status == 200 else error("for the teacher only"))
            else:
                self._answer(200, stub.stats)

        def _infer(self, body: dict[str, Any]) -> None:
            with stub.lock:
                seen = stub.bodies.setdefault(stub.mode, [])
                seen.append(body)
                count = len(seen)
                stub.under_way += 1
                stub.most_at_once = max(stub.most_at_once, stub.under_way)
            try:
                self._serve(body, count)
            finally:
                with stub.lock:
                    stub.under_way -= 1

        def _serve(self, body: dict[str, Any], count: int) -> None:
            if stub.on_request:
                stub.on_request(count)
            if stub.die_at is not None and count >= stub.die_at:
                stub.stop()
                return
            if count in stub.drop:
                return
            if count in stub.refuse:
                self._answer(stub.refuse[count], error("the queue is full"))
                return
            if "num_tokens" not in body:
                self._stream(body, count)
                return
            seconds = stub.seconds_a_token * body["num_tokens"]
            time.sleep(seconds)
            self._answer(
                200,
                {
                    "completion": body["prompt"] + " was quiet.",
                    "num_tokens": body["num_tokens"],
                    "finish_reason": "length",
                    "ttft": 0.01,
                    "latency": seconds,
                    "mode": stub.mode,
                },
            )

        def _stream(self, body: dict[str, Any], count: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self._name()
            self.end_headers()
            for _ in range(body["max_tokens"]):
                time.sleep(stub.seconds_a_token)
                self._event({"choices": [{"index": 0, "text": " quiet", "finish_reason": None}], "usage": None})
                if count == stub.break_stream_at:
                    return
            last = {"index": 0, "text": "", "finish_reason": "length", "mode": stub.mode}
            self._event({"choices": [last], "usage": None})
            usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, value: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

        def _steps(self) -> None:
            if stub.steps is None:
                self._answer(404, error("no such route"))
                return
            query = parse_qs(urlsplit(self.path).query)
            after, limit = int(query["after"][0]), int(query["limit"][0])
            there = stub.steps if stub.bodies.get(stub.mode) else []
            chosen = [record for record in there if record["id"] > after or stub.first_again][:limit]
            self._answer(200, {"schema": stub.steps_schema, "slots": stub.slots, "limits": {}, "steps": chosen})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self._name()
            self.end_headers()
            self.wfile.write(data)

        def _name(self) -> None:
            with stub.lock:
                name = stub.instances[stub.answers % len(stub.instances)]
                stub.answers += 1
            self.send_header("BatchLab-Instance", name)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
