"""A request in whatever pieces it comes: where it ends, what is refused, by when it has to be there; in virtual time."""

import random
from itertools import pairwise
from typing import Any

import pytest
from gunicorn.config import Config

from api.incoming import IN_MEMORY_BYTES, LONGEST_PAUSE_S, MAX_DISCARDED_BYTES, MAX_HEAD_BYTES, PATIENCE_S, Incoming, Refusal

LIMIT = 1000
HEAD = b"POST /inference HTTP/1.1\r\nHost: localhost\r\n"
WITH_LENGTH = HEAD + b"Content-Length: 11\r\n\r\nhello world"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;name=value\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"


def incoming(limit: int = LIMIT) -> Incoming:
    return Incoming(Config(), ("127.0.0.1", 1), 1, lambda request: limit, now=0.0)


def fed(data: bytes, **fields: Any) -> Incoming:
    request = incoming(**fields)
    request.feed(data, 0.0)
    return request


@pytest.mark.parametrize("whole", [WITH_LENGTH, CHUNKED, b"\r\n" + WITH_LENGTH])
def test_a_request_is_the_same_in_whatever_pieces_it_comes(whole: bytes) -> None:
    rng = random.Random(0)
    following = b"GET / HTTP/1.1\r\n"
    for cuts in (0, 1, 3, len(whole)):
        places = sorted({0, len(whole), *rng.sample(range(len(whole) + 1), cuts)})
        request = incoming()
        for begin, end in pairwise(places):
            assert not request.done
            request.feed(whole[begin:end] + (following if end == len(whole) else b""), 0.0)
        assert request.done
        assert (request.request.body.read(), request.rest) == (b"hello world", following)
        assert dict(request.request.headers)["CONTENT-LENGTH"] == "11"
        assert "TRANSFER-ENCODING" not in dict(request.request.headers)


def test_a_request_without_a_body_ends_with_its_head() -> None:
    request = fed(b"GET /health HTTP/1.1\r\n\r\nGET")
    assert (request.done, request.rest, request.request.body.read()) == (True, b"GET", b"")


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (b"nonsense\r\n\r\n", 400, "request line"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "bare LF"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "header name"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "CONTENT-LENGTH"),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, "CONTENT-LENGTH"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "CONTENT-LENGTH"),
        (HEAD + b"Transfer-Encoding: rot13\r\n\r\n", 400, "transfer coding"),
        (HEAD + b"Expect: a miracle\r\n\r\n", 417, "a miracle"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "too large"),
        (HEAD + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431, "fields size"),
        (HEAD + b"A: b\r\n" * 20_000, 431, f"{MAX_HEAD_BYTES}"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "chunk's size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n", 400, "chunk's size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n", 400, "chunk's size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n", 400, "followed by"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"5" * 10_000, 400, "more than 8192 bytes"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 5000, 400, "trailer"),
    ],
)
def test_what_is_no_http_is_refused_with_the_reason(sent: bytes, status: int, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        fed(sent)
    assert refused.value.status == status
    assert said in str(refused.value)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_its_limit_is_read_to_its_end_and_not_kept(chunked: bool) -> None:
    body = b"x" * (LIMIT + 1)
    framing = b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n%b\r\n0\r\n\r\n" if chunked else b"Content-Length: 1001\r\n\r\n%b"
    request = fed(HEAD + framing % body + b"GET")
    assert (request.done, request.must_close, request.rest) == (True, False, b"GET")
    assert (request.request.body.read(), request.num_stored) == (b"", 0)
    assert dict(request.request.headers)["CONTENT-LENGTH"] == "1001"


def test_a_body_far_over_its_limit_is_not_read_to_its_end() -> None:
    request = fed(HEAD + b"Content-Length: 1000000000\r\n\r\n")
    piece = b"x" * (1 << 20)
    for _ in range(MAX_DISCARDED_BYTES // len(piece)):
        request.feed(piece, 0.0)
        assert not request.done
    request.feed(piece, 0.0)
    assert request.done
    assert request.must_close


def test_who_asks_before_sending_a_body_is_told_at_once_whether_it_may() -> None:
    assert fed(HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n").expects_continue
    refused = fed(HEAD + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
    assert (refused.done, refused.must_close, refused.expects_continue) == (True, True, False)


def test_a_head_has_a_time_in_all_however_often_a_byte_of_it_comes() -> None:
    request = incoming()
    for second in range(60):
        request.feed(HEAD[second % 20 : second % 20 + 1], 100.0 + second)
    assert request.deadline == 100 + PATIENCE_S


def test_a_body_has_the_time_that_its_bytes_need_at_the_slowest_rate() -> None:
    request = incoming(limit=1 << 20)
    request.feed(HEAD + b"Content-Length: 100000\r\n\r\n", 50.0)
    assert request.deadline == 50 + PATIENCE_S
    request.feed(b"x" * 10_240, 60.0)
    assert request.deadline == 50 + PATIENCE_S + 10
    assert "10240 bytes have come instead of 100000" in request.missing


def test_what_came_fast_buys_no_hours_of_silence() -> None:
    request = incoming(limit=1 << 30)
    request.feed(HEAD + b"Content-Length: 100000000\r\n\r\n", 50.0)
    request.feed(b"x" * 50_000_000, 52.0)
    assert request.deadline == 52 + LONGEST_PAUSE_S


@pytest.mark.parametrize("fails", ["seek", "write"])
def test_a_full_disk_is_a_507_and_what_cannot_be_written_is_let_go(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a buffered file: what a full disk did not take is tried again when the file is closed, and fails again."""
    request = incoming(limit=1 << 30)
    request.feed(HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * (IN_MEMORY_BYTES + 1), 0.0)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    file = request._file
    for name in (fails, "close"):
        monkeypatch.setattr(file, name, full)
    with pytest.raises(Refusal, match="No space left") as refused:
        request.feed(b"x" * 200_000, 1.0)
    assert refused.value.status == 507
    request.close()
    assert request.num_stored == 0
