"""Every error of the server as JSON: {"error": {"message", "type", "param", "code"}}, with the status that fits."""

import contextlib
import logging
from codecs import BOM_UTF8
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from batching.request import RequestError
from jobs.errors import INSUFFICIENT_STORAGE, Conflict, JobError, NotFound, TooLarge

STATUS = {  # by RequestError.code; a refusal that is not listed is the caller's fault
    "queue_full": 429,
    "loading": 503,
    "draining": 503,
    "failed": 503,
    "deadline_exceeded": 504,
    "deadline_missed": 504,
    "step_failed": 500,
    "policy_failed": 500,
    "engine_failed": 500,
    "cancelled": 499,
}
JOB_STATUS: dict[type[JobError], int] = {NotFound: 404, Conflict: 409, TooLarge: 413}
TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
RETRY_AFTER_S = 1
MAX_DRAINED_BYTES = 64 << 20

log = logging.getLogger("batchlab")


class ApiError(Exception):
    """A fault of the call itself, found before it reached the engine."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def bad(param: str, message: str) -> ApiError:
    """A field that will not do: 400, naming the field and its limit."""
    return ApiError(400, f"{param}: {message}", param, "invalid_value")


def read_body() -> bytes:
    """The request's body, with or without a Content-Length; a byte order mark is none of it. Raises ApiError (400) or
    RequestEntityTooLarge (413)."""
    most = current_app.config["MAX_CONTENT_LENGTH"]
    if (request.content_length or 0) > most:
        raise RequestEntityTooLarge
    try:
        body: bytes = request.environ["wsgi.input"].read(most + 1)
    except Exception as error:  # gunicorn has many for what a client may send or leave out
        raise bad("body", f"cannot be read: {error}") from None
    if len(body) > most:
        raise RequestEntityTooLarge
    return body.removeprefix(BOM_UTF8)


def register(app: Flask) -> None:
    @app.before_request
    def _() -> None:
        encoding = request.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            told = f"Content-Encoding: {encoding[:60]} is not understood; send the body as it is"
            raise ApiError(415, told, "Content-Encoding", "unsupported_content_encoding")

    @app.errorhandler(ApiError)
    def _(error: ApiError) -> Response:
        return _answer(error.status, error.message, error.param, error.code)

    @app.errorhandler(RequestError)
    def _(error: RequestError) -> Response:
        return _answer(STATUS.get(error.code, 400), error.message, error.param, error.code)

    @app.errorhandler(JobError)
    def _(error: JobError) -> Response:
        status = JOB_STATUS.get(type(error), 507 if error.code == INSUFFICIENT_STORAGE else 500)
        if status >= 500:
            log.error("%s %s: %s", request.method, request.path, error.message)
        return _answer(status, error.message, error.param, error.code)

    @app.errorhandler(HTTPException)
    def _(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 413:
            limit = request.max_content_length  # the app's, unless the route set another
            return _answer(413, f"body: may be at most {limit} bytes", "body", "body_too_large")
        response = _answer(
            status, f"{request.method} {request.path}: {error.description}", None, error.name.lower().replace(" ", "_")
        )
        if status == 405 and (allowed := error.get_response().headers.get("Allow")):
            response.headers["Allow"] = allowed
        return response

    @app.errorhandler(Exception)
    def _(error: Exception) -> Response:
        log.exception("%s %s", request.method, request.path)
        message, _, param, code = _internal(error)
        return _answer(500, message, param, code)


def _answer(status: int, message: str, param: str | None, code: str | None) -> Response:
    _read_rest_of_body()
    kind = _type(status)
    response = jsonify(_body(message, kind, param, code))
    response.status_code = status
    if status in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 415:
        response.headers["Accept-Encoding"] = "identity"
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an error, where no response is to be made of it."""
    if isinstance(error, ApiError | RequestError):
        status = error.status if isinstance(error, ApiError) else STATUS.get(error.code, 400)
        return status, _body(error.message, _type(status), error.param, error.code)
    log.error("inside the server", exc_info=error)
    return 500, _body(*_internal(error))


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _internal(error: Exception) -> tuple[str, str, None, str]:
    return f"{type(error).__name__} inside the server; its log says more", _type(500), None, "internal_error"


def _type(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _read_rest_of_body() -> None:
    """A client that is still sending sees the answer only if its bytes are taken: else the connection is reset under it."""
    body = request.environ["wsgi.input"]
    left = min(request.content_length or MAX_DRAINED_BYTES, MAX_DRAINED_BYTES)
    with contextlib.suppress(Exception):
        while left > 0 and (chunk := body.read(min(left, 1 << 16))):
            left -= len(chunk)
