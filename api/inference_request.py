"""The body of POST /inference."""

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from api.bodies import (
    Body,
    PriorityName,
    Seed,
    Stops,
    Temperature,
    Text,
    TopK,
    TopP,
    UpTo,
    check,
    check_prompt,
    stop_strings,
)  # fmt: skip
from api.errors import bad
from batching.loop import Engine
from batching.random_streams import random_streams
from batching.request import Priority, Request, SamplingParams
from model.ending import Ending

TEMPERATURE, TOP_K = 0.6, 40  # where a call does not say: small models repeat themselves when they are greedy


class InferenceBody(Body):
    prompt: Annotated[Text, Field(min_length=1, examples=["The old house at the end of the lane"])]
    num_tokens: Annotated[int, Field(ge=1), UpTo("max_context", less=1), Field(examples=[20])]
    priority: PriorityName = Priority.IMMEDIATE
    temperature: Temperature = TEMPERATURE
    top_k: TopK = TOP_K
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Annotated[Stops | None, Field(description="ends the text before it")] = None
    deadline_s: Annotated[float | None, Field(ge=0.001, le=1e9, description="after so many seconds it is too late")] = None


def read_inference(body: Mapping[str, Any], engine: Engine, now: float) -> Request:
    """The request that `body` asks for. Raises ApiError naming the field and its limit."""
    asked = check(InferenceBody, body, engine)
    context = engine.limits.max_context
    tokens = engine.tokenizer.encode(check_prompt(asked.prompt, engine))
    if len(tokens) + asked.num_tokens > context:
        named = "prompt" if len(tokens) >= context else "num_tokens"
        most = f"prompt and num_tokens together may be at most {context} (the model's context)"
        raise bad(named, f"the prompt has {len(tokens)} tokens, num_tokens is {asked.num_tokens}; {most}")
    return Request(
        id=uuid.uuid4().hex,
        tokens=tokens,
        max_tokens=asked.num_tokens,
        priority=asked.priority,
        arrival=now,
        deadline=None if asked.deadline_s is None else now + asked.deadline_s,
        sampling=SamplingParams(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            stream=random_streams(asked.seed, [tokens])[0],
        ),
        stop=Ending(engine.tokenizer, stop_strings(asked.stop)),
    )
