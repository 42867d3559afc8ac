"""Which input files of batches are good, and what is said of the others."""

import io
import json
import tracemalloc
import zlib
from codecs import BOM_UTF8
from typing import Any

import pytest

from jobs.check import MAX_CUSTOM_ID, MAX_LINE_BYTES, check
from jobs.records import BatchError, Line

from .conftest import ENDPOINT, MODEL, request_line

GOOD = {"custom_id": "a", "method": "POST", "url": ENDPOINT, "body": {"model": MODEL, "prompt": "The king"}}
LEFT_OUT = object()


def check_bytes(content: bytes, **limits: int) -> tuple[list[Line], list[BatchError]]:
    return check(io.BytesIO(content), ENDPOINT, (MODEL,), **limits)


def test_a_good_file_gives_an_index_of_its_lines() -> None:
    content = request_line("first") + request_line("zweite ½") + request_line("third").rstrip(b"\n")
    lines, errors = check_bytes(content)
    assert errors == []
    assert [(line.number, line.custom_id) for line in lines] == [(1, "first"), (2, "zweite ½"), (3, "third")]
    for line in lines:
        raw = content[line.offset : line.offset + line.length]
        assert json.loads(raw)["custom_id"] == line.custom_id
        assert zlib.crc32(raw) == line.crc32


def test_blank_lines_are_numbered_but_are_no_lines() -> None:
    content = b"\n  \r\n" + request_line("a") + b"\n" + request_line("b").replace(b"\n", b"\r\n") + b"\n\n"
    lines, errors = check_bytes(content)
    assert errors == []
    assert [line.number for line in lines] == [3, 5]
    assert [json.loads(content[line.offset :][: line.length])["custom_id"] for line in lines] == ["a", "b"]


def test_a_byte_order_mark_before_the_first_line_is_none_of_it() -> None:
    content = BOM_UTF8 + request_line("a") + request_line("b")
    lines, errors = check_bytes(content)
    assert errors == []
    assert [json.loads(content[line.offset :][: line.length].decode())["custom_id"] for line in lines] == ["a", "b"]
    assert check_bytes(BOM_UTF8)[1][0].code == "empty_file"
    assert check_bytes(content[:1])[1][0].code == "invalid_json_line", "half a mark is a line"


def test_a_line_ends_at_its_line_feed_and_nowhere_else() -> None:
    odd = "a\u2028b\u2029c\u0085d"
    line = json.dumps(GOOD | {"custom_id": odd}, ensure_ascii=False).encode()
    lines, errors = check_bytes(line + b"\r\n" + request_line("b"))
    assert (errors, [line.custom_id for line in lines]) == ([], [odd, "b"])


FAULTS = [
    *(("custom_id", value, "missing_required_parameter") for value in (LEFT_OUT, None, "", "  ", 5, ["a"], {}, True)),
    *(("custom_id", value, "invalid_value") for value in ("x" * (MAX_CUSTOM_ID + 1), "\ud800")),
    *(("method", value, "missing_required_parameter") for value in (LEFT_OUT, None, 5)),
    *(("method", value, "invalid_method") for value in ("GET", "post", "")),
    *(("url", value, "missing_required_parameter") for value in (LEFT_OUT, None, 5)),
    *(("url", value, "invalid_url") for value in ("/v1/chat/completions", "/v1/completions/", "")),
    *(("body", value, "missing_required_parameter") for value in (LEFT_OUT, None, "{}", [], 5)),
]


@pytest.mark.parametrize(("field", "value", "code"), FAULTS, ids=[f"{f}-{str(v)[:12]!r}" for f, v, _ in FAULTS])
def test_a_field_that_will_not_do_is_named_with_its_line(field: str, value: Any, code: str) -> None:
    line = {name: given for name, given in (GOOD | {field: value}).items() if given is not LEFT_OUT}
    lines, (error,) = check_bytes(request_line("first") + json.dumps(line).encode() + b"\n" + request_line("last"))
    assert [line.number for line in lines] == [1, 3]
    assert (error.code, error.line, error.param) == (code, 2, field)
    assert field in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("body", "code"),
    [({}, "missing_required_parameter"), ({"model": 5}, "missing_required_parameter"), ({"model": "gpt-4"}, "model_not_found")],
)
def test_a_model_that_is_not_served_is_refused(body: dict, code: str) -> None:
    _, (error,) = check_bytes(json.dumps(GOOD | {"body": body}).encode())
    assert (error.code, error.line, error.param) == (code, 1, "body.model")
    assert code != "model_not_found" or MODEL in error.message


@pytest.mark.parametrize(
    "raw",
    [b"{", b"hello", b"[]", b'"a"', b"5", b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\xff"}', b"\x80"],
    ids=lambda raw: str(raw[:20]),
)
def test_a_line_that_is_no_json_object_is_refused(raw: bytes) -> None:
    lines, (error,) = check_bytes(raw + b"\n" + request_line("good"))
    assert (error.code, error.line) == ("invalid_json_line", 1)
    assert [line.number for line in lines] == [2]


def test_a_custom_id_that_comes_twice_is_refused_also_if_its_first_line_is_bad() -> None:
    bad = json.dumps(GOOD | {"custom_id": "b", "method": "GET"}).encode() + b"\n"
    _, errors = check_bytes(request_line("a") + bad + request_line("a") + request_line("b"))
    assert [(error.code, error.line) for error in errors] == [
        ("invalid_method", 2), ("duplicate_custom_id", 3), ("duplicate_custom_id", 4),
    ]  # fmt: skip
    assert "line 1" in errors[1].message


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_a_request_is_refused(content: bytes) -> None:
    lines, (error,) = check_bytes(content)
    assert (lines, error.code, error.line) == ([], "empty_file", None)


def test_more_requests_than_allowed_are_refused() -> None:
    content = b"\n".join(request_line(str(number)) for number in range(4))
    assert check_bytes(content, max_lines=4)[1] == []
    lines, (error,) = check_bytes(content * 10, max_lines=3)
    assert len(lines) == 3
    assert (error.code, error.line) == ("too_many_lines", 7)
    assert "at most 3" in error.message


def test_it_stops_at_the_most_errors_that_help() -> None:
    _, errors = check_bytes(b"no\n" * 50, max_errors=7)
    assert [error.line for error in errors] == list(range(1, 8))


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_may_have_just_so_many_bytes(ending: bytes) -> None:
    line = request_line("long").rstrip(b"\n")
    longest = line + b" " * (MAX_LINE_BYTES - len(line))
    lines, errors = check_bytes(longest + ending)
    assert ([line.length for line in lines], errors) == ([MAX_LINE_BYTES], [])
    content = request_line("a") + longest + b" " + b"\n" + request_line("b")
    lines, (error,) = check_bytes(content)
    assert (error.code, error.line) == ("line_too_long", 2)
    assert str(MAX_LINE_BYTES) in error.message
    assert content[lines[1].offset :][: lines[1].length] == request_line("b").rstrip(b"\n")


def test_a_line_that_never_ends_is_not_read_into_memory() -> None:
    content = io.BytesIO(b"\n" + b"x" * (24 * MAX_LINE_BYTES))
    tracemalloc.start()
    _, (error,) = check(content, ENDPOINT, (MODEL,))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.code == "line_too_long"
    assert peak_bytes < 5 * MAX_LINE_BYTES
