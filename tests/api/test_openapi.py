"""/openapi.json describes every route, and is right: what it allows and forbids is sent to each, and nothing that comes back is
a 5xx, or of a status or shape that is not in it."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.openapi import ROUTES

from .conftest import Server

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip
LONGEST = 8  # tokens, choices, requests of a burst
ENDLESS = "/events"  # looked at by a test of its own


@pytest.fixture
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").get_json()
    return found


def test_every_route_of_the_app_is_described_and_no_other(server: Server, document: dict[str, Any]) -> None:
    rules = list(server.app.url_map.iter_rules())
    assert {rule.endpoint for rule in rules} == set(ROUTES)
    described = {operation["operationId"] for methods in document["paths"].values() for operation in methods.values()}
    assert described == set(ROUTES)
    assert sum(map(len, document["paths"].values())) == sum(
        len((rule.methods or set()) - {"HEAD", "OPTIONS"}) for rule in rules
    )


def test_the_document_is_openapi(server: Server) -> None:
    schemathesis.openapi.from_wsgi("/openapi.json", server.app).validate()


def test_the_limits_are_those_of_the_engine(server: Server, document: dict[str, Any]) -> None:
    context = server.loop.engine.limits.max_context  # type: ignore[union-attr]
    schemas = document["components"]["schemas"]
    assert schemas["InferenceBody"]["properties"]["num_tokens"]["maximum"] == context - 1
    assert "x-limit" not in str(document)


def test_it_needs_the_key_like_any_other_route(serve: Callable[..., Server]) -> None:
    client = serve(api_key="class").client
    assert client.get("/openapi.json").status_code == 401
    assert (client.get("/docs").status_code, client.get("/docs").location) == (303, "/login")
    assert client.get("/openapi.json", headers={"Authorization": "Bearer class"}).status_code == 200


def shorten(schema: Any) -> None:
    """So that no request takes long: an integer's maximum is what the engine could just do."""
    if isinstance(schema, dict) and schema.get("type") == "integer" and 100 < schema.get("maximum", 0) < 10_000:
        schema["maximum"] = LONGEST
    for one in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        shorten(one)


@pytest.fixture
def described(serve: Callable[..., Server]) -> tuple[Server, dict[str, Any]]:
    server = serve()
    # Something for the routes of single files and batches to find.
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "a"}}\n'
    form = {"purpose": "batch", "file": (io.BytesIO(line), "lines.jsonl")}
    file = server.client.post("/v1/files", data=form).get_json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = server.client.post("/v1/batches", json=body).get_json()["id"]
    document = server.client.get("/openapi.json").get_json()
    deadline, _ = document["components"]["schemas"]["InferenceBody"]["properties"]["deadline_s"]["anyOf"]
    deadline["minimum"] = 1000  # a deadline that passed is a 504, as it should be
    for kind in ("InferenceBody", "CompletionBody", "BurstBody"):
        shorten(document["components"]["schemas"][kind]["properties"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "id":
                    parameter["schema"]["examples"] = [file if "/files/" in path else batch]
    return server, document


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.name.lower())
def test_what_the_document_allows_or_forbids_is_answered_as_it_says(described: Any, mode: GenerationMode) -> None:
    server, document = described
    schema = schemathesis.openapi.from_dict(document)
    schema.app = server.app
    for found in schema.exclude(path=ENDLESS).get_all_operations():
        operation = found.ok()
        is_json = any(body.media_type == "application/json" for body in operation.body)
        if mode is GenerationMode.POSITIVE or is_json or operation.query:  # of a path or a form any text is one
            send_many(operation.as_strategy(generation_mode=mode))
            assert server.client.get("/health").status_code == 200, operation.label


def send_many(cases: Any) -> None:
    """A dozen requests in the quick profile, 150 in the thorough one."""

    @settings(
        max_examples=settings.default.max_examples // 2, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    @given(case=cases)
    def send(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    send()


def test_the_live_stream_is_answered_as_the_document_says(server: Server, document: dict[str, Any]) -> None:
    operation = document["paths"][ENDLESS]["get"]
    with server.client.get(ENDLESS) as stream:
        assert stream.status_code == 200
        assert stream.mimetype in operation["responses"]["200"]["content"]
    assert server.client.get(f"{ENDLESS}?after=x").status_code == 400
    assert "400" in operation["responses"]
