"""A streamed answer of /v1/completions is the whole one in pieces: text, log probabilities and offsets, over vocabularies that
cut characters in two."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from api.completion import Choice, Completion
from batching.request import Logprob, Request
from model.ending import Ending, TextStream
from model.tokenizer import Tokenizer

PIECES = [b"the ", b"END", b" of", *("日本é\U0001f642".encode()[i : i + 2] for i in range(0, 12, 2))]
RANKS = {bytes([byte]): byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(dict.fromkeys(PIECES))}
VOCABULARY = Tokenizer("pieces", Backend(BPE()), (*RANKS, b"<|end|>"), frozenset([len(RANKS)]), len(RANKS))
tokens = st.lists(
    st.sampled_from([*(RANKS[piece] for piece in RANKS if len(piece) > 1), 0xE6, 0x97, 0xA5, 0xFF, 65]), max_size=12
)


def completion(req: Request, stops: list[str], echo: bool, logprobs: int | None, max_tokens: int) -> Completion:
    ending = Ending(VOCABULARY, stops, end_of_text=True)
    req.stop = ending
    before = VOCABULARY.bytes_of(req.tokens[: req.prompt_len]) if echo else b""
    choice = Choice(req, ending, TextStream(ending, before))
    return Completion("id", "demo", 0, [choice], VOCABULARY, echo, max_tokens, logprobs, None, True, False, 1)


@given(
    prompt=st.lists(st.integers(0, len(RANKS) - 1), min_size=1, max_size=6) | tokens.filter(bool),
    output=tokens.filter(bool),
    stops=st.lists(st.sampled_from(["END", "本", " of", "é", "日本"]), max_size=2),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
    seen=st.sets(st.integers(0, 12)),
    nothing=st.booleans(),
)
def test_the_pieces_of_a_stream_are_the_whole_answer(
    prompt: list[int], output: list[int], stops: list[str], echo: bool, logprobs: int | None, seen: set[int], nothing: bool
) -> None:
    max_tokens = 0 if nothing and echo else len(output)
    req = Request("r", list(prompt), max(1, max_tokens))
    call = completion(req, stops, echo, logprobs, max_tokens)
    chunks: list[dict[str, Any]] = []
    for count, token in enumerate(output[: req.max_tokens], 1):
        req.tokens.append(token)
        for place in range(1, len(req.tokens)):
            req.logprobs[place] = Logprob(-float(place), [(0, -1.0), (1, -2.0)][: logprobs or 0])
        ended = req.stop is not None and req.stop(req)
        if count in seen:
            chunks += call.news()  # also before the request is answered, as in a static batch
        if ended:
            break
    req.finish_reason, req.answered_at = "stop" if ended else "length", 1.0
    chunks += call.news()
    chunks += call.news()
    pieces = [chunk["choices"][0] for chunk in chunks]
    (whole,) = call.answer()["choices"]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [whole["finish_reason"]]
    if logprobs is None:
        assert {piece["logprobs"] for piece in pieces} == {whole["logprobs"]} == {None}
        return
    for name, listed in whole["logprobs"].items():
        if listed is None:
            assert {piece["logprobs"][name] for piece in pieces} == {None}
        else:
            assert [one for piece in pieces for one in piece["logprobs"][name]] == listed
    said = (prompt if echo else []) + req.output[:max_tokens]
    assert len(whole["logprobs"]["tokens"]) == len(said)
    for i, offset in enumerate(whole["logprobs"]["text_offset"]):
        assert offset == len(VOCABULARY.decode(said[:i]))
