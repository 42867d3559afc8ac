"""The HTTP side of the client: one class with the routes it uses, and the error that ends a run.

It must not know when a request is due, which thread it runs in, or what is made of its answer.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import requests
from report import Answer
from requests.auth import AuthBase
from workload import PlannedRequest

CONNECT_S = 10.0
PROBE_S = 5.0
CALL_S = 60.0
# A request, or a switch that waits for running ones, may take long on a slow machine; Ctrl-C ends it sooner.
PATIENT_S = 3600.0


class ClientError(Exception):
    """Ends the run; its text is the one line the user reads. ``status`` is the HTTP status where there is one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Server:
    """The HTTP contract, as the client uses it."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._auth = _Bearer(api_key)

    def infer(self, request: PlannedRequest, start: float) -> Answer:
        """POST /inference; never raises for what the network or the server does, but says so in ``error``."""
        sent_s = time.perf_counter() - start
        good: dict[str, Any] = {}
        error = message = ""
        try:
            response = self._send("POST", "/inference", request.body(), PATIENT_S)
            if response.status_code == 200:
                good = _object(response)
                if "completion" not in good:
                    error = "bad answer"
            else:
                error, message = str(response.status_code), _error_message(response)
        except requests.ReadTimeout:
            error = "timed out"
        except requests.RequestException:
            error = "connection lost"
        done_s = time.perf_counter() - start
        if error:
            return Answer(request, sent_s, done_s, error=error, message=message)
        return Answer(
            request,
            sent_s,
            done_s,
            tokens=int(_float(good.get("num_tokens")) or 0),
            completion=str(good["completion"]),
            finish_reason=str(good.get("finish_reason") or ""),
            server_ttft_s=_float(good.get("ttft")),
            server_latency_s=_float(good.get("latency")),
            mode=str(good.get("mode") or ""),
        )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = CALL_S) -> dict[str, Any]:
        """Any other route; its JSON object, empty where there is none. Raises ClientError with the line to show."""
        try:
            response = self._send(method, path, body, timeout_s)
        except requests.ConnectionError:
            text = f"no server answers at {self.url}: is it running, and is IP in client/.env (or --url) right?"
            raise ClientError(text) from None
        except requests.ReadTimeout:
            raise ClientError(f"{method} {self.url}{path}: no answer within {timeout_s:.0f} s") from None
        except requests.RequestException as error:
            raise ClientError(f"{method} {self.url}{path} failed: {error}") from None
        status = response.status_code
        if status == 401:
            text = f"the server does not accept the key (401: {_error_message(response)}): set API_KEY in client/.env"
            raise ClientError(text, status)
        if status >= 400:
            raise ClientError(f"{method} {path}: the server answered {status}: {_error_message(response)}", status)
        return _object(response)

    def switch(self, mode: str) -> None:
        """PUT /mode; returns once the new policy has taken over, which waits for running requests."""
        self.call("PUT", "/mode", {"mode": mode}, PATIENT_S)

    def reset_stats(self) -> None:
        """POST /stats/reset; a server that leaves this to the teacher is still measured, with a word of warning."""
        try:
            self.call("POST", "/stats/reset")
        except ClientError as error:
            if error.status not in (401, 403):
                raise
            print("note: this key may not reset /stats: what they tell covers earlier work too", file=sys.stderr)

    def is_there(self) -> bool:
        """Whether anything answers GET /health, be it that the server is loading or draining."""
        try:
            self._send("GET", "/health", None, PROBE_S)
        except requests.RequestException:
            return False
        return True

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> requests.Response:
        # No requests object shared between the threads: the library does not promise that one is safe to share.
        timeouts = (min(CONNECT_S, timeout_s), timeout_s)
        return requests.request(method, self.url + path, json=body, auth=self._auth, timeout=timeouts)


class _Bearer(AuthBase):
    """An auth object and no plain header, which requests would replace by an entry in the user's ~/.netrc."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def _object(response: requests.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _error_message(response: requests.Response) -> str:
    error = _object(response).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or response.reason or "no reason given").split())


def _float(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
