"""/v1/batches as OpenAI has it: a file of requests, run when there is time, answered with files. Must not know who runs them:
it keeps what was asked for in the store, and wakes the runner."""

import re
from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from api.errors import ApiError, bad, read_body
from api.fields import instead, read_json
from api.lists import answer_page
from jobs.errors import NotFound
from jobs.records import Batch
from jobs.store import Store

FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
ENDPOINT = "/v1/completions"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 7 * SECONDS["d"]
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_LISTED, USUALLY_LISTED = 100, 20

blueprint = Blueprint("batches", __name__, url_prefix="/v1/batches")


@blueprint.post("")
def create() -> Response:
    body = read_json(read_body())
    for name in body:
        if name not in FIELDS:
            raise bad(name[:100], f"no such field; there are: {', '.join(FIELDS)}")
    window, window_s = _window(body)
    if body.get("endpoint") != ENDPOINT:
        raise bad("endpoint", f"must be {ENDPOINT}" + instead(body, "endpoint"))
    batch = _store().create_batch(_input_file(body), ENDPOINT, window, window_s, _metadata(body))
    current_app.extensions["runner"].wake()
    return jsonify(_shown(batch))


def _input_file(body: dict[str, Any]) -> str:
    id = body.get("input_file_id")
    if not isinstance(id, str) or not id.isascii():
        raise bad("input_file_id", "must be the id of a file" + instead(body, "input_file_id"))
    try:
        purpose = _store().file(id).purpose
    except NotFound as error:
        raise ApiError(404, f"input_file_id: {error.message}", "input_file_id", error.code) from None
    if purpose != "batch":
        raise bad("input_file_id", f"must be a file of the purpose batch; the purpose of {id} is {purpose}")
    return id


def _window(body: dict[str, Any]) -> tuple[str, int]:
    """The completion window as it was given, and its seconds."""
    text = body.get("completion_window")
    parts = re.fullmatch(r"([0-9]{1,6})([smhd])", text) if isinstance(text, str) else None
    seconds = int(parts[1]) * SECONDS[parts[2]] if parts else 0
    if not 1 <= seconds <= MAX_WINDOW_S:
        allowed = "must be 24h, or another whole number of s, m, h or d between 1s and 7d"
        raise bad("completion_window", allowed + instead(body, "completion_window"))
    return str(text), seconds


def _metadata(body: dict[str, Any]) -> dict[str, str]:
    pairs = {} if body.get("metadata") is None else body["metadata"]
    if not isinstance(pairs, dict) or len(pairs) > MAX_PAIRS:
        raise bad("metadata", f"must be a JSON object of at most {MAX_PAIRS} pairs")
    for key, value in pairs.items():
        if len(key) > MAX_KEY or not isinstance(value, str) or len(value) > MAX_VALUE:
            most = f"keys may have at most {MAX_KEY} characters, values must be texts of at most {MAX_VALUE}"
            raise bad("metadata", f"{most}; see {key[:MAX_KEY]!r}")
    return pairs


@blueprint.get("")
def list_batches() -> Response:
    return answer_page(_store().batches, _shown, USUALLY_LISTED, MAX_LISTED)


@blueprint.get("/<id>")
def get_batch(id: str) -> Response:
    return jsonify(_shown(_store().batch(id)))


@blueprint.post("/<id>/cancel")
def cancel(id: str) -> Response:
    batch = _store().cancel(id)
    current_app.extensions["runner"].wake()
    return jsonify(_shown(batch))


def _shown(batch: Batch) -> dict[str, Any]:
    errors = [asdict(error) for error in batch.errors]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": int(batch.expires_at),
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": asdict(batch.counts),
        "metadata": dict(batch.metadata),
    }


def _store() -> Store:
    store: Store = current_app.extensions["store"]
    return store
