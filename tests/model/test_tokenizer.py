"""GPT-2's vocabulary and the demo model's."""

import json
import socket
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import DEMO
from model.tokenizer import Tokenizer, load_demo_tokenizer, load_gpt2_tokenizer

DEMO_VOCABULARY = load_demo_tokenizer(DEMO)
TEXTS = [
    "Hello world",
    "  two leading spaces, and\n\n\tnew lines ",
    "It's 12345 o'clock; they've said so!",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\U0001f469\u200d\U0001f4bb",
    "",
]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    found = load_gpt2_tokenizer()
    if found is None:
        pytest.skip("tiktoken's cache (TIKTOKEN_CACHE_DIR) does not hold GPT-2's vocabulary")
    return found


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every connection fails; the list holds those that were tried."""
    tried: list[object] = []

    def fail(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: fail(None, args))
    return tried


def printable_bytes() -> dict[int, str]:
    """How GPT-2's files write a byte (Radford et al. 2019, encoder.py): itself if printable, else the next from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.fixture(scope="module")
def from_vocab_json(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Loaded from a folder with the vocab.json that Hugging Face ships, made from the real encoding."""
    written = printable_bytes()
    tokens = [gpt2.encoding.decode_single_token_bytes(i) for i in range(50256)]
    ids = {"".join(written[byte] for byte in token): i for i, token in enumerate(tokens)} | {"<|endoftext|>": 50256}
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    found = load_gpt2_tokenizer(folder)
    assert found is not None
    return found


# GPT-2's vocabulary.


def test_gpt2_reads_known_texts_as_its_known_ids(gpt2: Tokenizer):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the quick brown fox") == [262, 2068, 7586, 21831]
    assert gpt2.decode([15496, 995]) == "Hello world"
    assert gpt2.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_gives_a_text_back_as_it_was(gpt2: Tokenizer, text: str):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_vocab_json_gives_the_ids_of_tiktokens_own_encoding(gpt2: Tokenizer, from_vocab_json: Tokenizer):
    ours = from_vocab_json
    assert (ours.name, ours.vocab_size) == (gpt2.name, gpt2.vocab_size)
    own = tiktoken.get_encoding("gpt2")
    for i in range(50257):
        assert ours.encoding.decode_single_token_bytes(i) == own.decode_single_token_bytes(i)
    for text in [*TEXTS, Path(__file__).read_text("utf-8")]:
        assert ours.encode(text) == own.encode_ordinary(text)


@given(text=st.text(max_size=80))
def test_vocab_json_cuts_any_text_as_tiktoken_does(gpt2: Tokenizer, from_vocab_json: Tokenizer, text: str):
    assert from_vocab_json.encode(text) == gpt2.encoding.encode_ordinary(text)


def test_where_nothing_is_there_no_vocabulary_is_found_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_gpt2_tokenizer() is None
    assert load_gpt2_tokenizer(tmp_path) is None
    assert not no_network
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_of_tiktoken_counts_as_none_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
):
    names = ["6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"]  # tiktoken's names
    for name in names:
        (tmp_path / name).write_text("half a downl")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # as in a new process
    assert load_gpt2_tokenizer() is None
    assert not no_network


# The demo model's vocabulary.


@given(text=st.text(max_size=80))
def test_the_demo_vocabulary_gives_any_text_back_as_it_was(text: str):
    tokens = DEMO_VOCABULARY.encode(text)
    assert DEMO_VOCABULARY.decode(tokens) == text
    assert all(0 <= token < DEMO_VOCABULARY.vocab_size for token in tokens)


@given(text=st.text(st.sampled_from("a \u00e9\u65e5\u0915\U0001f600\U0001f469\u200d"), max_size=30))
def test_a_text_decoded_token_by_token_only_ever_grows(text: str):
    tokens = DEMO_VOCABULARY.encode(text)
    shown = ""
    for end in range(len(tokens) + 1):
        now = DEMO_VOCABULARY.decode(tokens[:end])
        assert now.startswith(shown), "what was sent is never taken back"
        assert text.startswith(now), "no character shows before its last byte"
        shown = now
    assert shown == text


def tokens_of(data: bytes) -> list[int]:
    """One token a byte: any byte string can be generated."""
    return [DEMO_VOCABULARY.encoding.encode_single_token(bytes([byte])) for byte in data]


@pytest.mark.parametrize("character", ["\u00e9", "\u65e5", "\U0001f600"])
def test_a_character_whose_last_bytes_are_still_to_come_is_left_out(character: str):
    data = character.encode()
    for end in range(1, len(data)):
        assert DEMO_VOCABULARY.decode(tokens_of(b"ab" + data[:end])) == "ab"
    assert DEMO_VOCABULARY.decode(tokens_of(b"ab" + data)) == "ab" + character


@pytest.mark.parametrize("data", [b"a\xffb", b"a\x80b", b"a\xc3b", b"a\xe6\x97b"])
def test_impossible_bytes_become_the_replacement_character(data: bytes):
    assert DEMO_VOCABULARY.decode(tokens_of(data)) == "a\ufffdb"


def test_special_tokens_written_in_a_prompt_are_plain_text():
    text = "before<|endoftext|>after"
    tokens = DEMO_VOCABULARY.encode(text)
    assert DEMO_VOCABULARY.encoding.eot_token not in tokens
    assert DEMO_VOCABULARY.decode(tokens) == text


def test_a_prompt_with_half_a_surrogate_pair_is_read_with_the_replacement_character():
    assert DEMO_VOCABULARY.decode(DEMO_VOCABULARY.encode("a\ud800b")) == "a\ufffdb"
