"""What will not do is refused with an error that names the field and its limit, and the server goes on."""

import gzip
import json
from codecs import BOM_UTF8
from typing import Any

import pytest
from werkzeug.test import TestResponse

from .conftest import Server

GOOD = {"prompt": "The king", "num_tokens": 1}
LEFT_OUT = object()
HUGE = 10**400  # a whole number of JSON that no float can hold


def error_of(response: TestResponse) -> dict[str, Any]:
    error: dict[str, Any] = response.get_json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


def check_refused(server: Server, body: bytes, param: str, limit: str) -> None:
    response = server.client.post("/inference", data=body)
    assert response.status_code == 400, response.get_json()
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert limit in error["message"]
    assert len(error["message"]) < 400
    assert server.ask().status_code == 200


FIELDS = [
    *(("prompt", value, "at least one character") for value in (LEFT_OUT, "", None, 5, True, ["a"], {"a": 1})),
    *(("num_tokens", value, "between 1 and ") for value in (LEFT_OUT, 0, -1, True, 1.5, "5", None, [1], 10**9, HUGE)),
    *(("priority", value, "immediate, deferred") for value in ("urgent", "", 5, True, ["immediate"], {})),
    *(("temperature", value, "between 0 and 2") for value in (-1, 2.1, float("nan"), float("inf"), -float("inf"))),
    *(("temperature", value, "between 0 and 2") for value in ("1", True, [1], {}, HUGE, -HUGE)),
    *(("top_p", value, "and 1") for value in (0, 2, -1, float("nan"), "1", True, [], HUGE)),
    *(("top_k", value, "between -1 and ") for value in (-2, 1.5, "1", True, [], 10**9)),
    *(
        ("seed", value, f"between {-(2**63)} and {2**63 - 1}")
        for value in (-(2**63) - 1, 2**63, 1.5, "1", True, [], float("nan"))
    ),
    *(("stop", value, "at most 4") for value in (list("abcde"), "", [""], ["a", ""], 5, True, {"a": 1}, [5], [None])),
    ("stop", "x" * 101, "100 characters"),
    *(("deadline_s", value, "between 0.001 and ") for value in (0, -1, float("nan"), float("inf"), "1", True, [], HUGE)),
    ("max_tokens", 5, "num_tokens"),
]


@pytest.mark.parametrize(("field", "value", "limit"), FIELDS, ids=[f"{f}-{str(v)[:12]}" for f, v, _ in FIELDS])
def test_a_field_that_will_not_do_is_named_with_its_limit(server: Server, field: str, value: Any, limit: str) -> None:
    body = {name: given for name, given in (GOOD | {field: value}).items() if given is not LEFT_OUT}
    check_refused(server, json.dumps(body).encode(), field, limit)


def test_null_says_as_much_as_leaving_a_field_out(server: Server) -> None:
    names = ("priority", "temperature", "top_k", "top_p", "seed", "stop", "deadline_s", "no_such_field")
    assert server.ask(**dict.fromkeys(names)).status_code == 200


def test_a_whole_number_may_be_written_with_a_point(server: Server) -> None:
    answers = [server.ask(num_tokens=n, seed=s, top_k=k).get_json() for n, s, k in ((3, 5, 40), (3.0, 5.0, 40.0))]
    assert answers[0]["completion"] == answers[1]["completion"]


BODIES = {
    "nothing": b"",
    "no JSON": b"prompt=hello",
    "half of JSON": b'{"prompt": "a", "num_tokens": ',
    "two values": b"{} {}",
    "a form": b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--\r\n",
    "nested deeply": b'{"prompt":' * 100_000,
    "a number of 5000 digits": b'{"prompt": "a", "num_tokens": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_json_is_refused(server: Server, body: bytes) -> None:
    check_refused(server, body, "body", "must be JSON")


@pytest.mark.parametrize("body", [b"[]", b'[{"prompt": "a", "num_tokens": 1}]', b'"a"', b"5", b"null", b"NaN"])
def test_json_that_is_no_object_is_refused(server: Server, body: bytes) -> None:
    check_refused(server, body, "body", "JSON object")


@pytest.mark.parametrize("body", [b'{"prompt": "\xff\xfe", "num_tokens": 1}', b"\xff\xfe{\x00}\x00", b"\x80"])
def test_a_body_that_is_not_utf_8_is_refused(server: Server, body: bytes) -> None:
    check_refused(server, body, "body", "UTF-8")


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "ok \\ude00\\ud83d"])
def test_half_of_a_surrogate_pair_is_refused(server: Server, half: str) -> None:
    check_refused(server, f'{{"prompt": "{half}", "num_tokens": 1}}'.encode(), "prompt", "surrogate")
    check_refused(server, f'{{"prompt": "a", "num_tokens": 1, "stop": "{half}"}}'.encode(), "stop", "surrogate")


