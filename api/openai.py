"""OpenAI's routes over the same engine: /v1/models and /v1/completions, plain and streamed."""

import json
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from api.bodies import read_json
from api.completion import Completion
from api.completion_request import read_completion
from api.errors import ApiError, describe, read_body
from api.waiting import as_they_grow, run_all
from batching.loop import BatchingLoop
from batching.request import RequestError

blueprint = Blueprint("openai", __name__, url_prefix="/v1")


@blueprint.get("/models")
def models() -> Response:
    return jsonify({"object": "list", "data": list(map(_model, _loop().ready_engine().served_names))})


@blueprint.get("/models/<path:name>")
def model(name: str) -> Response:
    names = _loop().ready_engine().served_names
    if name not in names:
        raise ApiError(404, f"there is no model {name[:60]!r}; this server has {', '.join(names)}", "model", "model_not_found")
    return jsonify(_model(name))


@blueprint.post("/completions")
def completions() -> Response:
    loop = _loop()
    body = read_json(read_body())
    call = read_completion(body, loop.ready_engine(), loop.clock())
    connection = request.environ.get("gunicorn.socket")
    if not call.stream:
        run_all(loop, call.requests, connection)
        return jsonify(call.answer())
    news = as_they_grow(loop, call.requests, connection)
    next(news, None)  # what fails before the first token gets the status that it deserves
    first = list(call.news())
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(_events(call, first, news), mimetype="text/event-stream", headers=headers)


def _events(call: Completion, first: list[dict[str, Any]], news: Iterator[None]) -> Iterator[str]:
    """Server-sent events. An error ends the stream as an event of its own, which OpenAI's clients raise."""
    try:
        for chunk in first:
            yield _event(chunk)
        for _ in news:
            for chunk in call.news():
                yield _event(chunk)
        for chunk in call.last():
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(describe(error)[1])
    finally:
        news.close()  # type: ignore[attr-defined]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@blueprint.post("/chat/completions")
def chat() -> Response:
    told = "GPT-2 is no chat model: it continues text. Use POST /v1/completions with a prompt."
    raise ApiError(404, told, None, "not_a_chat_model")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": current_app.config["CREATED"], "owned_by": "batchlab"}


def _loop() -> BatchingLoop:
    loop: BatchingLoop = current_app.extensions["batching"]
    return loop
