"""Stop strings over tokens that know nothing of them."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from batching.request import Request
from model.ending import Ending, TextStream
from model.tokenizer import Tokenizer, text_of

PIECES = [b"hel", b"lo, wo", b"rld", b". The ", b"END", b" of", b"\xe6\x97", b"\xa5\xe6\x9c", b"\xac", b"\n\n"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
SAID = (*(bytes([byte]) for byte in range(256)), *PIECES, b"<|end|>")
END = len(SAID) - 1
VOCABULARY = Tokenizer("pieces", tokenizers.Tokenizer(models.BPE()), SAID, frozenset([END, RANKS[b" of"]]), END)


def stops_after(stops: list[str], generated: list[bytes], prompt: list[bytes] | None = None) -> int | None:
    """How many generated tokens there are when the stop condition is first met."""
    req = Request("r", [RANKS[piece] for piece in prompt or [b"hel"]], 100)
    condition = Ending(VOCABULARY, stops)
    for count, piece in enumerate(generated, 1):
        req.tokens.append(RANKS[piece])
        if condition(req):
            return count
    return None


def test_a_stop_that_is_one_token_stops_at_it():
    assert stops_after(["END"], [b"hel", b"END", b" of"]) == 2


def test_a_stop_may_begin_and_end_inside_tokens():
    assert stops_after(["o, w"], [b"hel", b"lo, wo", b"rld"]) == 2, "inside one token"
    assert stops_after(["llo, world. T"], [b"hel", b"lo, wo", b"rld", b". The ", b"END"]) == 4, "over four"
    assert stops_after(["\u65e5\u672c"], [b"hel", b"\xe6\x97", b"\xa5\xe6\x9c", b"\xac", b"END"]) == 4, "characters cut in two"


def test_a_stop_is_found_however_many_tokens_came_before_it():
    assert stops_after(["END"], [b"hel"] * 50 + [b"E", b"N", b"D", b" of"]) == 53


def test_the_first_of_several_stops_to_be_completed_stops():
    generated = [b"hel", b"lo, wo", b"rld", b". The ", b"END"]
    assert stops_after(["END", "ld"], generated) == 3
    assert stops_after(["never", "END", "nor this very long one"], generated) == 5
    assert stops_after(["never", "nor this"], generated) is None


def test_a_stop_in_the_prompt_does_not_count():
    assert stops_after(["END"], [b"hel", b"rld"], prompt=[b"END"]) is None


def test_a_stop_that_begins_in_the_prompt_does_not_count():
    assert stops_after(["The END"], [b"END", b" of"], prompt=[b". The "]) is None


@given(
    generated=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12),
    stops=st.lists(st.text("helo, wrdTEN.\n\u65e5\u672c", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_a_stop_is_seen_at_the_first_token_that_completes_it(generated: list[bytes], stops: list[str]):
    seen = [b"".join(generated[:count]) for count in range(1, len(generated) + 1)]
    expected = [count for count, data in enumerate(seen, 1) if any(stop.encode() in data for stop in stops)]
    assert stops_after(stops, generated) == (expected[0] if expected else None)


def test_the_text_is_what_comes_before_the_first_stop():
    ending = Ending(VOCABULARY, ["END", "\n\n"])
    output = [RANKS[piece] for piece in (b"hel", b"lo, wo", b"END")]
    assert ending.said(output, "stop") == b"hello, wo"
    assert ending.said(output, "length") == b"hello, woEND"
    assert Ending(VOCABULARY, ["wo", "o, w"]).said(output[:2], "stop") == b"hell", (
        "of two that one token completes, the earlier"
    )


@pytest.mark.parametrize("over", VOCABULARY.ends)
def test_the_end_of_the_text_is_not_part_of_it(over: int):
    """Of several that a model may have."""
    req = Request("r", [0, RANKS[b"hel"], over], 9)
    req.prompt_len = 1
    assert Ending(VOCABULARY, end_of_text=True)(req)
    assert Ending(VOCABULARY, ["never"], end_of_text=True)(req)
    assert not Ending(VOCABULARY)(req)
    assert Ending(VOCABULARY, end_of_text=True).said(req.output, "stop") == b"hel"


def test_nothing_ends_a_text_before_its_least_length():
    ending = Ending(VOCABULARY, ["END"], end_of_text=True, min_tokens=3)
    req = Request("r", [0], 9)
    pieces = [RANKS[b"END"], END, RANKS[b"hel"], RANKS[b"END"]]
    met = []
    for token in pieces:
        req.tokens.append(token)
        met.append(ending(req))
    assert met == [False, False, False, True], "a stop that was passed over does not count later"
    assert ending.said(req.output, "stop") == b"END<|end|>hel"


@given(
    generated=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12),
    stops=st.lists(st.text("helo, wrdTEN.\n\u65e5\u672c", min_size=1, max_size=6), max_size=3),
)
def test_a_streamed_text_is_the_whole_text_in_pieces(generated: list[bytes], stops: list[str]):
    req = Request("r", [0], 100)
    ending = Ending(VOCABULARY, stops)
    stream, pieces, reason = TextStream(ending), [], None
    for count, piece in enumerate(generated, 1):
        req.tokens.append(RANKS[piece])
        reason = "stop" if ending(req) else "length" if count == len(generated) else None
        pieces.append(stream.piece(req.output, reason))
        if reason:
            break
    whole = b"".join(generated)
    first = min((whole.find(stop.encode()) for stop in stops if stop.encode() in whole), default=len(whole))
    if reason == "length":
        assert "".join(pieces) == text_of(whole)
    else:
        assert whole.startswith(ending.said(req.output, "stop"))
        assert "".join(pieces) == text_of(ending.said(req.output, "stop"))
        assert first <= len(ending.said(req.output, "stop")), "a stop that ends sooner may begin later"


def test_an_end_that_is_not_yet_answered_is_not_shown_either():
    """A static batch holds its finished rows, so that their last token is known long before they are answered."""
    ending = Ending(VOCABULARY, ["END"], end_of_text=True)
    output = [RANKS[b"hel"], RANKS[b"END"]]
    assert ending.certain(output) == b"hel"
    assert ending.certain([RANKS[b"hel"], END]) == b"hel"
    assert ending.certain([RANKS[b"hel"], RANKS[b"E"]]) == b"hel"
