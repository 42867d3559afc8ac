"""Lists as OpenAI has them: a page at a time, the next one from the id that was last on this one."""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Response, jsonify, request

from api.errors import bad

Record = TypeVar("Record")


def answer_page(
    read: Callable[[str | None, int], list[Record]], show: Callable[[Record], dict[str, Any]], default: int, most: int
) -> Response:
    """The page that the query's `after` and `limit` ask for. `read` takes both and gives the records. Raises ApiError."""
    limit = _limit(default, most)
    records = read(request.args.get("after"), limit + 1)  # one more tells whether there are more
    data = [show(record) for record in records[:limit]]
    return jsonify(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(records) > limit,
        }
    )


def _limit(default: int, most: int) -> int:
    text = request.args.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise bad("limit", f"must be a whole number between 1 and {most}, not {text[:60]!r}")
    return int(text)
