"""The version that a file carries, and the one line that says when it is another one."""

from __future__ import annotations

from typing import Any

RESULTS = 1  # of results.json
STEPS = 1  # of step records: GET /steps, and the `steps` of results.json (`SCHEMA` in batching/step_log.py)


class SchemaError(ValueError):
    """A file or an answer of another version; the message is one line without the file's name."""


def check(found: Any, known: int, what: str) -> None:
    """Raises SchemaError unless ``found``, the value of the field ``schema`` or None, is the ``known`` version."""
    if found is None:
        raise SchemaError(f"{what} without a schema version, from before there were any; this program reads version {known}")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise SchemaError(f"schema must be a whole number from 1 on, not {str(found)[:40]!r}")
    if found != known:
        age = "newer" if found > known else "older"
        raise SchemaError(f"{what} of schema version {found}, {age} than version {known}, which this program reads")
