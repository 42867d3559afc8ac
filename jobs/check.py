"""Is the input file of a batch good? Reads it line by line and says what is wrong where; the whole file is never in memory.

The format is OpenAI's: {"custom_id": ..., "method": "POST", "url": ..., "body": {...}} a line. What stands in a body, but for
its model, is checked when its turn comes: a bad one costs its own line only. Must not know the store.
"""

import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from itertools import count
from typing import Any, BinaryIO

from jobs.records import BatchError, Line

MAX_LINES = 50_000
MAX_LINE_BYTES = 1 << 20
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100  # more would help nobody


class _Fault(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def check(
    stream: BinaryIO, endpoint: str, models: Collection[str], max_lines: int = MAX_LINES, max_errors: int = MAX_ERRORS
) -> tuple[list[Line], list[BatchError]]:
    """The lines of the file, and what is wrong with it: good if nothing is. Blank lines are numbered, but are no lines.

    Stops at `max_errors` errors. Raises what reading raises.
    """
    lines: list[Line] = []
    errors: list[BatchError] = []
    seen: dict[str, int] = {}
    requests = 0
    for number, offset, raw in _raw_lines(stream):
        if raw is not None and not raw.strip():
            continue
        requests += 1
        try:
            if requests > max_lines:
                raise _Fault("too_many_lines", f"there may be at most {max_lines} requests in a file")
            custom_id = _check_line(raw, number, endpoint, models, seen)
        except _Fault as fault:
            errors.append(BatchError(fault.code, str(fault), number, fault.param))
            if len(errors) == max_errors or requests > max_lines:
                break
        else:
            assert raw is not None
            lines.append(Line(number, custom_id, offset, len(raw), zlib.crc32(raw)))
    if not requests:
        errors.append(BatchError("empty_file", "the file holds no request"))
    return lines, errors


def _raw_lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, offset and bytes of each line, without its line feed; None for the bytes of one that is too long. A byte order
    mark before the first is none of it."""
    offset = len(BOM_UTF8) if stream.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    stream.seek(offset)
    for number in count(1):
        raw = stream.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        size, piece = len(raw), raw
        while not piece.endswith(b"\n") and (piece := stream.readline(MAX_LINE_BYTES)):
            size += len(piece)
        line = raw.removesuffix(b"\n")
        yield number, offset, line if len(line) <= MAX_LINE_BYTES else None
        offset += size


def _check_line(raw: bytes | None, number: int, endpoint: str, models: Collection[str], seen: dict[str, int]) -> str:
    """The custom_id of a good line; also noted in `seen`. Raises _Fault."""
    if raw is None:
        raise _Fault("line_too_long", f"a line may have at most {MAX_LINE_BYTES} bytes")
    line = _parse(raw)
    custom_id = _need(line, "custom_id", str)
    if not custom_id.strip():
        raise _Fault("missing_required_parameter", "custom_id: must not be blank", "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID or not _is_unicode(custom_id):
        raise _Fault("invalid_value", f"custom_id: must be valid Unicode of at most {MAX_CUSTOM_ID} characters", "custom_id")
    if custom_id in seen:
        twice = f"custom_id: {custom_id[:60]!r} is that of line {seen[custom_id]} too"
        raise _Fault("duplicate_custom_id", twice, "custom_id")
    seen[custom_id] = number
    if (method := _need(line, "method", str)) != "POST":
        raise _Fault("invalid_method", f"method: must be POST, not {method[:60]!r}", "method")
    if (url := _need(line, "url", str)) != endpoint:
        raise _Fault("invalid_url", f"url: must be {endpoint}, the endpoint of the batch, not {url[:60]!r}", "url")
    if (wanted := _need(_need(line, "body", dict), "model", str, "body.")) not in models:
        allowed = " or ".join(models)
        raise _Fault("model_not_found", f"body.model: must be {allowed}, which is served, not {wanted[:60]!r}", "body.model")
    return custom_id


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Fault("invalid_json_line", f"must be UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _Fault("invalid_json_line", f"must be JSON: {error}") from None
    if not isinstance(line, dict):
        raise _Fault("invalid_json_line", f"must be a JSON object, not {type(line).__name__}")
    return line


def _need(line: dict[str, Any], name: str, kind: type[str] | type[dict], prefix: str = "") -> Any:
    what = "a text" if kind is str else "a JSON object"
    if line.get(name) is None:
        raise _Fault("missing_required_parameter", f"{prefix}{name}: is missing; it must be {what}", prefix + name)
    if not isinstance(line[name], kind):
        instead = f"must be {what}, not {type(line[name]).__name__}"
        raise _Fault("missing_required_parameter", f"{prefix}{name}: {instead}", prefix + name)
    return line[name]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
