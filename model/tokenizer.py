"""Text to token ids and back, through tiktoken: GPT-2's vocabulary where it can be had, the demo model's otherwise.

Vocabularies are loaded once, at start, from files on this machine; nothing here is fetched while a request waits.
"""

import base64
import codecs
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes (Radford et al. 2019, section 2.2).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The name under which tiktoken caches GPT-2's encoder.json: the hash of the address it has it from.
CACHED_ENCODER = hashlib.sha1(b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json").hexdigest()


class VocabularyError(ValueError):
    """A vocabulary file that is missing or damaged; the message names it."""


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding and the name under which /stats shows it."""

    name: str
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as plain text."""
        return self.encoding.encode_ordinary(text)

    @property
    def end_of_text(self) -> int:
        """The token that stands between two texts: the last id."""
        return self.vocab_size - 1

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return text_of(self.bytes_of(tokens))


def text_of(data: bytes) -> str:
    """A character whose last bytes are still to come is left out; impossible bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def load_demo_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE vocabulary that ships with the demo model (`vocab.tiktoken`). Raises VocabularyError."""
    path = folder / "vocab.tiktoken"
    try:
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{path}: {error}") from error
    return _tokenizer("demo", path, ranks)


def load_gpt2_tokenizer(folder: Path | None = None) -> Tokenizer | None:
    """GPT-2's vocabulary from `folder` (Hugging Face's vocab.json) or from tiktoken's cache; None where neither has it.
    Raises VocabularyError for a damaged vocab.json."""
    if folder and (folder / "vocab.json").is_file():
        return _from_vocab_json(folder / "vocab.json")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cached = Path(cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")) / CACHED_ENCODER
    with contextlib.suppress(VocabularyError):  # a damaged cache is as good as none; tiktoken would go online
        return _from_vocab_json(cached)
    return None


def _from_vocab_json(path: Path) -> Tokenizer:
    """In GPT-2's file the ids are the ranks of the merges, so that vocab.json alone says all that tiktoken asks for."""
    byte_of = byte_of_printable()
    try:
        ids: dict[str, int] = json.loads(path.read_text("utf-8"))
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in ids.items() if token != END_OF_TEXT}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VocabularyError(f"{path}: missing or damaged: {error}") from error
    return _tokenizer("gpt2", path, ranks)


def _tokenizer(name: str, path: Path, ranks: dict[bytes, int]) -> Tokenizer:
    if not all(bytes([byte]) in ranks for byte in range(256)) or sorted(ranks.values()) != list(range(len(ranks))):
        raise VocabularyError(f"{path}: damaged: not every byte has a token, or the ids have gaps")
    special = {END_OF_TEXT: len(ranks)}
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special))


def byte_of_printable() -> dict[str, int]:
    """GPT-2's files write each byte as a printable character: itself where it is one, else U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
