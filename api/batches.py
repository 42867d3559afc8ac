"""/v1/batches as OpenAI has it: a file of requests, run when there is time, answered with files. Must not know who runs them:
it keeps what was asked for in the store, and wakes the runner."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from flask import Blueprint, Response, current_app, jsonify
from pydantic import Field

from api.bodies import Body, Text, check, read_json
from api.errors import ApiError, bad, read_body
from api.lists import answer_page
from jobs.errors import NotFound
from jobs.records import Batch
from jobs.store import Store

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 7 * SECONDS["d"]
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_LISTED, USUALLY_LISTED = 100, 20

WINDOW = "24h, or another integer of s, m, h or d between 1s and 7d"
PAIRS = (
    f"a JSON object of at most {MAX_PAIRS} pairs, keys of at most {MAX_KEY} characters, values strings of at most {MAX_VALUE}"
)

blueprint = Blueprint("batches", __name__, url_prefix="/v1/batches")


class BatchBody(Body):
    input_file_id: Annotated[str, Field(pattern=r"^[\x00-\x7f]*$", title="the id of a file")]
    endpoint: Literal["/v1/completions"]
    completion_window: Annotated[str, Field(pattern="^[0-9]{1,6}[smhd]$", title=WINDOW, examples=["24h"])]
    metadata: Annotated[
        dict[Annotated[Text, Field(max_length=MAX_KEY)], Annotated[Text, Field(max_length=MAX_VALUE)]],
        Field(max_length=MAX_PAIRS, title=PAIRS),
    ] = {}


@blueprint.post("")
def create() -> Response:
    asked = check(BatchBody, read_json(read_body()))
    window_s = _seconds(asked.completion_window)
    _check_input(asked.input_file_id)
    batch = _store().create_batch(asked.input_file_id, asked.endpoint, asked.completion_window, window_s, dict(asked.metadata))
    current_app.extensions["runner"].wake()
    return jsonify(_shown(batch))


def _seconds(window: str) -> int:
    seconds = int(window[:-1]) * SECONDS[window[-1]]
    if not 1 <= seconds <= MAX_WINDOW_S:
        raise bad("completion_window", f"must be {WINDOW}, not {window!r}")
    return seconds


def _check_input(id: str) -> None:
    try:
        purpose = _store().file(id).purpose
    except NotFound as error:
        raise ApiError(404, f"input_file_id: {error.message}", "input_file_id", error.code) from None
    if purpose != "batch":
        raise bad("input_file_id", f"must be a file of the purpose batch; the purpose of {id} is {purpose}")


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
