"""Drawing the next token. The randomness of a draw is a function of (seed, token index) alone, so that batching, preemption
and the mode never change a text; and it takes one uniform number, so that any device can share it.
"""

from collections.abc import Sequence

import torch

from batching.request import SamplingParams

MASK64 = (1 << 64) - 1


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    """One token a row. logits: (R, vocab) float32; params and indices (how many tokens were generated before) by row."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (p, index) in enumerate(zip(params, indices, strict=True)):
        if p.temperature > 0:
            tokens[row] = _draw(logits[row] / p.temperature, p, uniform(p.seed, index))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """Inverse transform: the token at which the cumulated probability passes `u`. top_k first, then top_p within it."""
    ids = None
    if params.top_k and params.top_k < len(logits):
        logits, ids = logits.topk(params.top_k)
    probs = logits.double().softmax(-1)
    if params.top_p < 1:
        probs, order = probs.sort(descending=True, stable=True)
        ids = order if ids is None else ids[order]
        before = probs.cumsum(-1) - probs
        probs = probs[before < params.top_p]  # the smallest set that reaches top_p; never empty
    cumulated = probs.cumsum(-1)
    place = torch.searchsorted(cumulated, u * cumulated[-1], right=True)
    place = place.clamp(max=len(cumulated) - 1)
    return int(place if ids is None else ids[place])


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for draw `index` of `seed`: SplitMix64's output function (Steele et al. 2014) over both."""
    x = (_mix(seed & MASK64) + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    return (_mix(x) >> 11) / (1 << 53)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
