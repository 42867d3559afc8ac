"""Bearer keys: the API key guards everything but /health; where a teacher key is set, only it may change the server."""

import hmac
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Flask, current_app, request

from api.errors import ApiError


def register(app: Flask, api_key: str, teacher_key: str) -> None:
    app.config["API_KEY"] = api_key
    app.config["TEACHER_KEY"] = teacher_key

    @app.before_request
    def _() -> None:
        if api_key and request.path != "/health" and not (_has(api_key) or _has(teacher_key)):
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'", None, "invalid_api_key")


def teacher_only(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        teacher_key = current_app.config["TEACHER_KEY"]
        if teacher_key and not _has(teacher_key):
            raise ApiError(403, "only the teacher's key may do this", None, "teacher_key_needed")
        return view(*args, **kwargs)

    return guarded


def _has(key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return bool(key) and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
