"""One HTTP request as its bytes come in: where its head and its body end, how large it may be, and by when it has to be there.

Knows no sockets. gunicorn's parser reads the head; the body is kept in memory, or in a temporary file where it is large, and is
handed on whole and without chunks (RFC 9112, section 7.1), as a proxy that buffers would do.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from typing import Any

from gunicorn.http import Request, errors
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.unreader import IterUnreader

MAX_HEAD_BYTES = 64 << 10
MAX_LINE_BYTES = 8 << 10  # of a chunk's size, or of all trailers
MAX_DISCARDED_BYTES = 64 << 20  # of a body that is too large: a client that could send it all sees the answer
IN_MEMORY_BYTES = 64 << 10
PATIENCE_S = 20.0  # from a request's first byte to the end of its head; and what a body has beyond its rate
MIN_BYTES_PER_S = 1024  # of a body
LONGEST_PAUSE_S = 60.0  # within a body, however fast its beginning came
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
STATUS: dict[type[Exception], int] = {
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.NoMoreData: 431,  # a head of MAX_HEAD_BYTES that does not end
    errors.ExpectationFailed: 417,
}


class Refusal(Exception):
    """This request will not do, whatever it asks for."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Incoming:
    """Complete once `done`; then `rest` is what came after it. `request` has a file as its `body`, empty where the body is
    larger than `limit_of(request)`, as its Content-Length tells."""

    def __init__(self, config: Any, address: Any, number: int, limit_of: Callable[[Request], int], now: float) -> None:
        self.request: Any = None
        self.done = False
        self.must_close = False  # where the next request would begin is not known
        self.rest = b""
        self.since = now
        self.deadline = now + PATIENCE_S  # by when it has to be complete, as far as is known now
        self.num_received = 0
        self.num_stored = 0  # bytes of the body that are kept
        self._config, self._address, self._number, self._limit_of = config, address, number, limit_of
        self._head = bytearray()
        self._limit = 0  # of the body
        self._size = 0  # of it, so far
        self._left = 0  # of it, or of its present chunk
        self._chunked = False
        self._line = bytearray()
        self._expected = ""  # what the next line of a chunked body is
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115

    @property
    def missing(self) -> str:
        """What has not come yet."""
        if self.request is None:
            return f"of the request's head {self.num_received} bytes have come, and not its end"
        return f"of the request's body {self._size} bytes have come" + (
            ", and not its end" if self._chunked else f" instead of {self._size + self._left}"
        )

    def feed(self, data: bytes, now: float) -> None:
        """Raises Refusal."""
        if not self.num_received:
            self.since, self.deadline = now, now + PATIENCE_S
        self.num_received += len(data)
        if self.request is None:
            self._head += data
            data = self._read_head(now)
        if self.request is not None and not self.done:
            before = self._size
            data = self._read_body(data)
            self.deadline = min(self.deadline + (self._size - before) / MIN_BYTES_PER_S, now + LONGEST_PAUSE_S)
        if self.done:
            self.rest = data

    def close(self) -> None:
        """What was kept of the body is let go."""
        with contextlib.suppress(OSError):  # a full disk: what could not be written is tried once more
            self._file.close()
        self.num_stored = 0

    def _read_head(self, now: float) -> bytes:
        """What came after the head, once that is complete."""
        if self._head[:2] == b"\r\n":
            del self._head[:2]  # RFC 9112, section 2.2
        end = self._head.find(b"\r\n\r\n")
        if end < 0 and len(self._head) < MAX_HEAD_BYTES and self._head.count(b"\n") == self._head.count(b"\r\n"):
            return b""
        head, rest = bytes(self._head[: end + 4] if end >= 0 else self._head), bytes(self._head[end + 4 :])
        try:
            request = Request(self._config, IterUnreader([head]), self._address, self._number)
        except Exception as error:  # gunicorn has many for what a client may send
            told = (
                f"has no end, and may be at most {MAX_HEAD_BYTES} bytes" if isinstance(error, errors.NoMoreData) else str(error)
            )
            raise Refusal(STATUS.get(type(error), 400), f"the request's head: {told}", "bad_request") from None
        reader = request.body.reader
        self.request, self.since, self._limit = request, now, self._limit_of(request)
        self.deadline = now + PATIENCE_S
        self._chunked = isinstance(reader, ChunkedReader)
        self._expected = "size"
        self._left = reader.length if isinstance(reader, LengthReader) else 0
        return rest

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits to be told that it may send the body."""
        return bool(self.request is not None and self.request._expected_100_continue and not self.done)

    def _read_body(self, data: bytes) -> bytes:
        """What came after the body, once that is complete."""
        at = self._read_chunks(data) if self._chunked else self._take(data, 0)
        if not self._chunked:
            self.done = not self._left
            if self._left + self._size > self._limit and self.expects_continue:
                self.done = self.must_close = True  # it is told so before it sends the body
        if not self.done and self._size > self._limit + MAX_DISCARDED_BYTES:
            self.done = self.must_close = True
        if self.done:
            self._hand_on()
        return data[at:]

    def _read_chunks(self, data: bytes) -> int:
        """Where what follows the body begins, or the end of `data`."""
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                at = self._take(data, at)
                continue
            end = data.find(b"\n", at) + 1 or len(data)
            self._line += data[at:end]
            at = end
            if self._line.endswith(b"\n"):
                self._read_line(bytes(self._line))
            elif len(self._line) > MAX_LINE_BYTES:
                raise _bad_chunk(f"a line of more than {MAX_LINE_BYTES} bytes")
        return at

    def _read_line(self, line: bytes) -> None:
        if self._expected == "size":
            if (found := CHUNK_SIZE.fullmatch(line)) is None:
                raise _bad_chunk(f"{line[:40]!r} is no chunk's size")
            self._left = int(found[1], 16)
            self._expected = "line end" if self._left else "trailer"
        elif self._expected == "line end":
            if line != b"\r\n":
                raise _bad_chunk(f"a chunk's data is followed by {line[:40]!r}")
            self._expected = "size"
        elif line == b"\r\n" or line.endswith(b"\r\n\r\n"):
            self.done = True
        else:  # trailers are not used, and together no longer than a line may be
            if not line.endswith(b"\r\n") or len(line) > MAX_LINE_BYTES:
                raise _bad_chunk(f"{line[-40:]!r} is no trailer, or one too many")
            return
        self._line.clear()

    def _take(self, data: bytes, at: int) -> int:
        """Keep the body's next bytes, unless it is too large; where what follows them begins."""
        piece = data[at : at + self._left]
        self._left -= len(piece)
        self._size += len(piece)
        if self._size + (0 if self._chunked else self._left) > self._limit:
            self.close()
        elif piece:
            try:
                self._file.write(piece)
            except OSError as error:
                raise _no_room(error) from None
            self.num_stored += len(piece)
        return at + len(piece)

    def _hand_on(self) -> None:
        """The body as if it had come in one piece."""
        if self._chunked:
            others = [(name, value) for name, value in self.request.headers if name != "TRANSFER-ENCODING"]
            self.request.headers = [*others, ("CONTENT-LENGTH", str(self._size))]
        self.request._expected_100_continue = False
        if self._file.closed:
            self.request.body = io.BytesIO()
        else:
            try:
                self._file.seek(0)  # what is still in its buffer is written
            except OSError as error:
                raise _no_room(error) from None
            self.request.body = self._file


def _no_room(error: OSError) -> Refusal:
    told = f"the request's body cannot be kept in {tempfile.gettempdir()}: {error.strerror}"
    return Refusal(507, told, "insufficient_storage")


def _bad_chunk(told: str) -> Refusal:
    return Refusal(400, f"the request's body: {told}", "bad_request")
