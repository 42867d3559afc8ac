"""The body of POST /v1/completions, and of a line of a batch: OpenAI's fields, vLLM's, and `priority`. Nothing that is asked
for is ignored: a field that is not supported has its neutral value, or is refused by its name.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from api.bodies import (
    Body,
    OneOf,
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
from batching.request import Choices, Priority, Request, SamplingParams
from model.ending import Ending, TextStream

TIERS = {"auto": "default", "default": "default", "flex": "flex"}  # what a tier is answered with
MAX_TOKENS = 16  # where a call does not say, as OpenAI has it
MAX_CHOICES = 128
MAX_LOGPROBS = 5
MAX_STOP_TOKENS, MAX_BIASES = 64, 1024
MAX_PENALTY, MAX_BIAS, MAX_REPETITION = 2, 100, 10

Token = Annotated[int, Field(ge=0), UpTo("vocab_size", less=1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Prompt = Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_CHOICES)]
PROMPT = f"a string, a list of token ids, or a list of at most {MAX_CHOICES} of either"
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
BIASES = f"a JSON object of at most {MAX_BIASES} token ids with numbers between -{MAX_BIAS} and {MAX_BIAS}"
VllmPriority = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
PRIORITY = "immediate, deferred, or vLLM's integer, above 0 for deferred"
Label = Annotated[Any, Field(description="a label: has no effect")]
Off = Annotated[Literal[False], Only(False)]
No = Annotated[Literal[False], OneOf([False])]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Field(description="usage in every chunk, where include_usage is set")] = False
    include_obfuscation: Off = False


class CompletionBody(Body):
    unknown: ClassVar[str] = "unknown_parameter"

    model: Annotated[str, Field(examples=["demo"])]
    prompt: Annotated[Prompt, Field(title=PROMPT, examples=["The old house at the end of the lane"])]
    max_tokens: Annotated[int, Field(ge=0), UpTo("max_context", less=1), Field(description="0 only with echo")] = MAX_TOKENS
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: Annotated[float, Field(ge=0, le=1, description="of the likeliest token's probability; 0: off")] = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=MAX_REPETITION, description="1: off")] = 1.0
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES, title=BIASES)] = {}
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: Annotated[bool, Field(description="leave <|endoftext|> out of the text")] = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, description="choices for each prompt")] = 1
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="only as large as n")] = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, description="of the model's own logits")] | No | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0), UpTo("max_context", less=1)] = 0
    service_tier: Annotated[Literal["auto", "default", "flex"] | None, Field(description="flex: deferred")] = None
    priority: Annotated[PriorityName | VllmPriority, Field(title=PRIORITY)] = Priority.IMMEDIATE
    request_id: Annotated[Text | None, Field(min_length=1, max_length=128, description="the answer's id is cmpl- and this")] = (
        None
    )
    add_special_tokens: Annotated[bool, Field(description="GPT-2 has none to add")] = True

    user: Label = None
    metadata: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    session_id: Label = None

    # Of these nothing is supported but what changes nothing: OpenAI's,
    suffix: Annotated[Any, Only("")] = ""
    store: Off = False
    response_format: Annotated[Any, Only({"type": "text"})] = None
    # vLLM's,
    use_beam_search: Off = False
    length_penalty: Annotated[Any, Only(1)] = 1
    spaces_between_special_tokens: Annotated[Any, Only(True)] = True
    bad_words: Annotated[Any, Only([])] = []
    allowed_token_ids: Annotated[Any, Only(None)] = None
    logprob_token_ids: Annotated[Any, Only(None)] = None
    prompt_logprobs: Annotated[Any, Only(None)] = None
    prompt_embeds: Annotated[Any, Only(None)] = None
    truncate_prompt_tokens: Annotated[Any, Only(None)] = None
    truncation_side: Annotated[Any, Only(None)] = None
    structured_outputs: Annotated[Any, Only(None)] = None
    logits_processors: Annotated[Any, Only([])] = []
    return_tokens_as_token_ids: Off = False
    return_token_ids: Off = False
    return_token_offsets: Off = False
    return_mm_kwargs: Annotated[Any, Only(True)] = True
    cache_salt: Annotated[Any, Only(None)] = None
    kv_transfer_params: Annotated[Any, Only(None)] = None
    ec_transfer_params: Annotated[Any, Only(None)] = None
    vllm_xargs: Annotated[Any, Only({})] = {}
    repetition_detection: Annotated[Any, Only(None)] = None
    routed_experts_prompt_start: Annotated[Any, Only(0)] = 0
    stream_interval: Annotated[Any, Only(1)] = 1
    thinking_token_budget: Annotated[Any, Only(-1)] = -1
    watermarking: Off = False
    # and transformers'.
    early_stopping: Off = False


def read_completion(body: Mapping[str, Any], engine: Engine, now: float) -> Completion:
    """The call that `body` makes. Raises ApiError naming the field and its limit."""
    tokenizer, served = engine.tokenizer, ", ".join(engine.served_names)
    if body.get("model") is None:
        raise bad("model", f"is missing; this server has {served}")
    asked = check(CompletionBody, body, engine)
    if asked.model not in engine.served_names:
        told = f"model: there is no {asked.model[:60]!r}; this server has {served}"
        raise ApiError(404, told, "model", "model_not_found")
    prompts = _prompts(asked.prompt, engine)
    _check_together(asked, prompts, engine)
    streams = iter(random_streams(asked.seed, prompts, asked.n))
    sampling = _sampling(asked, engine)
    num_logprobs = asked.logprobs if type(asked.logprobs) is int else None
    deferred = asked.service_tier == "flex" or _is_deferred(asked.priority)
    choices: list[Choice] = []
    name = "cmpl-" + uuid.uuid4().hex
    for prompt in prompts:
        group = Choices(asked.n)
        for _ in range(asked.n):
            ending = Ending(
                tokenizer,
                stop_strings(asked.stop),
                end_of_text=not asked.ignore_eos,
                stop_token_ids=asked.stop_token_ids,
                min_tokens=asked.min_tokens,
                include_stop=asked.include_stop_str_in_output,
                skip_special_tokens=asked.skip_special_tokens,
            )
            req = Request(
                id=f"{name}-{len(choices)}",
                tokens=list(prompt),
                max_tokens=max(1, asked.max_tokens),
                priority=Priority.DEFERRED if deferred else Priority.IMMEDIATE,
                arrival=now,
                sampling=replace(sampling, stream=next(streams)),
                stop=ending,
                choices=group,
                num_logprobs=num_logprobs,
                prompt_logprobs=asked.echo and num_logprobs is not None,
            )
            choices.append(Choice(req, ending, TextStream(ending, tokenizer.bytes_of(prompt) if asked.echo else b"")))
    return Completion(
        id=name if asked.request_id is None else f"cmpl-{asked.request_id}",
        model=engine.served_names[0],
        created=int(time.time()),
        choices=choices,
        tokenizer=tokenizer,
        echo=asked.echo,
        max_tokens=asked.max_tokens,
        logprobs=num_logprobs,
        tier=TIERS.get(asked.service_tier or ""),
        stream=asked.stream,
        include_usage=asked.stream_options.include_usage,
        usage_in_every_chunk=asked.stream_options.include_usage and asked.stream_options.continuous_usage_stats,
        num_prompts=len(prompts),
    )


def _sampling(asked: CompletionBody, engine: Engine) -> SamplingParams:
    ends = asked.stop_token_ids if asked.ignore_eos else [*asked.stop_token_ids, *engine.tokenizer.ends]
    return SamplingParams(
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        logit_bias=_biases(asked.logit_bias, engine),
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        min_tokens=asked.min_tokens,
        stop_token_ids=tuple(ends) if asked.min_tokens else (),
    )


def _biases(biases: dict[str, float], engine: Engine) -> tuple[tuple[int, float], ...]:
    """By token id. JSON's names are strings, so the ids are."""
    most = engine.tokenizer.vocab_size - 1
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 20 and int(name) <= most):
            raise bad("logit_bias", f"must have token ids between 0 and {most}, not {name[:60]!r}")
    return tuple((int(name), bias) for name, bias in biases.items() if bias)


