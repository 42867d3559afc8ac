"""POST /burst: many requests at once, made up here and answered to nobody, for a class to watch. From the browser itself they
would wait for each other: it opens six connections."""

import random
import uuid
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from api.auth import teacher_only
from api.errors import bad, read_body
from api.fields import instead, number, read_json, read_seed, whole
from batching.loop import BatchingLoop, Engine
from batching.random_streams import random_streams
from batching.request import Priority, Refused, Request, SamplingParams

FIELDS = ("requests", "prompt_tokens", "num_tokens", "deferred", "seed")
MAX_REQUESTS, MAX_LENGTHS = 2000, 32
TEMPERATURE, TOP_K = 0.6, 40
TEXT = (
    "It was late in the afternoon when the carriage came up the lane, and the old house stood with all its windows dark. "
    "Nobody had been told to expect a visitor. The gardener, who had seen many come and few of them stay, put down his "
    "spade and went slowly to the gate, wondering what the rain would do to the roses, and whether the letter had been read."
)

blueprint = Blueprint("burst", __name__)


@blueprint.post("/burst")
@teacher_only
def burst() -> Response:
    """Answers at once with how many were taken into the queue."""
    loop: BatchingLoop = current_app.extensions["batching"]
    requests = read_burst(read_json(read_body()), loop.ready_engine(), loop.clock())
    taken = 0
    try:
        for req in requests:
            loop.submit(req)
            taken += 1
    except Refused:  # the queue is full, for the rest of them too
        pass
    return jsonify({"taken": taken, "refused": len(requests) - taken})


def read_burst(body: dict[str, Any], engine: Engine, now: float) -> list[Request]:
    """The requests that `body` asks for, the same ones for the same seed. Raises ApiError naming the field and its limit."""
    for name in body:
        if name not in FIELDS:
            raise bad(name[:100], f"no such field; there are: {', '.join(FIELDS)}")
    count = whole(body, "requests", None, 1, MAX_REQUESTS)
    most = engine.limits.max_context - 1
    prompts, outputs = _lengths(body, "prompt_tokens", most), _lengths(body, "num_tokens", most)
    if max(prompts) + max(outputs) > engine.limits.max_context:
        told = f"together with prompt_tokens at most {engine.limits.max_context} (the model's context)"
        raise bad("num_tokens", f"{told}, not {max(outputs)} + {max(prompts)}")
    seed = read_seed({"seed": 0} | body)
    rng = random.Random(random_streams(seed, [[]])[0])  # of the seed itself it would take -5 for 5
    deferred = round((number(body, "deferred", 0.0, 0, 1) or 0.0) * count)
    kinds = [Priority.DEFERRED] * deferred + [Priority.IMMEDIATE] * (count - deferred)
    rng.shuffle(kinds)
    text = engine.tokenizer.encode(TEXT)
    requests = [_request(text, rng, rng.choice(prompts), rng.choice(outputs), kind, now) for kind in kinds]
    for req, stream in zip(requests, random_streams(seed, [req.tokens for req in requests]), strict=True):
        req.sampling = SamplingParams(TEMPERATURE, TOP_K, stream=stream)
    return requests


def _request(text: list[int], rng: random.Random, prompt: int, output: int, kind: Priority, now: float) -> Request:
    begin = rng.randrange(len(text))
    tokens = [text[(begin + i) % len(text)] for i in range(prompt)]
    return Request("burst-" + uuid.uuid4().hex, tokens, output, kind, now)


def _lengths(body: dict[str, Any], name: str, most: int) -> list[int]:
    """Lengths in tokens, one of which each request takes."""
    value = body.get(name)
    lengths: list[Any] = value if isinstance(value, list) else [value]
    good = 1 <= len(lengths) <= MAX_LENGTHS
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most for n in lengths):
        allowed = f"must be a whole number between 1 and {most}, or a list of up to {MAX_LENGTHS} of them"
        raise bad(name, allowed + instead(body, name))
    return lengths
