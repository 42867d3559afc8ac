"""A call of /v1/completions, and its answer in OpenAI's form. Knows nothing of HTTP, so that a line of a batch is answered by
the same code.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from batching.request import Request
from model.ending import Ending, TextStream
from model.tokenizer import Tokenizer, text_of


class Reported:
    """Which tokens of an answer, an echoed prompt's included, were reported, and where each begins in the text: after all
    characters that were whole before it."""

    def __init__(self) -> None:
        self.tokens = 0
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def offsets(self, pieces: Sequence[bytes]) -> list[int]:
        """Where the next tokens begin, by their bytes."""
        offsets = []
        for piece in pieces:
            offsets.append(self._characters)
            self._characters += len(self._decoder.decode(piece))
        self.tokens += len(pieces)
        return offsets


@dataclass
class Choice:
    """One text that is asked for. `request` computes it; `stream` begins with an echoed prompt."""

    request: Request
    ending: Ending
    stream: TextStream
    reported: Reported = field(default_factory=Reported)
    num_sent: int = 0  # generated tokens that have been streamed
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
    usage_in_every_chunk: bool = False

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
                usage = _usage([choice.request], choice.num_sent) if self.usage_in_every_chunk else None
                yield self._object([chunk]) | ({"usage": usage} if self.include_usage else {})

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk that ends a streamed answer, where it is asked for."""
        if self.include_usage:
            yield self._object([]) | {"usage": self._usage()}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        tier = {"service_tier": self.tier} if self.tier else {}
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices} | tier

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        firsts = [choice.request for choice in self.choices[:: len(self.choices) // self.num_prompts]]
        output = sum(len(self._output(choice.request)) for choice in self.choices)
        return _usage(firsts, output)

    def _output(self, req: Request) -> list[int]:
        return req.output[: self.max_tokens]  # with max_tokens 0 the engine still computes one

    def _prompt(self, req: Request) -> list[int]:
        """Where it is echoed."""
        return req.tokens[: req.prompt_len] if self.echo else []

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        req, output = choice.request, self._output(choice.request)
        data = choice.ending.said(output, req.finish_reason if output else None)
        text = text_of(self.tokenizer.bytes_of(self._prompt(req)) + data)
        reason = req.finish_reason if output else "length"
        logprobs = self._logprobs(choice, output, Reported())
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
        text = choice.stream.piece(output, reason)
        if not text and reason is None:
            return None
        logprobs = self._logprobs(choice, output, choice.reported)
        choice.num_sent = len(output)
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return piece | ({"mode": req.mode} if reason else {})

    def _logprobs(self, choice: Choice, output: list[int], reported: Reported) -> dict[str, Any] | None:
        """OpenAI's four lists, over an echoed prompt and the drawn tokens, those of a stop included, from the first that is not
        `reported`. A prompt's first token has no probability: null. The drawn one is always named beside the likeliest."""
        if self.logprobs is None:
            return None
        req, shown, bytes_of = choice.request, choice.ending.shown, self.tokenizer.bytes_of
        prompt, first = self._prompt(req), reported.tokens
        tokens = [*prompt, *output][first:]
        pieces = [(bytes_of if first + i < len(prompt) else shown)([token]) for i, token in enumerate(tokens)]
        place = first + req.prompt_len - len(prompt)  # in the request's tokens
        found = [req.logprobs.get(place + i) for i in range(len(tokens))]
        names = [self._name(token) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [entry and entry.logprob for entry in found],
            "top_logprobs": [
                entry and {self._name(one): value for one, value in entry.top} | {name: entry.logprob}
                for name, entry in zip(names, found, strict=True)
            ]
            if self.logprobs
            else None,
            "text_offset": reported.offsets(pieces),
        }

    def _name(self, token: int) -> str:
        """A token as text; one that is no whole characters as `bytes:\\x..`, which is OpenAI's way."""
        data = self.tokenizer.bytes_of([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _usage(firsts: Sequence[Request], output: int) -> dict[str, Any]:
    """Of prompts, by a request of each, and `output` generated tokens."""
    prompt, cached = sum(req.prompt_len for req in firsts), sum(req.num_cached for req in firsts)
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}
