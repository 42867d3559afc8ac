"""/v1/files as OpenAI has it: what goes into batches, and what comes out of them. Must not know how files are kept."""

import tempfile
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from werkzeug.wsgi import wrap_file

from api.errors import bad
from api.lists import answer_page
from jobs.errors import storage_errors
from jobs.records import File
from jobs.store import Store

MAX_FILE_BYTES = 200 << 20
FORM_BYTES = 64 << 10  # what a form has around its file
CHUNK_BYTES = 64 << 10
MAX_LISTED = 10_000

blueprint = Blueprint("files", __name__, url_prefix="/v1/files")


@blueprint.post("")
def upload() -> Response:
    request.max_content_length = MAX_FILE_BYTES + FORM_BYTES
    with storage_errors(Path(tempfile.gettempdir())):  # where Flask keeps a large upload until it is read
        fields = [*request.form, *request.files]
    for name in fields:
        if name not in ("file", "purpose"):
            raise bad(str(name or "form")[:100], "unknown field; allowed: file, purpose")
    if request.form.getlist("purpose") != ["batch"]:
        raise bad("purpose", "must be batch, a field of a multipart form")
    if len(uploads := request.files.getlist("file")) != 1:
        raise bad("file", "must be one file, with a filename")
    stream, filename = uploads[0].stream, uploads[0].filename or "unnamed"
    chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
    return jsonify(_shown(_store().add_file(chunks, filename, "batch", MAX_FILE_BYTES)))


@blueprint.get("")
def list_files() -> Response:
    purpose, order = request.args.get("purpose"), request.args.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad("order", f"must be asc or desc, not {order[:60]!r}")
    return answer_page(lambda after, limit: _store().files(purpose, after, limit, order), _shown, MAX_LISTED, MAX_LISTED)


@blueprint.get("/<id>")
def get_file(id: str) -> Response:
    return jsonify(_shown(_store().file(id)))


@blueprint.get("/<id>/content")
def get_content(id: str) -> Response:
    file = _store().file(id)
    content = wrap_file(request.environ, _store().open_file(id))
    response = Response(content, mimetype="application/octet-stream", direct_passthrough=True)
    response.content_length = file.bytes
    return response


@blueprint.delete("/<id>")
def delete_file(id: str) -> Response:
    _store().delete_file(id)
    return jsonify({"id": id, "object": "file", "deleted": True})


def _shown(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",  # deprecated, and yet the openai package wants it
    }


def _store() -> Store:
    store: Store = current_app.extensions["store"]
    return store
