"""The page at `/` and the way in to it: plain files that the browser runs as they are. Must not know the engine: the page
talks to the server's other routes, like any client.
"""

import gzip
from functools import cache
from importlib import resources

from flask import Blueprint, Response, current_app, jsonify, redirect, request, send_from_directory, url_for

from api.auth import COOKIE, give_cookie, is_known, is_teacher

STATIC = "static"
# Scripts come from here alone. Plotly writes styles into the page, and copies its charts through blob: images.
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
PLOTLY_MAX_AGE_S = 86400

blueprint = Blueprint("dashboard", __name__, static_folder=STATIC, static_url_path="/dashboard")


@blueprint.get("/")
def page() -> Response:
    return _page("index.html") if is_known() else _go("dashboard.login")


@blueprint.get("/docs")
def docs() -> Response:
    """The routes, to read."""
    return _page("docs.html") if is_known() else _go("dashboard.login")


@blueprint.get("/login")
def login() -> Response:
    return _page("login.html")


@blueprint.post("/login")
def log_in() -> Response:
    response = _go("dashboard.page")
    return response if give_cookie(response, request.form.get("key", "")) else _go("dashboard.login", wrong=1)


@blueprint.post("/logout")
def log_out() -> Response:
    response = _go("dashboard.login")
    response.delete_cookie(COOKIE, httponly=True, samesite="Strict")
    return response


@blueprint.get("/session")
def session() -> Response:
    """What the page may offer: whether this viewer may change the server, and whether there are keys to log in with."""
    keys = bool(current_app.config["API_KEY"] or current_app.config["TEACHER_KEY"])
    return jsonify({"teacher": is_teacher(), "keys": keys})


@blueprint.get("/dashboard/plotly.js")
def plotly() -> Response:
    """The plotting library, out of its Python package."""
    response = Response(_plotly(), mimetype="text/javascript")
    response.headers["Content-Encoding"] = "gzip"
    response.cache_control.max_age = PLOTLY_MAX_AGE_S
    response.add_etag()
    response.make_conditional(request)
    return response


@cache
def _plotly() -> bytes:
    return gzip.compress((resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes())


def _page(name: str) -> Response:
    response = send_from_directory(f"{blueprint.root_path}/{STATIC}", name)
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _go(endpoint: str, wrong: int | None = None) -> Response:
    return redirect(url_for(endpoint, wrong=wrong), 303)  # type: ignore[return-value]
