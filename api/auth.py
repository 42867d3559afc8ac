"""Keys: the API key guards everything but what is open to all; where a teacher key is set, only it may change the server.

A program shows its key as a bearer; a browser shows it once and then has a cookie, since `EventSource` sends no header. The
cookie is made from the key and does not tell it. What a page of another site makes a browser send changes nothing here.
"""

import hmac
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Flask, Response, current_app, request

from api.errors import ApiError

OPEN = (  # endpoints
    "teaching.health", "dashboard.page", "dashboard.docs", "dashboard.login", "dashboard.log_in", "dashboard.static",
)  # fmt: skip
COOKIE = "batchlab"
SAFE = ("GET", "HEAD", "OPTIONS")


def register(app: Flask, api_key: str, teacher_key: str) -> None:
    app.config["API_KEY"] = api_key
    app.config["TEACHER_KEY"] = teacher_key

    @app.before_request
    def _() -> None:
        if api_key and request.endpoint not in OPEN and not is_known():
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'", None, "invalid_api_key")
        if request.method not in SAFE and not _is_our_page():
            raise ApiError(403, "a page of another site may not do this", None, "cross_site")


def teacher_only(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not is_teacher():
            raise ApiError(403, "only the teacher's key may do this", None, "teacher_key_needed")
        return view(*args, **kwargs)

    return guarded


def is_known() -> bool:
    """Whether the caller may use the server at all."""
    keys = current_app.config["API_KEY"], current_app.config["TEACHER_KEY"]
    return not keys[0] or any(_has(key) for key in keys)


def is_teacher() -> bool:
    """Whether the caller may change it for everybody."""
    teacher_key = current_app.config["TEACHER_KEY"]
    return not teacher_key or _has(teacher_key)


def give_cookie(response: Response, key: str) -> bool:
    """The cookie for one of the two keys; False, and none, for any other text."""
    for known in (current_app.config["TEACHER_KEY"], current_app.config["API_KEY"]):
        if known and _same(key, known):
            response.set_cookie(COOKIE, _token(known), httponly=True, samesite="Strict", secure=request.is_secure)
            return True
    return False


def _has(key: str) -> bool:
    if not key:
        return False
    return _same(_bearer(), key) or _same(request.cookies.get(COOKIE, ""), _token(key))


def _bearer() -> str:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def _is_our_page() -> bool:
    """A browser says from which page a request that changes something comes. Programs say nothing, and have no cookie."""
    origin = request.headers.get("Origin")
    if _bearer() or (origin is None and COOKIE not in request.cookies):
        return True
    _, scheme, host = (origin or "").lower().partition("://")
    return bool(scheme) and host == request.headers.get("Host", "").lower()


def _token(key: str) -> str:
    return hmac.new(key.encode(), b"batchlab's cookie", "sha256").hexdigest()


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(), key.encode())
