"""Traces of real services: when requests came, how long their prompts and outputs were. Their texts are not in them.

Reads CSV with a header, a JSON list of objects, or one JSON object a line. The columns are known by this client's own names
and by those of public traces (COLUMNS). It must not know of plans or of a model's context.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Names of the columns for time, prompt and output: our own, then Azure's LLM inference traces of 2023 and 2024, BurstGPT,
# Mooncake, Vidur, Splitwise. Upper and lower case are alike; the first name that is there counts.
COLUMNS = {
    "timestamp": ("timestamp", "at_s", "arrival", "arrived_at", "arrival_timestamp"),
    "prompt": ("prompt_tokens", "contexttokens", "request tokens", "input_length", "num_prefill_tokens", "prompt_size"),
    "output": (
        "output_tokens", "num_tokens", "generatedtokens", "response tokens", "output_length", "num_decode_tokens", "token_size",
    ),
}  # fmt: skip
IN_MILLISECONDS = "input_length"  # Mooncake's times
FRACTION = re.compile(r"(\.\d{6})\d+")  # Azure writes seven digits, of which Python reads six
HOUR_S = 3600.0


class TraceError(ValueError):
    """A trace that cannot be used; the message names file, line and column."""


@dataclass(frozen=True)
class TraceRow:
    """One request; ``at_s`` counts from the first of the trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[TraceRow]:
    """The rows in the order of their times. Raises TraceError."""
    rows: list[TraceRow] = []
    names: dict[str, str] = {}
    for place, record in _records(path):
        names = names or _names(place, record)
        seconds = _seconds(place, names["timestamp"], record.get(names["timestamp"]))
        rows.append(
            TraceRow(
                seconds / 1000 if names["prompt"].strip().lower() == IN_MILLISECONDS else seconds,
                _tokens(place, names["prompt"], record.get(names["prompt"])),
                _tokens(place, names["output"], record.get(names["output"])),
            )
        )
    if not rows:
        raise TraceError(f"{path}: has no request")
    first = min(row.at_s for row in rows)
    rows.sort(key=lambda row: row.at_s)
    return [replace(row, at_s=row.at_s - first) for row in rows]


def window(rows: Sequence[TraceRow], from_h: float, hours: float, count: float) -> tuple[list[TraceRow], int]:
    """The first ``count`` requests of the ``hours`` that begin ``from_h`` hours after the first row; their times count from the
    first of them. And how many rows among them were left out because prompt or output has no tokens (in BurstGPT: a request
    that failed). Raises TraceError."""
    begin, end = from_h * HOUR_S, (from_h + hours) * HOUR_S
    within = [row for row in rows if begin <= row.at_s < end]
    used: list[TraceRow] = []
    left_out = 0
    for row in within:
        if len(used) == count:
            break
        if row.prompt_tokens and row.output_tokens:
            used.append(row)
        else:
            left_out += 1
    if not used:
        of = f"{from_h:g} h to {from_h + hours:g} h" if begin or end < math.inf else "all of it"
        there = f"the trace lasts {rows[-1].at_s / HOUR_S:.3g} h"
        raise TraceError(f"--trace, {of}: has no request with a prompt and an output; {there}")
    return [replace(row, at_s=row.at_s - used[0].at_s) for row in used], left_out


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record, with words for where it stands. Lines end at a line feed, with or without a carriage return: other
    characters at which Python would split, as U+2028, may stand inside a text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: is not text in UTF-8") from None
    if text.lstrip()[:1] == "[":
        yield from _json_list(path, text)
    elif text.lstrip()[:1] == "{":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _object(place, _json(place, line))
    else:
        reader = csv.DictReader(io.StringIO(text, newline="\n"), skipinitialspace=True)
        try:
            for record in reader:
                yield f"{path}, line {reader.line_num}", record
        except csv.Error as error:
            told = str(error).partition(" - ")[0]  # without advice to programmers
            raise TraceError(f"{path}, line {reader.line_num + 1}: is not CSV: {told}") from None


def _json_list(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, value in enumerate(_json(str(path), text), 1):
        place = f"{path}, element {number}"
        yield place, _object(place, value)


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{place}: is not JSON: {error}") from None


def _object(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TraceError(f"{place}: must be a JSON object, not {type(value).__name__}")
    return value


def _names(place: str, record: Mapping[str, Any]) -> dict[str, str]:
    """What the three columns are called here."""
    there = {str(name).strip().lower(): str(name) for name in record}
    names = {}
    for column, known in COLUMNS.items():
        found = [there[name] for name in known if name in there]
        if not found:
            raise TraceError(
                f"{place}: has no column for the {column}, which may be called {', '.join(known)}; there are {', '.join(there)}"
            )
        names[column] = found[0]
    return names


def _seconds(place: str, name: str, value: Any) -> float:
    """A number of seconds, or a date and time."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            when = datetime.fromisoformat(FRACTION.sub(r"\1", str(value).strip()).replace("Z", "+00:00"))
        except ValueError:
            seconds = math.nan
        else:
            seconds = (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    if not math.isfinite(seconds) or isinstance(value, bool):
        raise TraceError(f"{place}: {name} must be a number of seconds or a date and time, not {value!r}")
    return seconds


def _tokens(place: str, name: str, value: Any) -> int:
    try:
        tokens = float(value)
    except (TypeError, ValueError):
        tokens = math.nan
    if not (tokens.is_integer() and 0 <= tokens <= 1e9) or isinstance(value, bool):
        raise TraceError(f"{place}: {name} must be a whole number of tokens, not {value!r}")
    return int(tokens)