def test_a_field_whose_name_is_half_of_a_surrogate_pair_is_refused(server: Server) -> None:
    response = server.client.post("/inference", data=b'{"prompt": "a", "num_tokens": 1, "\\ud800": 1}')
    assert response.status_code == 400
    assert error_of(response)["param"] == "\ud800"


def test_a_field_nested_at_any_depth_is_refused(server: Server) -> None:
    for depth in (100, *range(900, 1000), 5000):
        body = '{"prompt": ' + "[" * depth + "]" * depth + ', "num_tokens": 1}'
        response = server.client.post("/inference", data=body)
        assert response.status_code == 400, depth
        assert error_of(response)["param"] in ("prompt", "body")
    assert server.ask().status_code == 200


@pytest.mark.parametrize(
    ("words", "num_tokens", "param"), [(2000, 1, "prompt"), (100_000, 1, "prompt"), (100, 500, "num_tokens")]
)
def test_what_does_not_fit_into_the_context_is_refused(server: Server, words: int, num_tokens: int, param: str) -> None:
    context = server.loop.engine.limits.max_context  # type: ignore[union-attr]
    body = {"prompt": "king " * words, "num_tokens": num_tokens if words > 100 else context - 1}
    check_refused(server, json.dumps(body).encode(), param, str(context))


def test_a_body_over_1_mib_is_refused_before_it_is_read_as_json(server: Server) -> None:
    response = server.client.post("/inference", data=b"x" * (20 << 20))
    assert response.status_code == 413
    error = error_of(response)
    assert error["param"] == "body"
    assert str(1 << 20) in error["message"]
    assert server.ask().status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/nothing/here"), ("POST", "/v0/inference"), ("GET", "/static/x"), ("PUT", "/inference/")]
)
def test_an_unknown_path_is_404_in_the_error_format(server: Server, method: str, path: str) -> None:
    response = server.client.open(path, method=method)
    assert response.status_code == 404
    assert path in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/inference"), ("DELETE", "/mode"), ("POST", "/stats"), ("GET", "/stats/reset")]
)
def test_a_wrong_method_is_405_in_the_error_format_with_the_methods_allowed(server: Server, method: str, path: str) -> None:
    response = server.client.open(path, method=method)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["Allow"]


PARAMS = ["nan", "x", "", -1, 60_001, True, None, [1], {}, HUGE]


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({}, "mode", "dynamic"),
        ({"mode": "turbo"}, "mode", "dynamic"),
        ({"mode": 5}, "mode", "dynamic"),
        ({"mode": ["static"]}, "mode", "dynamic"),
        ({"mode": "static", "params": []}, "params", "object"),
        ({"mode": "static", "params": {"timeout": 5}}, "params", "batch_timeout_ms"),
        ({"mode": "dynamic", "params": {"batch_timeout_ms": 5}}, "params", "batch_timeout_ms"),
        *(({"mode": "static", "params": {"batch_timeout_ms": value}}, "params", "batch_timeout_ms") for value in PARAMS),
        ({"mode": "static", "speed": 5}, "speed", "params"),
        ([], "body", "object"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_mode_that_will_not_do_is_refused_and_the_old_one_stays(server: Server, body: Any, param: str, named: str) -> None:
    response = server.client.put("/mode", data=json.dumps(body))
    assert response.status_code == 400, response.get_json()
    error = error_of(response)
    assert error["param"] == param
    assert named in error["message"]
    assert server.client.get("/mode").get_json()["mode"] == "dynamic"
    assert server.ask().status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity", "x" * 500])
def test_a_body_in_an_encoding_is_refused_by_its_name_on_every_route(server: Server, encoding: str) -> None:
    body = gzip.compress(json.dumps(GOOD).encode())
    for method, path in (("POST", "/inference"), ("POST", "/v1/completions"), ("POST", "/v1/files"), ("PUT", "/mode")):
        refused = server.client.open(path, method=method, data=body, headers={"Content-Encoding": encoding})
        assert refused.status_code == 415
        assert refused.headers["Accept-Encoding"] == "identity"
        error = error_of(refused)
        assert (error["param"], error["code"]) == ("Content-Encoding", "unsupported_content_encoding")
        assert encoding[:60] in error["message"]
        assert len(error["message"]) < 200
    plain = server.client.post("/inference", data=json.dumps(GOOD), headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def test_a_byte_order_mark_before_a_body_is_none_of_it(server: Server) -> None:
    assert server.client.post("/inference", data=BOM_UTF8 + json.dumps(GOOD).encode()).status_code == 200
    twice = server.client.post("/inference", data=2 * BOM_UTF8 + json.dumps(GOOD).encode())
    assert twice.status_code == 400
