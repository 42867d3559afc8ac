"""The way in by cookie, for browsers: who has shown a key is known, and pages of other sites can do nothing with it."""

from collections.abc import Callable

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from .conftest import Server

BURST = {"requests": 1, "prompt_tokens": 2, "num_tokens": 1}
OURS = {"Origin": "http://localhost"}


def log_in(client: FlaskClient, key: str, **headers: str) -> TestResponse:
    return client.post("/login", data={"key": key}, headers=OURS | headers)


@pytest.fixture
def guarded(serve: Callable[..., Server]) -> FlaskClient:
    return serve(api_key="class", teacher_key="chalk").client


def test_without_a_key_a_browser_is_led_to_the_login_page(guarded: FlaskClient) -> None:
    response = guarded.get("/")
    assert (response.status_code, response.location) == (303, "/login")
    assert guarded.get("/login").status_code == 200
    for path in ("/steps", "/events", "/session", "/stats", "/mode", "/dashboard/plotly.js"):
        assert guarded.get(path).status_code == 401, path


def test_a_key_buys_a_cookie_that_scripts_and_other_sites_do_not_get(guarded: FlaskClient) -> None:
    response = log_in(guarded, "class")
    assert (response.status_code, response.location) == (303, "/")
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "class" not in cookie, "it does not tell the key"
    assert guarded.get("/").status_code == 200
    with guarded.get("/events") as stream:
        assert stream.status_code == 200


def test_a_wrong_key_buys_nothing(guarded: FlaskClient) -> None:
    response = log_in(guarded, "clasp")
    assert response.location == "/login?wrong=1"
    assert "Set-Cookie" not in response.headers
    assert guarded.get("/steps").status_code == 401


def test_a_made_up_cookie_opens_nothing(guarded: FlaskClient) -> None:
    for value in ("class", "chalk", "", "0" * 64, "ä"):
        guarded.set_cookie("batchlab", value)
        assert guarded.get("/steps").status_code == 401


def test_students_watch_and_the_teacher_switches(guarded: FlaskClient) -> None:
    log_in(guarded, "class")
    assert guarded.get("/session").get_json() == {"teacher": False, "keys": True}
    assert guarded.post("/burst", json=BURST, headers=OURS).status_code == 403
    assert guarded.put("/mode", json={"mode": "orca"}, headers=OURS).status_code == 403
    log_in(guarded, "chalk")
    assert guarded.get("/session").get_json() == {"teacher": True, "keys": True}
    assert guarded.post("/burst", json=BURST, headers=OURS).status_code == 200
    assert guarded.put("/mode", json={"mode": "orca"}, headers=OURS).status_code == 200


def test_a_teacher_key_alone_lets_everybody_watch(serve: Callable[..., Server]) -> None:
    client = serve(teacher_key="chalk").client
    assert client.get("/").status_code == client.get("/steps").status_code == 200
    assert client.get("/session").get_json() == {"teacher": False, "keys": True}


def test_without_keys_everybody_may_switch(server: Server) -> None:
    assert server.client.get("/session").get_json() == {"teacher": True, "keys": False}


@pytest.mark.parametrize(
    "origin", ["http://elsewhere.example", "null", "http://localhost:99", "http://localhost.example", None]
)
def test_a_cookie_changes_nothing_from_a_page_of_another_site(guarded: FlaskClient, origin: str | None) -> None:
    log_in(guarded, "chalk")
    headers = {} if origin is None else {"Origin": origin}
    for response in (
        guarded.post("/burst", json=BURST, headers=headers),
        guarded.put("/mode", json={"mode": "orca"}, headers=headers),
        guarded.post("/logout", headers=headers),
    ):
        assert response.status_code == 403
        assert response.get_json()["error"]["code"] == "cross_site"
    assert guarded.get("/mode").get_json()["mode"] == "dynamic"


def test_without_keys_too_a_page_of_another_site_can_do_nothing(server: Server) -> None:
    elsewhere = {"Origin": "http://elsewhere.example"}
    assert server.client.post("/burst", json=BURST, headers=elsewhere).status_code == 403
    assert server.client.post("/burst", json=BURST, headers=OURS).status_code == 200
    assert server.client.post("/burst", json=BURST).status_code == 200, "a program names no page"


def test_a_bearer_needs_no_page(guarded: FlaskClient) -> None:
    headers = {"Authorization": "Bearer chalk", "Origin": "http://elsewhere.example"}
    assert guarded.post("/burst", json=BURST, headers=headers).status_code == 200


def test_who_logs_out_is_unknown_again(guarded: FlaskClient) -> None:
    log_in(guarded, "class")
    assert guarded.post("/logout", headers=OURS).location == "/login"
    assert guarded.get("/steps").status_code == 401
