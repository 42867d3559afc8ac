"""Where a text ends before its length is reached, and what of it may be shown while it grows. Stop strings know nothing of
tokens: one may begin and end inside them."""

import codecs
from collections.abc import Iterable, Sequence

from batching.request import Request
from model.tokenizer import Tokenizer


class Ending:
    """A request's stop condition: its generated text contains one of `stops`, or its last token is one of `stop_token_ids` or,
    with `end_of_text`, the model's own end. None counts before the request has `min_tokens`.

    What ended the text is no part of it, unless `include_stop`; the model's own end never is. With `skip_special_tokens` an end
    that did not end the text is not shown either.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        end_of_text: bool = False,
        stop_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stops]
        self._window = max(map(len, self._stops), default=0)  # tokens: each is at least one byte
        self._stop_tokens = frozenset(stop_token_ids)
        self._ends = self._stop_tokens | (tokenizer.ends if end_of_text else frozenset())
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._hidden = tokenizer.ends if skip_special_tokens else frozenset()

    def __call__(self, req: Request) -> bool:
        """Whether the last generated token ends the text; looks no further back than a stop could begin."""
        generated = len(req.tokens) - req.prompt_len
        if generated < self._min_tokens:
            return False
        if req.tokens[-1] in self._ends:
            return True
        looked_at = generated if self._hidden else min(generated, self._window)
        return bool(self._stops) and self._find_stop(req.tokens[-looked_at:]) is not None

    def shown(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens, as a text shows them."""
        return self._tokenizer.bytes_of([token for token in tokens if token not in self._hidden])

    def said(self, output: Sequence[int], finish_reason: str | None) -> bytes:
        """What of the generated tokens is the text: without the stop that ended it."""
        if finish_reason != "stop" or not output:
            return self.shown(output)
        if output[-1] in self._ends:
            return self.shown(output if self._include_stop and output[-1] in self._stop_tokens else output[:-1])
        found = self._find_stop(output)
        return self.shown(output)[: found and found[self._include_stop]]

    def certain(self, output: Sequence[int]) -> bytes:
        """What of an output that still grows no stop can take back."""
        if len(output) >= max(1, self._min_tokens) and (output[-1] in self._ends or self._find_stop(output) is not None):
            return self.said(output, "stop")  # the end, though the request is not answered yet
        data = self.shown(output)
        if self._include_stop:
            return data
        held = (n for stop in self._stops for n in range(min(len(stop) - 1, len(data)), 0, -1) if stop.startswith(data[-n:]))
        return data[: len(data) - max(held, default=0)]

    def _find_stop(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where in the bytes of `tokens` the first stop that the last of them completes begins and ends."""
        data, new = self.shown(tokens), len(self.shown(tokens[-1:]))
        places = [(data.find(stop, max(0, len(data) - new - len(stop) + 1)), len(stop)) for stop in self._stops]
        return min(((begin, begin + size) for begin, size in places if begin >= 0), default=None)


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
