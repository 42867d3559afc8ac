"""GET /steps and GET /events: the engine's step records (`batching/step_log.py`), as a list and as a live stream.

A viewer of the stream holds an HTTP thread, so there is a most of them. However many there are, together they are sent about
so many events a second and no more: with many, each gets fewer events with more records in each.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, current_app, request
from flask.sansio.blueprints import BlueprintSetupState

from api.errors import ApiError, bad
from api.waiting import HANG_UP_CHECK_S, hung_up
from batching.loop import BatchingLoop, Unavailable
from batching.step_log import KEPT, SCHEMA, StepLog
from config import MAX_VIEWERS

EVENTS_PER_S, EVENTS_PER_S_IN_ALL = 10, 50
MAX_RECORDS = 500  # an event's: a viewer that is behind catches up in a few
HEARTBEAT_S = 10.0
DEAD_AFTER_S = 30  # a viewer whose machine fell asleep acknowledges nothing
MAX_ID = 2**53

blueprint = Blueprint("watching", __name__)


class Viewers:
    """How many are watching."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Raises ApiError when there are too many."""
        with self._lock:
            if self.count >= self.most:
                told = f"{self.most} viewers are watching already, which is the most; GET /steps has the same records"
                raise ApiError(429, told, None, "too_many_viewers")
            self.count += 1

    def leave(self) -> None:
        with self._lock:
            self.count -= 1

    @property
    def pause_s(self) -> float:
        """Between two events of one viewer."""
        return max(1 / EVENTS_PER_S, self.count / EVENTS_PER_S_IN_ALL)


@blueprint.record_once
def _(state: BlueprintSetupState) -> None:
    state.app.extensions["viewers"] = Viewers(MAX_VIEWERS)


@blueprint.get("/steps")
def steps() -> Response:
    engine, log = _loop().ready_engine(), _loop().steps
    after, limit = _whole("after", 0, MAX_ID), _whole("limit", KEPT, KEPT)
    _, records = log.read(after, limit)
    head = json.dumps({"schema": SCHEMA, "slots": log.slots, "limits": asdict(engine.limits), "last": log.last})
    return Response(f'{head[:-1]}, "steps": [{",".join(records)}]}}\n', mimetype="application/json")


@blueprint.get("/events")
def events() -> Response:
    loop = _loop()
    log = loop.steps
    seen = request.headers.get("Last-Event-ID")
    after = _whole("after", log.last, MAX_ID) if seen is None else _check("Last-Event-ID", seen, MAX_ID)
    viewers: Viewers = current_app.extensions["viewers"]
    viewers.enter()
    connection = request.environ.get("gunicorn.socket")
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_AFTER_S)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = Response(_events(loop, log, after, viewers, connection), mimetype="text/event-stream", headers=headers)
    response.call_on_close(viewers.leave)
    return response


def _events(loop: BatchingLoop, log: StepLog, after: int, viewers: Viewers, connection: Any) -> Iterator[str]:
    """Records as they come. While there are none: how the engine stands, when that changes, and a comment now and then."""
    told, told_at = "", time.monotonic()
    while not loop.join(0):
        after, records = log.wait(after, MAX_RECORDS, HANG_UP_CHECK_S if told else 0)
        if records:
            yield f"id: {after}\ndata: [{','.join(records)}]\n\n"
            told, told_at = "records", time.monotonic()
            time.sleep(viewers.pause_s)
            continue
        if hung_up(connection):
            return
        try:
            now = json.dumps(_state(loop))
        except Unavailable:
            return
        if now != told:
            yield f"event: now\ndata: {now}\n\n"
            told, told_at = now, time.monotonic()
        elif time.monotonic() - told_at >= HEARTBEAT_S or (connection is not None and connection.sends_no_more):
            yield ": still here\n\n"
            told_at = time.monotonic()


def _state(loop: BatchingLoop) -> dict[str, Any]:
    """The engine as it stands, by the names that a record has."""
    state = loop.state()
    shown = {"queue": state["queue_depth"], "running": state["running"], "kv": round(state["kv_use"], 4)}
    since_reset = {"first_step": state["first_step"], "padding_share": state["padding_share"]}
    return {"mode": loop.mode["mode"]} | shown | since_reset


def _whole(name: str, default: int, most: int) -> int:
    text = request.args.get(name)
    return default if text is None else _check(name, text, most)


def _check(name: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise bad(name, f"must be a whole number between 0 and {most}, not {text[:60]!r}")
    return int(text)


def _loop() -> BatchingLoop:
    loop: BatchingLoop = current_app.extensions["batching"]
    return loop
