"""GPT-2's vocabulary and the demo model's."""

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.checkpoint import DEMO
from model.tokenizer import (
    CACHED_MERGES,
    CACHED_VOCABULARY,
    END_OF_TEXT,
    NoVocabulary,
    Tokenizer,
    VocabularyError,
    load_gpt2_tokenizer,
    load_tokenizer,
)

ROOT = Path(__file__).parents[2]
DEMO_VOCABULARY = load_tokenizer(DEMO)
TEXTS = [
    "Hello world",
    "  two leading spaces, and\n\n\tnew lines ",
    "It's 12345 o'clock; they've said so!",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\U0001f469\u200d\U0001f4bb",
    "",
]


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


@pytest.fixture(scope="module")
def oracle(gpt2: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module", params=["with merges.txt", "vocab.json alone"])
def from_vocab_json(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    """Loaded from a folder with the files that Hugging Face ships, made from those of OpenAI."""
    folder = tmp_path_factory.mktemp("vocabulary")
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    shutil.copy(cache / CACHED_VOCABULARY, folder / "vocab.json")
    if request.param == "with merges.txt":
        shutil.copy(cache / CACHED_MERGES, folder / "merges.txt")
    return load_tokenizer(folder)


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


def test_vocab_json_gives_the_ids_of_tiktokens_own_encoding(oracle: tiktoken.Encoding, from_vocab_json: Tokenizer):
    ours = from_vocab_json
    assert (ours.name, ours.vocab_size) == ("gpt2", 50257)
    assert (ours.ends, ours.begin) == ({50256}, 50256)
    for i in range(50257):
        assert ours.bytes_of([i]) == oracle.decode_single_token_bytes(i)
    for text in [*TEXTS, Path(__file__).read_text("utf-8")]:
        assert ours.encode(text) == oracle.encode_ordinary(text)


@given(text=st.text(max_size=80))
def test_any_text_is_cut_as_tiktoken_does(oracle: tiktoken.Encoding, from_vocab_json: Tokenizer, text: str):
    assert from_vocab_json.encode(text) == oracle.encode_ordinary(text)


def test_where_nothing_is_there_no_vocabulary_is_found_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_gpt2_tokenizer() is None
    with pytest.raises(NoVocabulary, match=r"brings no vocabulary \(tokenizer\.json, or vocab\.json and merges\.txt\)$"):
        load_tokenizer(tmp_path)
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
    return [DEMO_VOCABULARY.pieces.index(bytes([byte])) for byte in data]


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
    assert not DEMO_VOCABULARY.ends & set(tokens)
    assert DEMO_VOCABULARY.decode(tokens) == text


def test_a_prompt_with_half_a_surrogate_pair_is_read_with_the_replacement_character():
    assert DEMO_VOCABULARY.decode(DEMO_VOCABULARY.encode("a\ud800b")) == "a\ufffdb"


# As Hugging Face's programs read it.


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory):
    """What load generators and evaluations call, on the folder as it ships."""
    return AutoTokenizer.from_pretrained(str(DEMO), local_files_only=True)


def test_the_demo_folder_is_a_tokenizer_for_transformers(huggingface):
    assert len(huggingface) == DEMO_VOCABULARY.vocab_size == 2560
    assert huggingface.model_max_length == 512
    ids = {huggingface.bos_token_id, huggingface.eos_token_id, huggingface.pad_token_id}
    assert ids == DEMO_VOCABULARY.ends == {DEMO_VOCABULARY.begin} == {2559}
    text = "".join(
        path.read_text("utf-8") for folder in ("docs", "tests/model", "client") for path in (ROOT / folder).glob("*.*")
    )
    text += "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3400)])) + "".join(TEXTS)
    tokens = DEMO_VOCABULARY.encode(text)
    assert len(tokens) > 100_000
    assert huggingface(text, split_special_tokens=True)["input_ids"] == tokens
    assert huggingface.decode(tokens) == text


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda data: data.decode("utf-8", "replace"))))
def test_transformers_cuts_any_text_as_the_server_does(huggingface, text: str):
    tokens = DEMO_VOCABULARY.encode(text)
    assert huggingface(text, split_special_tokens=True)["input_ids"] == tokens
    assert huggingface.decode(tokens) == text


# What other checkpoints bring.


