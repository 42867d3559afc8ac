"""Every error of the server as JSON: {"error": {"message", "type", "param", "code"}}, with the status that fits."""

import json
import logging
from codecs import BOM_UTF8
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

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
    """The request's body; a byte order mark is none of it. Raises RequestEntityTooLarge (413)."""
    return request.get_data(cache=False).removeprefix(BOM_UTF8)


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
            return _answer(413, f"body: {_body_limit()}", "body", "body_too_large")
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


def _body_limit() -> str:
    """The one of werkzeug's limits that was hit; they are the app's, unless the route set another."""
    if (request.content_length or 0) > (most := request.max_content_length or 0):
        return f"may be at most {most} bytes, not {request.content_length}"
    fields = f"{request.max_form_memory_size} bytes in fields that are no file"
    return f"a form may have at most {request.max_form_parts} parts, and {fields}"


def _answer(status: int, message: str, param: str | None, code: str | None) -> Response:
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


def raw_answer(status: int, message: str, code: str) -> bytes:
    """A whole response, where there is no application to make one: the connection ends after it."""
    body = json.dumps(_body(message, _type(status), None, code)).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _internal(error: Exception) -> tuple[str, str, None, str]:
    return f"{type(error).__name__} inside the server; its log says more", _type(500), None, "internal_error"


def _type(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
