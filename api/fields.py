"""Single fields of a JSON body, each checked by hand, so that an error can name the field and its limit."""

import json
from typing import Any

from api.errors import bad
from batching.policy import Limits
from batching.request import Priority

MAX_TEMPERATURE = 2.0
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 100
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
NO_SEED = -1
LONGEST_TOKEN = 128  # bytes: no prompt of more than that times the context can fit


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise bad("body", f"must be UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise bad("body", f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad("body", f"must be a JSON object, not {type(value).__name__}")
    return value


def check_prompt(prompt: str, limits: Limits) -> str:
    """`prompt`, if it is not longer than any that could fit: to be known before it is cut into tokens."""
    size = _utf8_size("prompt", prompt)
    if size > LONGEST_TOKEN * limits.max_context:
        raise bad("prompt", f"has {size} bytes; the model's context is {limits.max_context} tokens")
    return prompt


def priority(body: dict[str, Any]) -> Priority:
    names = [priority.value for priority in Priority]
    value = body.get("priority", Priority.IMMEDIATE.value)
    if value not in names:
        raise bad("priority", f"must be one of {', '.join(names)}" + instead(body, "priority"))
    return Priority(value)


def stops(body: dict[str, Any]) -> list[str]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        most = f"{MAX_STOPS} of them, of 1 to {MAX_STOP_CHARACTERS} characters each"
        raise bad("stop", f"must be a text or a list of texts, at most {most}" + instead(body, "stop"))
    for stop in stops:
        _utf8_size("stop", stop)
    return stops


def _utf8_size(name: str, text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise bad(name, "must be valid Unicode: it holds half of a surrogate pair") from None


def whole(body: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(name, f"must be a whole number between {low} and {high}" + instead(body, name))
    return value


def read_seed(body: dict[str, Any]) -> int | None:
    """Any int64, as OpenAI and vLLM have it; -1 asks for none, which is vLLM's way."""
    seed = whole(body, "seed", None, MIN_SEED, MAX_SEED) if "seed" in body else NO_SEED
    return None if seed == NO_SEED else seed


def number(body: dict[str, Any], name: str, default: float | None, low: float, high: float) -> float | None:
    if name not in body:
        return default
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(name, f"must be a number between {low:g} and {high:g}" + instead(body, name))
    return float(value)


def instead(body: dict[str, Any], name: str) -> str:
    return f", not {str(body[name])[:60]!r}" if name in body else "; it is missing"