def made(tmp_path: Path, change=lambda spec: None, special: str = END_OF_TEXT, first: bool = False) -> Path:
    """A folder with a small vocabulary: the bytes, " t" and " th", and a special token at its end or at id 0."""
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "\u0120t", "\u0120th"]
    tokens = [special, *tokens] if first else [*tokens, special]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("\u0120", "t"), ("\u0120t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([special])
    spec = json.loads(backend.to_str())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return folder


def test_a_vocabulary_of_its_own_has_the_folders_name_and_its_own_end(tmp_path: Path):
    for first, end in ((False, 258), (True, 0)):
        ours = load_tokenizer(made(tmp_path, first=first))
        assert (ours.name, ours.vocab_size, ours.ends, ours.begin) == ("mine", 259, {end}, end)
        assert ours.decode(ours.encode("in the \u65e5")) == "in the \u65e5"
        assert ours.bytes_of([end]) == b"<|endoftext|>"
        assert end not in ours.encode("<|endoftext|>")


def test_a_special_token_first_is_also_read_from_vocab_json(tmp_path: Path):
    folder = made(tmp_path, first=True)
    ours = load_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert load_tokenizer(folder).pieces == ours.pieces
    (folder / "merges.txt").write_text("#version: 0.2\n\u0120 t\n\u0120t h\n", "utf-8")
    (folder / "added_tokens.json").write_text('{"[PAD]": 260, "[CLS]": 259}')
    found = load_tokenizer(folder)
    assert found.pieces == (*ours.pieces, b"[CLS]", b"[PAD]")
    assert found.ends == {0}
    (folder / "added_tokens.json").write_text('{"[PAD]": 270}')
    with pytest.raises(VocabularyError, match=r"added_tokens\.json: its ids do not follow those of vocab\.json"):
        load_tokenizer(folder)


def test_added_tokens_say_what_they_are_called_and_those_that_are_not_special_are_read_in_texts(tmp_path: Path):
    def add(spec: dict) -> None:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        spec["added_tokens"] += [
            {"id": 259, "content": "caf\u00e9\u65e5", "special": False, **plain},
            {"id": 260, "content": "[PAD]", "special": True, **plain},
        ]

    ours = load_tokenizer(made(tmp_path, add))
    assert ours.vocab_size == 261
    assert ours.decode([259, 260]) == "caf\u00e9\u65e5[PAD]"
    assert 259 in ours.encode("a caf\u00e9\u65e5")
    assert not {258, 260} & set(ours.encode("[PAD]<|endoftext|>"))


def test_what_training_left_behind_cuts_no_prompt_and_fills_none(tmp_path: Path):
    def leave(spec: dict) -> None:
        spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        spec["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        spec["padding"] |= {"pad_id": 258, "pad_type_id": 0, "pad_token": END_OF_TEXT}

    assert len(load_tokenizer(made(tmp_path, leave)).encode("abcdefgh")) == 8


def test_a_template_around_every_text_is_kept_as_transformers_keeps_it(tmp_path: Path):
    def frame(spec: dict) -> None:
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        start = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
        known = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [258], "tokens": [END_OF_TEXT]}}
        spec["post_processor"] = {"type": "TemplateProcessing", "single": [start, sequence], "pair": [sequence, sequence]}
        spec["post_processor"]["special_tokens"] = known

    folder = made(tmp_path, frame)
    ours = load_tokenizer(folder)
    assert ours.encode("a")[0] == 258
    assert ours.encode("a b") == PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))("a b")["input_ids"]
    with pytest.raises(VocabularyError, match="has 259 tokens, the model only 258"):
        ours.for_model(258, (), None)


def test_other_kinds_of_vocabulary_are_refused_with_what_was_found(tmp_path: Path):
    def setting(**values):
        return lambda spec: spec["model"].update(values)

    kinds = {
        "Unigram": lambda spec: spec.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, added_tokens=[]),
        "WordPiece": lambda spec: spec.update(
            model={"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}, "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 9},
            added_tokens=[],
        ),
        "Metaspace": lambda spec: spec.update(decoder={"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}),
        "NoneType": lambda spec: spec.update(decoder=None),
        "dropout": setting(dropout=0.1),
        "byte_fallback": setting(byte_fallback=True),
        "256 bytes": lambda spec: [spec["model"]["vocab"].pop("!"), spec["model"]["vocab"].update({"!!": 0})],
        "stands for no byte": lambda spec: [spec["model"]["vocab"].pop("!"), spec["model"]["vocab"].update({"\u65e5": 0})],
        "gaps": lambda spec: spec["model"]["vocab"].update({"!!": 400}),
    }
    for found, change in kinds.items():
        with pytest.raises(VocabularyError, match=rf"^[^\n]*tokenizer\.json: [^\n]*{found}[^\n]*$"):
            load_tokenizer(made(tmp_path, change))


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "vocab.txt", "meta.pkl"])
def test_a_vocabulary_in_another_format_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        VocabularyError, match=rf"{name}: the vocabulary is .*; served is byte-level BPE, from a tokenizer\.json$"
    ):
        load_tokenizer(tmp_path)


@given(place=st.integers(0, 100_000), data=st.binary(max_size=8), cut=st.booleans())
def test_a_damaged_tokenizer_json_is_one_line_or_still_one(place: int, data: bytes, cut: bool):
    with tempfile.TemporaryDirectory() as folder:
        whole = (DEMO / "tokenizer.json").read_bytes()
        place %= len(whole)
        (Path(folder) / "tokenizer.json").write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
        try:
            found = load_tokenizer(Path(folder))
        except VocabularyError as error:
            message = str(error)
        else:
            message = "tokenizer.json: not damaged where it counts"
            assert found.decode(found.encode("a \u65e5")) == "a \u65e5"
    assert "tokenizer.json: " in message
    assert "\n" not in message


# Which of its tokens a model has.


def test_a_model_with_more_embeddings_than_tokens_changes_nothing(tmp_path: Path):
    ours = load_tokenizer(made(tmp_path))
    assert ours.for_model(300, (), None) == ours


def test_special_tokens_without_an_embedding_are_left_out(tmp_path: Path):
    """A padding token that was added for training, and the embeddings not made larger for it."""
    ours = load_tokenizer(made(tmp_path, special="[PAD]")).for_model(258, (258, 65), None)
    assert ours.vocab_size == 258
    assert (ours.ends, ours.begin) == ({65}, 65)


def test_other_tokens_without_an_embedding_are_refused(tmp_path: Path):
    with pytest.raises(VocabularyError, match="mine has 259 tokens, the model only 257"):
        load_tokenizer(made(tmp_path)).for_model(257, (), None)


def test_what_a_model_says_ends_a_text_counts_before_the_vocabularys_own(tmp_path: Path):
    ours = load_tokenizer(made(tmp_path))
    assert ours.for_model(300, (10, 11), 12).ends == {10, 11}
    assert ours.for_model(300, (10, 11), 12).begin == 12
    assert ours.for_model(300, (50256,), 50256).ends == {258}, "GPT2Config's default, left in a smaller model's config"
    none = load_tokenizer(made(tmp_path, special="[PAD]")).for_model(300, (50256,), None)
    assert (none.ends, none.begin) == (frozenset(), None)
