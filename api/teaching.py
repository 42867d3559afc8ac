"""The classroom's routes: POST /inference, GET /stats, POST /stats/reset, GET and PUT /mode, GET /health."""

from typing import Annotated, Any

from flask import Blueprint, Response, current_app, jsonify, request
from pydantic import Field

from api.auth import teacher_only
from api.bodies import Body, OneOf, check, read_json
from api.errors import ApiError, read_body
from api.inference_request import read_inference
from api.waiting import HANG_UP_CHECK_S, run_all
from batching.driver import describe_policy
from batching.loop import BatchingLoop, Health, Unavailable
from batching.policies import POLICIES
from batching.request import Request
from batching.view import Overdue
from config import Settings
from model.ending import Ending
from model.tokenizer import text_of

blueprint = Blueprint("teaching", __name__)


class ModeBody(Body):
    mode: Annotated[str, OneOf(POLICIES)]
    params: Annotated[dict[str, Any], Field(description="of the policy: GET /mode says which", examples=[{}])] = {}


@blueprint.post("/inference")
def inference() -> Response:
    loop = _loop()
    body = read_json(read_body())
    engine = loop.ready_engine()
    req = read_inference(body, engine, loop.clock())
    run_all(loop, [req], request.environ.get("gunicorn.socket"))
    return jsonify(_answer(req, body["prompt"]))


def _answer(req: Request, prompt: str) -> dict[str, Any]:
    assert isinstance(req.stop, Ending)
    text = text_of(req.stop.said(req.output, req.finish_reason))
    return {
        "completion": prompt + text,
        "num_tokens": len(req.output),
        "finish_reason": req.finish_reason,
        "ttft": req.server_ttft,
        "latency": req.e2el,
        "mode": req.mode,
    }


@blueprint.get("/stats")
def stats() -> Response:
    loop = _loop()
    about = loop.engine.about if loop.engine else {}
    return jsonify(loop.stats() | about | loop.mode | {"instance": current_app.config["INSTANCE"]})


@blueprint.post("/stats/reset")
@teacher_only
def reset_stats() -> Response:
    _loop().reset_stats()
    return jsonify({"status": "reset"})


@blueprint.get("/mode")
def get_mode() -> Response:
    return _mode(_loop().mode)


def _mode(mode: dict[str, Any]) -> Response:
    settings: Settings = current_app.extensions["settings"]
    return jsonify(mode | {"modes": {name: settings.params_of(name) for name in POLICIES}})


@blueprint.put("/mode")
@teacher_only
def put_mode() -> Response:
    loop, settings = _loop(), current_app.extensions["settings"]
    asked = check(ModeBody, read_json(read_body()))
    try:
        policy = loop.in_time(lambda: settings.make_policy(asked.mode, asked.params))
    except (ValueError, Overdue) as error:
        raise ApiError(400, f"params: {error}", "params", "invalid_value") from None
    taken_over = loop.switch(policy)
    while not taken_over.wait(HANG_UP_CHECK_S):
        if loop.join(0):
            break
    if loop.health is not Health.READY:
        raise Unavailable(loop.health.value, loop.reason)
    return _mode(describe_policy(policy))  # somebody else may have switched since


@blueprint.get("/health")
def health() -> tuple[Response, int]:
    loop = _loop()
    ready = loop.health is Health.READY
    return jsonify({"status": loop.health.value, "reason": loop.reason}), 200 if ready else 503


def _loop() -> BatchingLoop:
    loop: BatchingLoop = current_app.extensions["batching"]
    return loop
