"""Which random numbers a choice's tokens are drawn with. Every choice has a stream: 64 bits that stand for all by which it may
differ from another, which are the call's seed (or entropy that no other call has), the prompt, which of the call's equal
prompts it is, and which of the `n` choices. They are hashed together (Claessen and Palka 2013), since what is only added up
meets again: seed 10's second choice would be seed 11's first.

What is made of a stream, index by index and token by token, is the engine's affair (model/sampling.py).
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from secrets import token_bytes
from struct import pack


def random_streams(seed: int | None, prompts: Sequence[Sequence[int]], n: int = 1) -> list[int]:
    """The streams of a call's choices: `n` for each of `prompts` (token ids), in order. `seed` is an int64; without one the
    streams are new each time. With one, a prompt's are the same alone and among others, in whatever call."""
    key = token_bytes(32) if seed is None else seed.to_bytes(8, "little", signed=True)
    seen: Counter[bytes] = Counter()
    streams = []
    for prompt in prompts:
        tokens = pack(f"<{len(prompt)}I", *prompt)
        of_prompt = blake2b(tokens, key=key, digest_size=8)
        for choice in range(n):
            own = of_prompt.copy()
            own.update(pack("<II", seen[tokens], choice))
            streams.append(int.from_bytes(own.digest(), "little"))
        seen[tokens] += 1
    return streams
