"""Where a text ends before its length is reached, and what of it may be shown while it grows. Stop strings know nothing of
tokens: one may begin and end inside them."""

import codecs
from collections.abc import Sequence

from batching.request import Request
from model.tokenizer import Tokenizer


class Ending:
    """A request's stop condition: its generated text contains one of `stops` or, with `end_of_text`, the model said that it
    is over. Neither counts before the request has `min_tokens`."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, end_of_text: bool = False, min_tokens: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stops]
        self._window = max(map(len, self._stops), default=0)  # tokens: each is at least one byte
        self._ends = tokenizer.ends if end_of_text else frozenset()
        self._min_tokens = min_tokens

    def __call__(self, req: Request) -> bool:
        """Whether the last generated token ends the text; looks no further back than a stop could begin."""
        generated = len(req.tokens) - req.prompt_len
        if generated < self._min_tokens:
            return False
        if req.tokens[-1] in self._ends:
            return True
        return bool(self._stops) and self._begin(req.tokens[-min(generated, self._window) :]) is not None

    def said(self, output: Sequence[int], finish_reason: str | None) -> bytes:
        """What of the generated tokens is the text: without the stop that ended it."""
        if finish_reason != "stop" or not output:
            return self._tokenizer.bytes_of(output)
        if output[-1] in self._ends:
            return self._tokenizer.bytes_of(output[:-1])
        return self._tokenizer.bytes_of(output)[: self._begin(output)]

    def certain(self, output: Sequence[int]) -> bytes:
        """What of an output that still grows no stop can take back."""
        if len(output) >= max(1, self._min_tokens) and (output[-1] in self._ends or self._begin(output) is not None):
            return self.said(output, "stop")  # the end, though the request is not answered yet
        data = self._tokenizer.bytes_of(output)
        held = (n for stop in self._stops for n in range(min(len(stop) - 1, len(data)), 0, -1) if stop.startswith(data[-n:]))
        return data[: len(data) - max(held, default=0)]

    def _begin(self, tokens: Sequence[int]) -> int | None:
        """Where in the bytes of `tokens` the first stop begins that the last of them completes."""
        data, new = self._tokenizer.bytes_of(tokens), len(self._tokenizer.bytes_of(tokens[-1:]))
        places = [data.find(stop, max(0, len(data) - new - len(stop) + 1)) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)


class TextStream:
    """The text of a growing output in pieces, `before` it what it continues: never a byte that a stop could take back, never
    half a character."""

    def __init__(self, ending: Ending, before: bytes = b"") -> None:
        self._ending = ending
        self._before = before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent = 0

    def piece(self, output: Sequence[int], finish_reason: str | None) -> str:
        """What has become certain since the last call; all of it once there is a `finish_reason`."""
        data = self._ending.said(output, finish_reason) if finish_reason else self._ending.certain(output)
        new, self._sent = self._before + data[self._sent :], max(self._sent, len(data))
        self._before = b""
        return self._decoder.decode(new)
