"""How long prompts and outputs are, in tokens: drawn from a named distribution, kept within the model's context, and made into
a text where a prompt has to have a given length. Pure: it must not know when a request leaves.
"""

from __future__ import annotations

import random

import numpy as np

from client.distributions import Shape, draw_within, gaussian, read_shape, zipf

LENGTHS = {
    "fixed": {"tokens": 64.0},
    "uniform": {"low": 16.0, "high": 128.0},
    "normal": {"mean": 64.0, "std": 24.0, "low": 1.0, "high": 256.0},
    "zipf": {"a": 1.1, "low": 8.0, "high": 256.0},
}

# Each of these, with the space before it, is one token in GPT-2's vocabulary and in the demo model's; so is "The". A text of n
# of them has n tokens, and the client needs no tokenizer.
WORDS = """
    the of and to in was that he she her his it had with as for you at be not but by they on were which this so have
    from all him my me is said when been would one could if who no what or more will there an their then into man out
    before up time some very little like old only than come about how now good did made see came after over never house
    day down know mother long two well great eyes hand away again might must our us such these night where other way
    head upon life young still room morning father looked face door lady letter garden children light
""".split()  # noqa: SIM905 - easier to read than a list of quoted words


def read_lengths(text: str) -> Shape:
    """``NAME:key=value,...``. Raises ValueError naming the parameter."""
    shape = read_shape(text, LENGTHS)
    p = shape.parameters
    for name in ("tokens", "low", "high"):
        if name in p and (p[name] != int(p[name]) or not 1 <= p[name] <= 1_000_000):
            raise ValueError(f"{shape.name}: {name} must be a whole number from 1 to 1000000, not {p[name]:g}")
    if "low" in p and p["low"] >= p["high"]:
        raise ValueError(f"{shape.name}: low must be less than high, not {p['low']:g} and {p['high']:g}")
    return shape


def draw_lengths(shape: Shape, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` lengths; ``low`` and ``high`` are both possible. Raises ValueError."""
    p = shape.parameters
    if shape.name == "fixed":
        return [int(p["tokens"])] * count
    if shape.name == "zipf":  # the shortest is the commonest
        return [int(p["low"]) + int(rank) - 1 for rank in zipf(rng, count, p["a"], p["high"] - p["low"] + 1)]
    low, high = p["low"] - 0.5, p["high"] + 0.5
    if shape.name == "uniform":
        draws = draw_within("uniform", lambda n: rng.uniform(low, high, n), count, low, high)
    else:
        draws = gaussian(rng, count, p["mean"], p["std"], low, high)
    return [int(n) for n in np.floor(draws + 0.5)]


def fit(prompt_tokens: int, output_tokens: int, context: int) -> tuple[int, int]:
    """Both, cut so that they fit ``context`` together: neither to less than half of it because of the other."""
    output = min(output_tokens, max(context - prompt_tokens, context // 2))
    return min(prompt_tokens, context - output), output


def words(tokens: int, rng: random.Random) -> str:
    """A text of that many tokens."""
    return " ".join(["The", *rng.choices(WORDS, k=tokens - 1)])
