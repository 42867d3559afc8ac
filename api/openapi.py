"""GET /openapi.json: every route as OpenAPI 3.1 describes it. The bodies are those models by which they are checked, with the
limits of the engine that is loaded; a test walks the app's routes, so that none is left out. `/docs` shows it to people.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flask import Blueprint, Response, current_app, jsonify
from pydantic import TypeAdapter

from api import answers
from api.auth import COOKIE, OPEN
from api.batches import MAX_LISTED, USUALLY_LISTED, BatchBody
from api.bodies import Schema, WithoutTitles, limits_of, with_limit
from api.burst import BurstBody
from api.completion_request import CompletionBody
from api.files import MAX_LISTED as MAX_FILES_LISTED
from api.inference_request import InferenceBody
from api.teaching import ModeBody
from api.watching import MAX_ID
from batching.loop import BatchingLoop
from batching.step_log import KEPT
from config import VERSION

DESCRIPTION = (
    'A teaching server for LLM batching. Errors are `{"error": {message, type, param, code}}`. Before a route is looked at, a '
    "request that cannot be read is a 400, 408 (too slow), 431 (its head is too large) or 503 (too much at once)."
)
COMPONENTS = "#/components/schemas/"
MEANINGS = {
    303: "to another page",
    304: "the browser has it already",
    400: "a field is missing, unknown, or not what it may be: `param` names it, `message` its limit",
    401: "an API key is needed",
    403: "for the teacher's key, sent by a page of another site, or to a host that is not the server's",
    404: "there is none such",
    408: "the request came too slowly",
    409: "not in its present state",
    413: "the body is too large: `message` says how large it may be",
    415: "the body has a Content-Encoding",
    429: "too many at once; Retry-After says when to come again",
    499: "cancelled, since the client hung up",
    500: "a step or a policy failed; the server goes on",
    503: "loading, shutting down, or failed",
    504: "its deadline passed, or cannot be met",
    507: "the disk is full",
}
WAITING = (429, 499, 500, 503, 504)  # what may become of a request to the engine

blueprint = Blueprint("openapi", __name__)


@dataclass(frozen=True)
class Route:
    """What the app itself does not know of a route. `answer`: a type, for JSON, or media types."""

    tag: str
    summary: str
    answer: Any
    body: Any = None
    errors: tuple[int, ...] = ()
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    form: tuple[str, Schema] | None = None  # a body that is no JSON: its media type
    status: int = 200
    stream: bool = False  # server-sent events, where the body asks for them


def _whole(low: int, high: int, default: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high} | ({} if default is None else {"default": default})


HTML, EVENTS = "text/html", "text/event-stream"
AFTER = {"type": "string", "description": "the last id of the page before"}
KEY_FORM = {"type": "object", "properties": {"key": {"type": "string"}}}
FILE_FORM = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    "required": ["file", "purpose"],
}
ROUTES = {  # by endpoint
    "teaching.inference": Route(
        "Teaching", "Continue a prompt", answers.InferenceAnswer, InferenceBody, WAITING
    ),
    "teaching.stats": Route("Teaching", "What was measured since the last reset", answers.StatsAnswer, errors=(503,)),
    "teaching.reset_stats": Route("Teaching", "Begin the statistics anew", answers.ResetAnswer, errors=(503,)),
    "teaching.get_mode": Route("Teaching", "The mode, and all there are", answers.ModeAnswer, errors=(503,)),
    "teaching.put_mode": Route(
        "Teaching", "Switch the mode; answered when the new one has taken over", answers.ModeAnswer, ModeBody, (503,)
    ),
    "teaching.health": Route("Teaching", "Is the server ready?", answers.HealthAnswer, errors=(503,)),
    "burst.burst": Route("Teaching", "Many requests at once, to watch", answers.BurstAnswer, BurstBody, (503,)),
    "burst.call_off": Route("Teaching", "Call all bursts off", answers.CalledOffAnswer, errors=(503,)),
    "watching.steps": Route(
        "Watching", "The engine's step records", answers.StepsAnswer, errors=(400, 503),
        query={"after": _whole(0, MAX_ID, 0), "limit": _whole(0, KEPT, KEPT)},
    ),
    "watching.events": Route(
        "Watching", "The same records live, as server-sent events", EVENTS, errors=(400, 429, 503),
        query={"after": _whole(0, MAX_ID)}, headers={"Last-Event-ID": _whole(0, MAX_ID)},
    ),
    "metrics.metrics": Route("Watching", "For Prometheus", "text/plain", errors=(503,)),
    "openai.models": Route("OpenAI", "The model that is served", answers.ModelsAnswer, errors=(503,)),
    "openai.model": Route("OpenAI", "A model by its name", answers.ModelFacts, errors=(404, 503)),
    "openai.completions": Route(
        "OpenAI", "Continue one prompt or several", answers.CompletionAnswer, CompletionBody, (404, *WAITING), stream=True
    ),
    "openai.chat": Route("OpenAI", "Always 404: GPT-2 is no chat model", answers.ErrorAnswer, status=404),
    "files.upload": Route(
        "Batches", "Upload a file of requests", answers.FileFacts, errors=(400, 413, 507),
        form=("multipart/form-data", FILE_FORM),
    ),
    "files.list_files": Route(
        "Batches", "The files", answers.FilesAnswer, errors=(400, 404),
        query={
            "purpose": {"type": "string"}, "order": {"enum": ["asc", "desc"], "default": "desc"}, "after": AFTER,
            "limit": _whole(1, MAX_FILES_LISTED, MAX_FILES_LISTED),
        },
    ),
    "files.get_file": Route("Batches", "A file", answers.FileFacts, errors=(404,)),
    "files.get_content": Route("Batches", "What is in a file", "application/octet-stream", errors=(404,)),
    "files.delete_file": Route("Batches", "Delete a file", answers.DeletedAnswer, errors=(404, 409)),
    "batches.create": Route("Batches", "Run a file of requests", answers.BatchFacts, BatchBody, (404, 503, 507)),
    "batches.list_batches": Route(
        "Batches", "The batches", answers.BatchesAnswer, errors=(400, 404),
        query={"after": AFTER, "limit": _whole(1, MAX_LISTED, USUALLY_LISTED)},
    ),
    "batches.get_batch": Route("Batches", "A batch", answers.BatchFacts, errors=(404,)),
    "batches.cancel": Route("Batches", "Cancel a batch", answers.BatchFacts, errors=(404, 409)),
    "dashboard.page": Route("Pages", "The dashboard; to /login where a key is needed", HTML, errors=(303,)),
    "dashboard.docs": Route("Pages", "These routes, to read; to /login where a key is needed", HTML, errors=(303,)),
    "dashboard.login": Route("Pages", "The login page", HTML),
    "dashboard.log_in": Route(
        "Pages", "Trade a key for a cookie", HTML, errors=(413,), status=303,
        form=("application/x-www-form-urlencoded", KEY_FORM),
    ),
    "dashboard.log_out": Route("Pages", "Forget the cookie", HTML, status=303),
    "dashboard.session": Route("Pages", "What this viewer may do", answers.SessionAnswer),
    "dashboard.plotly": Route("Pages", "The plotting library", "text/javascript", errors=(304,)),
    "dashboard.static": Route("Pages", "A file of the pages", "*/*", errors=(304, 404)),
    "openapi.document": Route("Pages", "This description", {"type": "object"}),
}  # fmt: skip


@blueprint.get("/openapi.json")
def document() -> Response:
    loop: BatchingLoop = current_app.extensions["batching"]
    rules = tuple(
        (rule.rule, method.lower(), rule.endpoint)
        for rule in current_app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    )
    return jsonify(describe(rules, tuple(limits_of(loop.engine).items()) if loop.engine else ()))


@cache
def describe(rules: tuple[tuple[str, str, str], ...], limits: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """The whole document. `rules`: path as Flask has it, method, endpoint. Raises ValueError for one that ROUTES lacks."""
    types = {kind for route in ROUTES.values() for kind in (route.answer, route.body) if isinstance(kind, type)}
    types.add(answers.ErrorAnswer)
    wanted: list[Any] = [
        (kind.__name__, "validation", TypeAdapter(kind)) for kind in sorted(types, key=lambda one: one.__name__)
    ]
    template = COMPONENTS + "{model}"
    refs, shared = TypeAdapter.json_schemas(wanted, ref_template=template, schema_generator=WithoutTitles)
    schemas = {name: schema for (name, _), schema in refs.items() if "$ref" not in schema} | shared.get("$defs", {})
    paths: dict[str, dict[str, Any]] = {}
    order = list(ROUTES)
    for rule, method, endpoint in sorted(rules, key=lambda rule: order.index(rule[2])):
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)
        names = re.findall(r"{(\w+)}", path)
        paths.setdefault(path, {})[method] = _operation(ROUTES[endpoint], endpoint, names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "BatchLab",
            "version": VERSION,
            "description": DESCRIPTION,
        },
        "paths": paths,
        "components": {
            "schemas": _filled(schemas, dict(limits)),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "--api-key or --teacher-key, where set"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "from POST /login"},
            },
        },
    }


def _operation(route: Route, endpoint: str, names: list[str]) -> dict[str, Any]:
    errors = {*route.errors, 403}
    if endpoint not in OPEN:
        errors.add(401)
    if route.body:
        errors |= {400, 413}
    if route.body or route.form:
        errors |= {408, 415}
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    for place, found in (("query", route.query), ("header", route.headers)):
        parameters += [{"name": name, "in": place, "schema": schema} for name, schema in found.items()]
    operation: dict[str, Any] = {
        "operationId": endpoint,
        "tags": [route.tag],
        "summary": route.summary,
        "security": [] if endpoint in OPEN else [{"key": []}, {"cookie": []}],
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(route.body)}}}
    if route.form:
        media, schema = route.form
        operation["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
    operation["responses"] = {str(route.status): _answer(route, endpoint)} | {
        str(status): _error(status, endpoint) for status in sorted(errors - {route.status})
    }
    return operation


def _answer(route: Route, endpoint: str) -> dict[str, Any]:
    if isinstance(route.answer, str):
        content: dict[str, Any] = {route.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _ref(route.answer)}}
    if route.stream:
        content[EVENTS] = {"schema": {"type": "string", "description": "`data:` and a piece of the answer; at last [DONE]"}}
    return {"description": MEANINGS.get(route.status, "as asked"), "content": content}


def _error(status: int, endpoint: str) -> dict[str, Any]:
    told: dict[str, Any] = {"description": MEANINGS[status]}
    if status in (303, 304):
        return told
    kind = answers.HealthAnswer if endpoint == "teaching.health" else answers.ErrorAnswer
    return told | {"content": {"application/json": {"schema": _ref(kind)}}}


def _ref(kind: Any) -> Schema:
    return {"$ref": COMPONENTS + kind.__name__} if isinstance(kind, type) else kind


def _filled(schema: Any, limits: Mapping[str, int]) -> Any:
    if isinstance(schema, list):
        return [_filled(one, limits) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _filled(value, limits) for key, value in with_limit(schema, limits).items()}
