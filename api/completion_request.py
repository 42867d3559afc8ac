"""The body of POST /v1/completions, and of a line of a batch: OpenAI's fields, vLLM's, and `priority`. Nothing that is asked
for is ignored.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from api.bodies import (
    Body,
    Only,
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
from api.completion import Choice, Completion
from api.errors import ApiError, bad
from batching.loop import Engine
from batching.random_streams import random_streams
from batching.request import Priority, Request, SamplingParams
from model.ending import Ending, TextStream

TIERS = {"auto": "default", "default": "default", "flex": "flex"}  # what a tier is answered with
MAX_TOKENS = 16  # where a call does not say, as OpenAI has it
MAX_CHOICES = 128
MAX_LOGPROBS = 5

Tokens = Annotated[list[Annotated[int, Field(ge=0), UpTo("vocab_size", less=1)]], Field(min_length=1)]
Prompt = Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_CHOICES)]
PROMPT = f"a string, a list of token ids, or a list of at most {MAX_CHOICES} of either"


class StreamOptions(Body):
    include_usage: bool = False


class CompletionBody(Body):
    unknown: ClassVar[str] = "unknown_parameter"

    model: Annotated[str, Field(examples=["demo"])]
    prompt: Annotated[Prompt, Field(title=PROMPT, examples=["The old house at the end of the lane"])]
    max_tokens: Annotated[int, Field(ge=0), UpTo("max_context", less=1), Field(description="0 only with echo")] = MAX_TOKENS
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, description="choices for each prompt")] = 1
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0), UpTo("max_context", less=1)] = 0
    service_tier: Annotated[Literal["auto", "default", "flex"] | None, Field(description="flex: deferred")] = None
    priority: PriorityName = Priority.IMMEDIATE
    user: Annotated[Any, Field(description="has no effect")] = None

    best_of: Annotated[Any, Only(1)] = 1
    frequency_penalty: Annotated[Any, Only(0)] = 0
    presence_penalty: Annotated[Any, Only(0)] = 0
    logit_bias: Annotated[Any, Only({})] = {}
    suffix: Annotated[Any, Only("")] = ""


def read_completion(body: Mapping[str, Any], engine: Engine, now: float) -> Completion:
    """The call that `body` makes. Raises ApiError naming the field and its limit."""
    tokenizer, served = engine.tokenizer, engine.about["model"]
    if body.get("model") is None:
        raise bad("model", f"is missing; this server has {served!r}")
    asked = check(CompletionBody, body, engine)
    if asked.model != served:
        told = f"model: there is no {asked.model[:60]!r}; this server has {served!r}"
        raise ApiError(404, told, "model", "model_not_found")
    prompts = _prompts(asked.prompt, engine)
    _check_together(asked, prompts, engine)
    streams = iter(random_streams(asked.seed, prompts, asked.n))
    sampling = SamplingParams(
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_tokens=asked.min_tokens,
        not_yet=tokenizer.end_of_text if asked.min_tokens else -1,
    )
    choices: list[Choice] = []
    name = "cmpl-" + uuid.uuid4().hex
    for prompt in prompts:
        for _ in range(asked.n):
            ending = Ending(tokenizer, stop_strings(asked.stop), end_of_text=not asked.ignore_eos, min_tokens=asked.min_tokens)
            req = Request(
                id=f"{name}-{len(choices)}",
                tokens=list(prompt),
                max_tokens=max(1, asked.max_tokens),
                priority=Priority.DEFERRED if asked.service_tier == "flex" else asked.priority,
                arrival=now,
                sampling=replace(sampling, stream=next(streams)),
                stop=ending,
                num_logprobs=asked.logprobs,
                prompt_logprobs=asked.echo and asked.logprobs is not None,
            )
            choices.append(Choice(req, ending, TextStream(ending)))
    return Completion(
        id=name,
        model=served,
        created=int(time.time()),
        choices=choices,
        tokenizer=tokenizer,
        echo=asked.echo,
        max_tokens=asked.max_tokens,
        logprobs=asked.logprobs,
        tier=TIERS.get(asked.service_tier or ""),
        stream=asked.stream,
        include_usage=asked.stream_options.include_usage,
        num_prompts=len(prompts),
    )


def _prompts(prompt: Prompt, engine: Engine) -> list[list[int]]:
    """The tokens of each prompt. An empty text is the beginning of a document, as OpenAI has it."""
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    given: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    begin, encode = [engine.tokenizer.end_of_text], engine.tokenizer.encode
    return [encode(check_prompt(one, engine)) or begin if isinstance(one, str) else one for one in given]


def _check_together(asked: CompletionBody, prompts: list[list[int]], engine: Engine) -> None:
    """What of the fields do not go together."""
    most, context = min(MAX_CHOICES, engine.limits.max_queue), engine.limits.max_context
    if asked.n * len(prompts) > most:
        raise bad("n", f"{len(prompts)} prompts of {asked.n} choices each are more than {most}")
    if not asked.max_tokens and not asked.echo:
        raise bad("max_tokens", f"must be an integer between 1 and {context - 1}, not 0; 0 is for echo alone")
    if asked.min_tokens > max(1, asked.max_tokens):
        raise bad("min_tokens", f"may be at most max_tokens ({asked.max_tokens}), not {asked.min_tokens}")
    if asked.stream_options.include_usage and not asked.stream:
        raise bad("stream_options", "only with stream: true")
    for prompt in prompts:
        if len(prompt) + max(1, asked.max_tokens) > context:
            named = "prompt" if len(prompt) >= context else "max_tokens"
            told = (
                f"{named}: the prompt has {len(prompt)} tokens and max_tokens is {asked.max_tokens}; together at most {context}"
            )
            raise ApiError(400, f"{told} (the model's context)", named, "context_length_exceeded")
