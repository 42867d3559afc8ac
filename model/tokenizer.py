"""Text to token ids and back: byte-level BPE (Radford et al. 2019, section 2.2), through the `tokenizers` library.

A checkpoint brings its vocabulary as `tokenizer.json`, or as `vocab.json` and `merges.txt`. Texts are made of the bytes of
tokens, since a character may be split between two; that is why a vocabulary must be byte-level. It is loaded once, at start,
from files on this machine; nothing here is fetched while a request waits.
"""

import codecs
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
# The names under which tiktoken caches GPT-2's files: the hashes of the addresses it has them from.
CACHED_VOCABULARY, CACHED_MERGES = (
    hashlib.sha1(f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}".encode()).hexdigest()
    for name in ("encoder.json", "vocab.bpe")
)
GPT2_FINGERPRINT = "35e8dd34a8c31284992f25ec5b1a25869cb03d8c5498c72ca14a501c2c3f794a"
# Vocabularies that people have beside other models, and what they are.
OTHERS = {
    "spiece.model": "SentencePiece's",
    "tokenizer.model": "SentencePiece's",
    "sentencepiece.bpe.model": "SentencePiece's",
    "vocab.txt": "WordPiece's, as BERT has it",
    "meta.pkl": "nanoGPT's characters, pickled Python, which is never run",
}


class VocabularyError(ValueError):
    """A vocabulary file that is missing, damaged or not byte-level BPE; the message names it."""


class NoVocabulary(VocabularyError):
    """A folder without any."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and the name under which /stats shows it."""

    name: str
    backend: tokenizers.Tokenizer = field(repr=False)
    pieces: tuple[bytes, ...] = field(repr=False)  # what each token says, by id
    ends: frozenset[int]  # the tokens that end a text; none where nothing does
    begin: int | None  # the token before the first of a text

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as plain text."""
        try:
            return self.backend.encode(text).ids
        except TypeError:  # half of a surrogate pair, which no file has
            return self.backend.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")).ids

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join([self.pieces[token] for token in tokens])

    def decode(self, tokens: Sequence[int]) -> str:
        return text_of(self.bytes_of(tokens))

    def for_model(self, embeddings: int, ends: Sequence[int], begin: int | None) -> "Tokenizer":
        """With what a model says of its tokens; those of its ids that there are none of are left out. A special token without
        an embedding, as of padding, cannot occur in a text. Raises VocabularyError for another one."""
        added = self.backend.get_added_tokens_decoder()
        beyond = range(embeddings, self.vocab_size)
        template = self.backend.encode("").ids  # what the vocabulary puts around every text
        if not all(token in added and added[token].special and token not in template for token in beyond):
            raise VocabularyError(f"vocabulary {self.name} has {self.vocab_size} tokens, the model only {embeddings}")
        pieces = self.pieces[:embeddings]
        known = frozenset(token for token in ends if 0 <= token < len(pieces))
        fitting = frozenset(token for token in self.ends if token < len(pieces))
        first = begin if begin is not None and 0 <= begin < len(pieces) else min(known or fitting, default=None)
        return replace(self, pieces=pieces, ends=known or fitting, begin=first)


def text_of(data: bytes) -> str:
    """A character whose last bytes are still to come is left out; impossible bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def load_tokenizer(folder: Path) -> Tokenizer:
    """A checkpoint's vocabulary. Raises VocabularyError, and NoVocabulary where it brings none."""
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        except OSError as error:
            raise VocabularyError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library's own have no type
            raise VocabularyError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:300]}") from error
        return _checked(folder.name, path, backend)
    if (folder / "vocab.json").is_file():
        return _from_vocabulary(folder.name, folder / "vocab.json", folder / "merges.txt")
    for name, kind in OTHERS.items():
        if (folder / name).is_file():
            raise VocabularyError(f"{folder / name}: the vocabulary is {kind}; served is byte-level BPE, from a tokenizer.json")
    raise NoVocabulary(f"{folder}: brings no vocabulary (tokenizer.json, or vocab.json and merges.txt)")


