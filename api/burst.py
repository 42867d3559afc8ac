"""POST /burst: many requests at once, made up here and answered to nobody, for a class to watch. From the browser itself they
would wait for each other: it opens six connections. DELETE /burst calls off what is left of them."""

import random
import threading
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from flask import Blueprint, Response, current_app, jsonify
from flask.sansio.blueprints import BlueprintSetupState
from pydantic import Field

from api.auth import teacher_only
from api.bodies import Body, Seed, UpTo, check, read_json
from api.errors import bad, read_body
from batching.loop import BatchingLoop, Engine, Ticket
from batching.random_streams import random_streams
from batching.request import Priority, Refused, Request, SamplingParams

MAX_REQUESTS, MAX_LENGTHS = 2000, 32
TEMPERATURE, TOP_K = 0.6, 40
TEXT = (
    "It was late in the afternoon when the carriage came up the lane, and the old house stood with all its windows dark. "
    "Nobody had been told to expect a visitor. The gardener, who had seen many come and few of them stay, put down his "
    "spade and went slowly to the gate, wondering what the rain would do to the roses, and whether the letter had been read."
)

Length = Annotated[int, Field(ge=1), UpTo("max_context", less=1)]
Lengths = Annotated[Length | Annotated[list[Length], Field(min_length=1, max_length=MAX_LENGTHS)], Field(examples=[[4, 40]])]

blueprint = Blueprint("burst", __name__)


class BurstBody(Body):
    requests: Annotated[int, Field(ge=1, le=MAX_REQUESTS, examples=[24])]
    prompt_tokens: Lengths  # one of which each request takes
    num_tokens: Lengths
    deferred: Annotated[float, Field(ge=0, le=1, description="share of the requests")] = 0.0
    seed: Seed | None = 0


@blueprint.post("/burst")
@teacher_only
def burst() -> Response:
    """Answers at once with how many were taken into the queue."""
    loop: BatchingLoop = current_app.extensions["batching"]
    requests = read_burst(read_json(read_body()), loop.ready_engine(), loop.clock())
    taken = []
    try:
        for req in requests:
            taken.append(loop.submit(req))
    except Refused:  # the queue is full, for the rest of them too
        pass
    finally:
        _under_way().add(taken)
    return jsonify({"taken": len(taken), "refused": len(requests) - len(taken)})


@blueprint.delete("/burst")
@teacher_only
def call_off() -> Response:
    """Answers with how many requests of all bursts were still waiting or running."""
    loop: BatchingLoop = current_app.extensions["batching"]
    loop.ready_engine()
    left = _under_way().take()
    for ticket in left:
        loop.cancel(ticket)
    return jsonify({"called_off": len(left)})


class UnderWay:
    """Requests of bursts that are not yet answered."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []
        self._lock = threading.Lock()

    def add(self, tickets: list[Ticket]) -> None:
        with self._lock:
            self._tickets = [ticket for ticket in self._tickets + tickets if ticket.request.answered_at is None]

    def take(self) -> list[Ticket]:
        with self._lock:
            tickets, self._tickets = self._tickets, []
        return [ticket for ticket in tickets if ticket.request.answered_at is None]


@blueprint.record_once
def _(state: BlueprintSetupState) -> None:
    state.app.extensions["bursts"] = UnderWay()


def _under_way() -> UnderWay:
    under_way: UnderWay = current_app.extensions["bursts"]
    return under_way


def read_burst(body: Mapping[str, Any], engine: Engine, now: float) -> list[Request]:
    """The requests that `body` asks for, the same ones for the same seed. Raises ApiError naming the field and its limit."""
    asked = check(BurstBody, body, engine)
    prompts, outputs = _several(asked.prompt_tokens), _several(asked.num_tokens)
    if max(prompts) + max(outputs) > engine.limits.max_context:
        told = f"together with prompt_tokens at most {engine.limits.max_context} (the model's context)"
        raise bad("num_tokens", f"{told}, not {max(outputs)} + {max(prompts)}")
    rng = random.Random(random_streams(asked.seed, [[]])[0])  # of the seed itself it would take -5 for 5
    deferred = round(asked.deferred * asked.requests)
    kinds = [Priority.DEFERRED] * deferred + [Priority.IMMEDIATE] * (asked.requests - deferred)
    rng.shuffle(kinds)
    text = engine.tokenizer.encode(TEXT)
    requests = [_request(text, rng, rng.choice(prompts), rng.choice(outputs), kind, now) for kind in kinds]
    for req, stream in zip(requests, random_streams(asked.seed, [req.tokens for req in requests]), strict=True):
        req.sampling = SamplingParams(TEMPERATURE, TOP_K, stream=stream)
    return requests


def _request(text: list[int], rng: random.Random, prompt: int, output: int, kind: Priority, now: float) -> Request:
    begin = rng.randrange(len(text))
    tokens = [text[(begin + i) % len(text)] for i in range(prompt)]
    return Request("burst-" + uuid.uuid4().hex, tokens, output, kind, now)


def _several(lengths: int | list[int]) -> list[int]:
    return lengths if isinstance(lengths, list) else [lengths]
