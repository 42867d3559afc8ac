"""The HTTP side of the client: one class with the routes it uses, and the error that ends a run.

It must not know when a request is due, or what is made of its answer. All of it runs on one asyncio loop: thousands of
requests may be open at a time, each on a connection of its own, as thousands of users would be.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from types import SimpleNamespace, TracebackType
from typing import Any

import aiohttp

from client.answers import Answer
from client.metrics import number
from client.shared.plan import PlannedRequest

CONNECT_S = 10.0
PROBE_S = 5.0
INSTANCE = "BatchLab-Instance"  # the header that names the server
CALL_S = 60.0
# A request, or a switch that waits for running ones, may take long on a slow machine; Ctrl-C ends it sooner.
PATIENT_S = 3600.0
# What /inference does where it is not told, so that a streamed text is the one that /inference gives.
SAMPLING = {"temperature": 0.6, "top_k": 40, "ignore_eos": True}


class ClientError(Exception):
    """Ends the run; its text is the one line the user reads. ``status`` is the HTTP status where there is one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Server:
    """The HTTP contract, as the client uses it; to be entered with ``async with``."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession
        self.instances: set[str] = set()  # of the servers that answered calls

    async def __aenter__(self) -> Server:
        sent = aiohttp.TraceConfig()
        sent.on_request_headers_sent.append(_note_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=self._headers, trace_configs=[sent]
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def infer(self, request: PlannedRequest, start: float) -> Answer:
        """POST /inference, answered as a whole; never raises for what the network or the server does, but says so in
        ``error``."""
        return await self._answered(request, start, "/inference", request.body(), self._read_whole)

    async def stream(self, request: PlannedRequest, start: float, model: str) -> Answer:
        """POST /v1/completions with ``stream``, which /inference has not: the text piece by piece. Raises as little as
        ``infer``."""
        body = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": request.num_tokens,
            "priority": request.priority,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return await self._answered(request, start, "/v1/completions", body | SAMPLING, self._read_pieces)

    async def _answered(self, request: PlannedRequest, start: float, path: str, body: dict[str, Any], read: Any) -> Answer:
        sent = _Sent(time.perf_counter())
        found: dict[str, Any] = {}
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=PATIENT_S)
            async with self._session.post(self.url + path, json=body, timeout=timeout, trace_request_ctx=sent) as response:
                if response.status == 200:
                    found = await read(response, start)
                else:
                    found = {"error": str(response.status), "message": await _error_message(response)}
                found["instance"] = response.headers.get(INSTANCE, "")
        except aiohttp.ConnectionTimeoutError:
            found = {"error": "no connection", "message": f"none within {CONNECT_S:g} s"}
        except asyncio.TimeoutError:
            found = {"error": "timed out"}
        except (aiohttp.ClientError, OSError):
            found = {"error": "connection lost"}
        except ValueError as error:  # what came is not what such a server sends
            found = {"error": "bad answer", "message": str(error)}
        return Answer(request, sent.at - start, time.perf_counter() - start, **found)

    async def _read_whole(self, response: aiohttp.ClientResponse, start: float) -> dict[str, Any]:
        good = await _object(response)
        if "completion" not in good:
            return {"error": "bad answer"}
        return {
            "tokens": int(number(good, "num_tokens") or 0),
            "completion": str(good["completion"]),
            "finish_reason": str(good.get("finish_reason") or ""),
            "server_ttft_s": number(good, "ttft"),
            "server_latency_s": number(good, "latency"),
            "mode": str(good.get("mode") or ""),
        }

    async def _read_pieces(self, response: aiohttp.ClientResponse, start: float) -> dict[str, Any]:
        """Server-sent events, each with the time at which it was read."""
        times: list[float] = []
        pieces: list[str] = []
        reason = mode = ""
        usage: dict[str, Any] = {}
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            came = time.perf_counter() - start
            data = line[5:].strip()
            if data == b"[DONE]":
                counts = {"tokens": int(number(usage, "completion_tokens") or len(times))}
                prompt = number(usage, "prompt_tokens")
                if prompt is not None:
                    counts["prompt_tokens"] = int(prompt)
                text = {"completion": "".join(pieces), "finish_reason": reason, "mode": mode}
                return counts | text | {"piece_times": tuple(times)}
            event = json.loads(data)
            if "error" in event:
                kind = str(event["error"].get("code") or event["error"].get("type") or "stream error")
                return {"error": kind, "message": _one_line(event["error"].get("message"))}
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if choice.get("text"):
                    times.append(came)
                    pieces.append(choice["text"])
                reason = choice.get("finish_reason") or reason
                mode = choice.get("mode") or mode
        return {"error": "connection lost", "message": "the stream ended before its end"}

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = CALL_S
    ) -> dict[str, Any]:
        """Any other route; its JSON object, empty where there is none. Raises ClientError with the line to show."""
        try:
            async with self._send(method, path, body, timeout_s) as response:
                status = response.status
                self.instances.update(filter(None, [response.headers.get(INSTANCE)]))
                if status == 401:
                    told = await _error_message(response)
                    text = f"the server does not accept the key (401: {told}): set API_KEY in client/.env"
                    raise ClientError(text, status)
                if status >= 400:
                    text = f"{method} {path}: the server answered {status}: {await _error_message(response)}"
                    raise ClientError(text, status)
                return await _object(response)
        except aiohttp.ConnectionTimeoutError:
            raise self._no_server() from None
        except asyncio.TimeoutError:
            raise ClientError(f"{method} {self.url}{path}: no answer within {timeout_s:.0f} s") from None
        except (aiohttp.ClientConnectionError, OSError):
            raise self._no_server() from None
        except aiohttp.ClientError as error:
            raise ClientError(f"{method} {self.url}{path} failed: {error}") from None

    def _no_server(self) -> ClientError:
        return ClientError(f"no server answers at {self.url}: is it running, and is IP in client/.env (or --url) right?")

    async def model(self) -> str:
        """The name by which /v1/completions knows the model. Raises ClientError."""
        try:
            return str((await self.call("GET", "/v1/models"))["data"][0]["id"])
        except ClientError as error:
            if error.status != 404:
                raise
        except (TypeError, KeyError, IndexError):
            pass
        raise ClientError(f"{self.url} has no /v1/models, so nothing can be streamed: try --no-stream")

    async def switch(self, mode: str) -> dict[str, Any]:
        """PUT /mode; returns once the new policy has taken over, which waits for running requests: with the answer."""
        return await self.call("PUT", "/mode", {"mode": mode}, PATIENT_S)

    async def reset_stats(self) -> None:
        """POST /stats/reset; a server that leaves this to the teacher is still measured, with a word of warning."""
        try:
            await self.call("POST", "/stats/reset")
        except ClientError as error:
            if error.status not in (401, 403):
                raise
            print("note: this key may not reset /stats: what they tell covers earlier work too", file=sys.stderr)

    async def is_there(self) -> bool:
        """Whether anything answers GET /health, be it that the server is loading or draining."""
        try:
            async with self._send("GET", "/health", None, PROBE_S):
                return True
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return False

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_S, timeout_s))
        return self._session.request(method, self.url + path, json=body, timeout=timeout)


class _Sent:
    """When a request left, in the clock's seconds: until it has, when the client set about it."""

    def __init__(self, now: float) -> None:
        self.at = now


async def _note_sent(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: Any) -> None:
    if isinstance(context.trace_request_ctx, _Sent):
        context.trace_request_ctx.at = time.perf_counter()


async def _object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        value = json.loads(await response.read())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _error_message(response: aiohttp.ClientResponse) -> str:
    error = (await _object(response)).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return _one_line(message or response.reason)


def _one_line(message: Any) -> str:
    return " ".join(str(message or "no reason given").split())