def load_gpt2_tokenizer() -> Tokenizer | None:
    """GPT-2's vocabulary from tiktoken's cache; None where it is not there."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    with contextlib.suppress(VocabularyError):  # a damaged cache is as good as none
        found = _from_vocabulary("tiktoken's cache", folder / CACHED_VOCABULARY, folder / CACHED_MERGES)
        return found if found.name == "gpt2" else None
    return None


def _from_vocabulary(name: str, vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's own two files, and added_tokens.json. A token that no merge makes is special. Without the merges, they are what
    the ids say: a vocabulary that was trained as GPT-2's has its tokens in order of their merges."""
    path = vocabulary
    try:
        ids: dict[str, int] = json.loads(path.read_text("utf-8"))
        more: dict[str, int] = {}
        if (path := vocabulary.parent / "added_tokens.json").is_file():
            more = json.loads(path.read_text("utf-8"))
        if (path := merges).is_file():
            lines = [line for line in merges.read_text("utf-8").split("\n") if line and not line.startswith("#version")]
            pairs = [(first, second) for first, second in (line.split(" ") for line in lines)]
        else:
            path = vocabulary
            pairs = list(_pairs_by_rank(ids))
        made = {first + second for first, second in pairs}
        special = [token for token in ids if len(token) > 1 and token not in made] + sorted(more, key=more.__getitem__)
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    except Exception as error:  # files can be damaged in any way, and the library's own errors have no type
        raise VocabularyError(f"{path}: missing or damaged: {' '.join(str(error).split())[:300]}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if any(backend.token_to_id(token) != i for token, i in more.items()):
        raise VocabularyError(f"{vocabulary.parent / 'added_tokens.json'}: its ids do not follow those of {vocabulary.name}")
    return _checked(name, vocabulary, backend)


def _pairs_by_rank(ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The two parts of each token that is made of two, in order of the ids."""
    for token in sorted(ids, key=ids.__getitem__):
        parts = list(token)
        while len(parts) > 2:
            ranks = [ids.get(first + second, len(ids)) for first, second in pairwise(parts)]
            place = ranks.index(min(ranks))
            if ranks[place] == len(ids):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _checked(name: str, path: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    """A byte-level BPE, which says the bytes of each of its tokens."""
    model, decoder = backend.model, backend.decoder
    if not isinstance(model, models.BPE) or not isinstance(decoder, decoders.ByteLevel):
        kinds = f"{type(model).__name__} with decoder {type(decoder).__name__}"
        raise VocabularyError(f"{path}: the vocabulary is {kinds}; served is byte-level BPE (BPE with decoder ByteLevel)")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := getattr(model, setting):
            raise VocabularyError(f"{path}: {setting} is {value!r}, which byte-level BPE does without: not supported")
    backend.no_truncation()  # left over from training, where texts are cut or filled up to one length
    backend.no_padding()
    backend.encode_special_tokens = True
    added, byte_of = backend.get_added_tokens_decoder(), byte_of_printable()
    ids = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    if sorted(ids) != list(range(len(ids))):
        raise VocabularyError(f"{path}: damaged: the ids of its {len(ids)} tokens have gaps")
    try:
        pieces = tuple(added[i].content.encode() if i in added else bytes(byte_of[c] for c in ids[i]) for i in range(len(ids)))
    except KeyError as error:
        raise VocabularyError(
            f"{path}: not byte-level: its tokens are written with {error}, which stands for no byte"
        ) from error
    if missing := 256 - len({piece for i, piece in enumerate(pieces) if len(piece) == 1 and i not in added}):
        raise VocabularyError(f"{path}: {missing} of the 256 bytes have no token, so that not every text can be read")
    end = backend.token_to_id(END_OF_TEXT)
    ends = frozenset() if end is None else frozenset([end])
    fingerprint = hashlib.sha256(b"".join(b"%d %b" % (len(piece), piece) for piece in pieces)).hexdigest()
    return Tokenizer("gpt2" if fingerprint == GPT2_FINGERPRINT else name, backend, pieces, ends, end)


def byte_of_printable() -> dict[str, int]:
    """GPT-2's files write each byte as a printable character: itself where it is one, else U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