def _is_deferred(priority: Priority | int) -> bool:
    return priority is Priority.DEFERRED if isinstance(priority, Priority) else priority > 0


def _prompts(prompt: Prompt, engine: Engine) -> list[list[int]]:
    """The tokens of each prompt. An empty text is the beginning of a document, as OpenAI has it."""
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    given: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    begin, encode = engine.tokenizer.begin, engine.tokenizer.encode
    prompts = [encode(check_prompt(one, engine)) if isinstance(one, str) else one for one in given]
    if begin is None and not all(prompts):
        raise bad("prompt", "must not be empty: this model has no token that begins a text")
    return [tokens or [begin] for tokens in prompts]


def _check_together(asked: CompletionBody, prompts: list[list[int]], engine: Engine) -> None:
    """What of the fields do not go together."""
    most, context = min(MAX_CHOICES, engine.limits.max_queue), engine.limits.max_context
    if asked.n * len(prompts) > most:
        raise bad("n", f"{len(prompts)} prompts of {asked.n} choices each are more than {most}")
    if not asked.max_tokens and not asked.echo:
        raise bad("max_tokens", f"must be an integer between 1 and {context - 1}, not 0; 0 is for echo alone")
    if asked.min_tokens > max(1, asked.max_tokens):
        raise bad("min_tokens", f"may be at most max_tokens ({asked.max_tokens}), not {asked.min_tokens}")
    if asked.best_of is not None and asked.best_of < asked.n:
        raise bad("best_of", f"must be at least n ({asked.n}), not {asked.best_of}")
    if asked.best_of is not None and asked.best_of > asked.n:
        told = f"best_of: is supported only as large as n ({asked.n}), not {asked.best_of}"
        raise ApiError(400, told, "best_of", "unsupported_parameter")
    if not asked.stream and asked.stream_options != StreamOptions():
        raise bad("stream_options", "only with stream: true")
    for prompt in prompts:
        if len(prompt) + asked.max_tokens > context:
            named = "prompt" if len(prompt) >= context else "max_tokens"
            told = (
                f"{named}: the prompt has {len(prompt)} tokens and max_tokens is {asked.max_tokens}; together at most {context}"
            )
            raise ApiError(400, f"{told} (the model's context)", named, "context_length_exceeded")
