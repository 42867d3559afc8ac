"""A call of /v1/completions: what its body asks for, and the answer in OpenAI's form. Knows nothing of HTTP, so that a line of
a batch is read and answered by the same code.
"""

import secrets
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from api.errors import ApiError, bad
from api.fields import MAX_SEED, MAX_TEMPERATURE, check_prompt, instead, number, priority, stops, whole
from batching.loop import Engine
from batching.request import Priority, Request, SamplingParams
from model.ending import Ending, TextStream
from model.tokenizer import Tokenizer, text_of

FIELDS = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "echo", "logprobs", "stream",
    "stream_options", "ignore_eos", "min_tokens", "service_tier", "priority", "user",
)  # fmt: skip
NEUTRAL = {"best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",)}
TIERS = {"auto": "default", "default": "default", "flex": "flex"}  # what a tier is answered with
MAX_TOKENS = 16  # where a call does not say, as OpenAI has it
MAX_CHOICES = 128
MAX_LOGPROBS = 5


@dataclass
class Choice:
    """One text that is asked for. `request` computes it."""

    request: Request
    ending: Ending
    stream: TextStream
    num_sent: int = 0  # tokens whose log probabilities were streamed
    offset: int = 0  # characters of the tokens that were reported, and of an echoed prompt
    finished: bool = False


