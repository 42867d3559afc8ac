"""Stop strings over tokens that know nothing of them."""

import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.request import Request
from model.tokenizer import GPT2_PATTERN, StopStrings, Tokenizer

PIECES = [b"hel", b"lo, wo", b"rld", b". The ", b"END", b" of", b"\xe6\x97", b"\xa5\xe6\x9c", b"\xac", b"\n\n"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
VOCABULARY = Tokenizer(
    "pieces", tiktoken.Encoding("pieces", pat_str=GPT2_PATTERN, mergeable_ranks=RANKS, special_tokens={"<|end|>": len(RANKS)})
)


def stops_after(stops: list[str], generated: list[bytes], prompt: list[bytes] | None = None) -> int | None:
    """How many generated tokens there are when the stop condition is first met."""
    req = Request("r", [RANKS[piece] for piece in prompt or [b"hel"]], 100)
    condition = StopStrings(VOCABULARY, stops)
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


@settings(deadline=None)
@given(
    generated=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12),
    stops=st.lists(st.text("helo, wrdTEN.\n\u65e5\u672c", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_a_stop_is_seen_at_the_first_token_that_completes_it(generated: list[bytes], stops: list[str]):
    seen = [b"".join(generated[:count]) for count in range(1, len(generated) + 1)]
    expected = [count for count, data in enumerate(seen, 1) if any(stop.encode() in data for stop in stops)]
    assert stops_after(stops, generated) == (expected[0] if expected else None)


def test_cut_keeps_what_comes_before_the_first_stop():
    condition = StopStrings(VOCABULARY, ["END", "\n\n"])
    assert condition.cut("one\n\ntwo END three END") == "one"
    assert condition.cut("one END two\n\n") == "one "
    assert condition.cut("END") == ""
    assert condition.cut("one\ntwo") == "one\ntwo"
