"""The body of POST /inference: each field checked by hand, so that an error can name the field and its limit."""

import json
import secrets
import uuid
from typing import Any

from api.errors import bad
from batching.policy import Limits
from batching.request import Priority, Request, SamplingParams
from model.tokenizer import StopStrings, Tokenizer

TEMPERATURE, TOP_K = 0.6, 40  # where a call does not say: small models repeat themselves when they are greedy
MAX_TEMPERATURE = 2.0
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 100
MAX_SEED = 2**63 - 1
LONGEST_TOKEN = 128  # bytes: no prompt of more than that times the context can fit
FIELDS = ("prompt", "num_tokens", "priority", "temperature", "top_k", "top_p", "seed", "stop", "deadline_s")


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


def read_inference(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits, now: float) -> Request:
    """The request that `body` asks for. Raises ApiError naming the field and its limit."""
    for name in body:
        if name not in FIELDS:
            raise bad(str(name)[:100], f"no such field; there are: {', '.join(FIELDS)}")
    prompt = _prompt(body, limits)
    num_tokens = _whole(body, "num_tokens", None, 1, limits.max_context - 1)
    tokens = tokenizer.encode(prompt)
    if len(tokens) + num_tokens > limits.max_context:
        named = "prompt" if len(tokens) >= limits.max_context else "num_tokens"
        most = f"prompt and num_tokens together may be at most {limits.max_context} (the model's context)"
        raise bad(named, f"the prompt has {len(tokens)} tokens, num_tokens is {num_tokens}; {most}")
    stops = _stops(body)
    deadline_s = _number(body, "deadline_s", None, 0.001, 1e9)
    return Request(
        id=uuid.uuid4().hex,
        tokens=tokens,
        max_tokens=num_tokens,
        priority=_priority(body),
        arrival=now,
        deadline=None if deadline_s is None else now + deadline_s,
        sampling=SamplingParams(
            temperature=_number(body, "temperature", TEMPERATURE, 0.0, MAX_TEMPERATURE) or 0.0,
            top_k=_whole(body, "top_k", TOP_K, 0, tokenizer.vocab_size),
            top_p=_number(body, "top_p", 1.0, 1e-6, 1.0) or 1.0,
            seed=_whole(body, "seed", secrets.randbits(63), 0, MAX_SEED),
        ),
        stop=StopStrings(tokenizer, stops) if stops else None,
    )


def _prompt(body: dict[str, Any], limits: Limits) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise bad("prompt", "must be a text of at least one character" + _instead(body, "prompt"))
    size = _utf8_size("prompt", prompt)
    if size > LONGEST_TOKEN * limits.max_context:
        raise bad("prompt", f"has {size} bytes; the model's context is {limits.max_context} tokens")
    return prompt


def _priority(body: dict[str, Any]) -> Priority:
    names = [priority.value for priority in Priority]
    value = body.get("priority", Priority.IMMEDIATE.value)
    if value not in names:
        raise bad("priority", f"must be one of {', '.join(names)}" + _instead(body, "priority"))
    return Priority(value)


def _stops(body: dict[str, Any]) -> list[str]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        most = f"{MAX_STOPS} of them, of 1 to {MAX_STOP_CHARACTERS} characters each"
        raise bad("stop", f"must be a text or a list of texts, at most {most}" + _instead(body, "stop"))
    for stop in stops:
        _utf8_size("stop", stop)
    return stops


def _utf8_size(name: str, text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise bad(name, "must be valid Unicode: it holds half of a surrogate pair") from None


def _whole(body: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(name, f"must be a whole number between {low} and {high}" + _instead(body, name))
    return value


def _number(body: dict[str, Any], name: str, default: float | None, low: float, high: float) -> float | None:
    if name not in body:
        return default
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(name, f"must be a number between {low:g} and {high:g}" + _instead(body, name))
    return float(value)


def _instead(body: dict[str, Any], name: str) -> str:
    return f", not {str(body[name])[:60]!r}" if name in body else "; it is missing"
