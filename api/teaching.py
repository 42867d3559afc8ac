"""The classroom's routes: POST /inference, GET /stats, POST /stats/reset, GET and PUT /mode, GET /health."""

import socket
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from api.auth import teacher_only
from api.errors import ApiError, bad, read_body
from api.inference_request import read_inference, read_json
from batching.loop import BatchingLoop, Health, Ticket, Unavailable
from batching.policies import POLICIES
from batching.request import Request
from config import Settings
from model.tokenizer import StopStrings, Tokenizer

HANG_UP_CHECK_S = 1.0

blueprint = Blueprint("teaching", __name__)


@blueprint.post("/inference")
def inference() -> Response:
    loop = _loop()
    body = read_json(read_body())
    engine = loop.engine
    if engine is None or loop.health is not Health.READY:
        raise Unavailable(loop.health.value, loop.reason)
    tokenizer: Tokenizer = engine.tokenizer
    req = read_inference(body, tokenizer, engine.limits, loop.clock())
    _wait(loop, loop.submit(req))
    if req.error is not None:
        raise req.error
    return jsonify(_answer(req, body["prompt"], tokenizer))


def _answer(req: Request, prompt: str, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode(req.output)
    if isinstance(req.stop, StopStrings):
        text = req.stop.cut(text)
    return {
        "completion": prompt + text,
        "num_tokens": len(req.output),
        "finish_reason": req.finish_reason,
        "ttft": req.token_times[0] - req.arrival,
        "latency": (req.answered_at or 0.0) - req.arrival,
        "mode": req.mode,
    }


def _wait(loop: BatchingLoop, ticket: Ticket) -> None:
    """Sleep on the request's own Event; about once a second see whether somebody still waits for the answer."""
    cancelled = False
    while not ticket.event.wait(HANG_UP_CHECK_S):
        if not cancelled and _hung_up():
            loop.cancel(ticket)
            cancelled = True


def _hung_up() -> bool:
    """Whether the client has closed its connection (gunicorn hands its socket down)."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@blueprint.get("/stats")
def stats() -> Response:
    loop = _loop()
    about = loop.engine.about if loop.engine else {}
    return jsonify(loop.stats() | about | loop.mode)


@blueprint.post("/stats/reset")
@teacher_only
def reset_stats() -> Response:
    _loop().reset_stats()
    return jsonify({"status": "reset"})


@blueprint.get("/mode")
def get_mode() -> Response:
    settings: Settings = current_app.extensions["settings"]
    modes = {name: vars(settings.make_policy(name, {}).params) for name in POLICIES}
    return jsonify(_loop().mode | {"modes": modes})


@blueprint.put("/mode")
@teacher_only
def put_mode() -> Response:
    loop, settings = _loop(), current_app.extensions["settings"]
    body = read_json(read_body())
    for name in body:
        if name not in ("mode", "params"):
            raise bad(str(name)[:100], "no such field; there are: mode, params")
    mode, params = body.get("mode"), body.get("params", {})
    if not isinstance(mode, str) or mode not in POLICIES:
        raise bad("mode", f"must be one of {', '.join(POLICIES)}, not {str(mode)[:60]!r}")
    if not isinstance(params, dict):
        raise bad("params", f"must be a JSON object, not {type(params).__name__}")
    try:
        policy = settings.make_policy(mode, params)
    except ValueError as error:
        raise ApiError(400, f"params: {error}", "params", "invalid_value") from None
    taken_over = loop.switch(policy)
    while not taken_over.wait(HANG_UP_CHECK_S):
        if loop.join(0):
            break
    if loop.health is not Health.READY:
        raise Unavailable(loop.health.value, loop.reason)
    return get_mode()


@blueprint.get("/health")
def health() -> tuple[Response, int]:
    loop = _loop()
    ready = loop.health is Health.READY
    return jsonify({"status": loop.health.value, "reason": loop.reason}), 200 if ready else 503


def _loop() -> BatchingLoop:
    loop: BatchingLoop = current_app.extensions["batching"]
    return loop
