"""Text to token ids and back, through tiktoken: GPT-2's vocabulary where it can be had, the demo model's otherwise.

Vocabularies are loaded once, at start, from files on this machine; nothing here is fetched while a request waits.
"""

import base64
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes (Radford et al. 2019, section 2.2).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding and the name under which /stats shows it."""

    name: str
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as plain text. Raises UnicodeError for lone surrogates."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`; bytes that do not make up a character become U+FFFD."""
        return self.encoding.decode(tokens, errors="replace")


def load_demo_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE vocabulary that ships with the demo model (`vocab.tiktoken`)."""
    lines = (folder / "vocab.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return _encoding("demo", ranks)


def _encoding(name: str, ranks: dict[bytes, int]) -> Tokenizer:
    special = {END_OF_TEXT: len(ranks)}
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special))


def byte_of_printable() -> dict[str, int]:
    """GPT-2's files write each byte as a printable character: itself where it is one, else U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