@dataclass(frozen=True)
class Completion:
    """What the call asks for, by choice: `n` for each prompt, in order."""

    id: str
    model: str
    created: int
    choices: list[Choice]
    tokenizer: Tokenizer
    echo: bool
    max_tokens: int
    logprobs: int | None
    tier: str | None
    stream: bool
    include_usage: bool
    num_prompts: int

    @property
    def requests(self) -> list[Request]:
        return [choice.request for choice in self.choices]

    def answer(self) -> dict[str, Any]:
        """The whole response, once every request is answered."""
        return self._object([self._choice(i, choice) for i, choice in enumerate(self.choices)]) | {"usage": self._usage()}

    def news(self) -> Iterator[dict[str, Any]]:
        """What has become known since the last call, as chunks of a streamed answer."""
        for i, choice in enumerate(self.choices):
            if chunk := self._piece(i, choice):
                yield self._object([chunk]) | ({"usage": None} if self.include_usage else {})

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk that ends a streamed answer, where it is asked for."""
        if self.include_usage:
            yield self._object([]) | {"usage": self._usage()}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        tier = {"service_tier": self.tier} if self.tier else {}
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices} | tier

    def _usage(self) -> dict[str, int]:
        prompt = sum(choice.request.prompt_len for choice in self.choices) * self.num_prompts // len(self.choices)
        output = sum(len(self._output(choice.request)) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _output(self, req: Request) -> list[int]:
        return req.output[: self.max_tokens]  # with max_tokens 0 the engine still computes one

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        req, output = choice.request, self._output(choice.request)
        data = choice.ending.said(output, req.finish_reason if output else None)
        prompt = req.tokens[: req.prompt_len] if self.echo else []
        text = text_of(self.tokenizer.bytes_of(prompt) + data)
        reason = req.finish_reason if output else "length"
        logprobs = self._logprobs(req, prompt, output, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, "mode": req.mode}

    def _piece(self, index: int, choice: Choice) -> dict[str, Any] | None:
        req = choice.request
        if choice.finished or not req.output:
            return None
        reason = req.finish_reason if req.answered_at is not None else None
        choice.finished = reason is not None
        output = self._output(req)
        if reason and not output:
            reason = "length"
        first = not choice.offset
        prompt = req.tokens[: req.prompt_len] if self.echo and first else []
        text = self.tokenizer.decode(prompt) + choice.stream.piece(output, reason)
        if not text and reason is None:
            return None
        new = output[choice.num_sent :]
        logprobs = self._logprobs(req, prompt, new, choice.offset, choice.num_sent)
        choice.num_sent, choice.offset = len(output), choice.offset + len(self.tokenizer.decode([*prompt, *new]))
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return piece | ({"mode": req.mode} if reason else {})

    def _logprobs(
        self, req: Request, prompt: list[int], output: list[int], offset: int, num_sent: int = 0
    ) -> dict[str, Any] | None:
        """OpenAI's four lists, over an echoed prompt and the drawn tokens, those of a stop included. A prompt's first token
        has no probability: null. Beside the likeliest tokens the drawn one is always named."""
        if self.logprobs is None:
            return None
        places = [*range(len(prompt)), *range(req.prompt_len + num_sent, req.prompt_len + num_sent + len(output))]
        found = [req.logprobs.get(place) for place in places]
        names = [self._name(token) for token in [*prompt, *output]]
        offsets, data = [], b""
        for token in [*prompt, *output]:
            offsets.append(offset + len(text_of(data)))
            data += self.tokenizer.bytes_of([token])
        return {
            "tokens": names,
            "token_logprobs": [entry and entry.logprob for entry in found],
            "top_logprobs": [
                entry and {self._name(one): value for one, value in entry.top} | {name: entry.logprob}
                for name, entry in zip(names, found, strict=True)
            ]
            if self.logprobs
            else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """A token as text; one that is no whole characters as `bytes:\\x..`, which is OpenAI's way."""
        data = self.tokenizer.bytes_of([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def read_completion(body: dict[str, Any], engine: Engine, now: float) -> Completion:
    """The call that `body` makes. Raises ApiError naming the field and its limit; nothing that is asked for is ignored."""
    body = {name: value for name, value in body.items() if value is not None}
    _check_names(body)
    tokenizer, limits = engine.tokenizer, engine.limits
    model = _model(body, engine.about["model"])
    prompts = _prompts(body, tokenizer, engine)
    n = whole(body, "n", 1, 1, MAX_CHOICES)
    most = min(MAX_CHOICES, limits.max_queue)
    if n * len(prompts) > most:
        raise bad("n", f"{len(prompts)} prompts of {n} choices each are more than {most}")
    echo, stream = _truth(body, "echo"), _truth(body, "stream")
    max_tokens = whole(body, "max_tokens", MAX_TOKENS, 0 if echo else 1, limits.max_context - 1)
    logprobs = whole(body, "logprobs", None, 0, MAX_LOGPROBS) if "logprobs" in body else None
    min_tokens = whole(body, "min_tokens", 0, 0, max(1, max_tokens))
    for prompt in prompts:
        _check_length(len(prompt), max_tokens, limits.max_context)
    tier = body.get("service_tier")
    if tier is not None and (not isinstance(tier, str) or tier not in TIERS):
        raise bad("service_tier", f"must be one of {', '.join(TIERS)}" + instead(body, "service_tier"))
    kind = priority(body)
    seed = whole(body, "seed", secrets.randbits(62), 0, MAX_SEED - MAX_CHOICES)
    sampling = SamplingParams(
        temperature=number(body, "temperature", 1.0, 0.0, MAX_TEMPERATURE) or 0.0,
        top_k=whole(body, "top_k", 0, 0, tokenizer.vocab_size),
        top_p=number(body, "top_p", 1.0, 1e-6, 1.0) or 1.0,
        min_tokens=min_tokens,
        not_yet=tokenizer.end_of_text if min_tokens else -1,
    )
    stop_strings = stops(body)
    ignore_eos = _truth(body, "ignore_eos")
    choices: list[Choice] = []
    name = "cmpl-" + uuid.uuid4().hex
    for prompt in prompts:
        for i in range(n):
            ending = Ending(tokenizer, stop_strings, end_of_text=not ignore_eos, min_tokens=min_tokens)
            req = Request(
                id=f"{name}-{len(choices)}",
                tokens=list(prompt),
                max_tokens=max(1, max_tokens),
                priority=Priority.DEFERRED if tier == "flex" else kind,
                arrival=now,
                sampling=replace(sampling, seed=seed + i),
                stop=ending,
                num_logprobs=logprobs,
                prompt_logprobs=echo and logprobs is not None,
            )
            choices.append(Choice(req, ending, TextStream(ending)))
    include_usage = _include_usage(body, stream)
    shown_tier = TIERS.get(tier) if tier else None
    created = int(time.time())
    return Completion(
        name, model, created, choices, tokenizer, echo, max_tokens, logprobs, shown_tier, stream, include_usage, len(prompts)
    )


def _check_names(body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if isinstance(value, bool) or value not in NEUTRAL[name]:
                raise ApiError(400, f"{name}: not supported by this server", name, "unsupported_parameter")
        elif name not in FIELDS:
            shown = str(name)[:100]
            raise ApiError(400, f"{shown}: no such field; there are: {', '.join(FIELDS)}", shown, "unknown_parameter")


def _model(body: dict[str, Any], served: str) -> str:
    if "model" not in body:
        raise bad("model", f"is missing; this server has {served!r}")
    if body["model"] != served:
        told = f"model: there is no {str(body['model'])[:60]!r}; this server has {served!r}"
        raise ApiError(404, told, "model", "model_not_found")
    return served


def _prompts(body: dict[str, Any], tokenizer: Tokenizer, engine: Engine) -> list[list[int]]:
    """The tokens of each prompt. An empty text is the beginning of a document, as OpenAI has it."""
    told = "must be a text, a list of texts, a list of token ids, or a list of such lists"
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not _is_token(prompt[0])
    given = prompt if several else [prompt]
    if isinstance(given, list) and len(given) > MAX_CHOICES:
        raise bad("prompt", f"may be at most {MAX_CHOICES} prompts, not {len(given)}")
    prompts = []
    for one in given or ():
        if isinstance(one, str):
            tokens = tokenizer.encode(check_prompt(one, engine.limits)) or [tokenizer.end_of_text]
        elif isinstance(one, list) and one and all(map(_is_token, one)):
            tokens = one
            if not all(0 <= token < tokenizer.vocab_size for token in tokens):
                raise bad("prompt", f"token ids must lie between 0 and {tokenizer.vocab_size - 1}")
        else:
            raise bad("prompt", told + instead(body, "prompt"))
        prompts.append(tokens)
    return prompts


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_length(prompt: int, max_tokens: int, context: int) -> None:
    if prompt + max(1, max_tokens) > context:
        named = "prompt" if prompt >= context else "max_tokens"
        told = f"{named}: the prompt has {prompt} tokens and max_tokens is {max_tokens}; together they may be at most {context}"
        raise ApiError(400, f"{told} (the model's context)", named, "context_length_exceeded")


def _truth(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad(name, "must be true or false" + instead(body, name))
    return value


def _include_usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options", {})
    if "stream_options" in body and not stream:
        raise bad("stream_options", "only with stream: true")
    if not isinstance(options, dict):
        raise bad("stream_options", "must be an object" + instead(body, "stream_options"))
    for name in options:
        if name != "include_usage":
            raise bad(f"stream_options.{str(name)[:60]}", "no such option; there is include_usage")
    return _truth(options, "include_usage")
