"""Drawing the next token. The randomness of a draw is a function of (seed, token index) alone, so that batching, preemption
and the mode never change a text; and it takes one uniform number, so that any device can share it.
"""

from collections.abc import Callable, Sequence

import torch

from batching.request import SamplingParams

MASK64 = (1 << 64) - 1
Draw = Callable[[torch.Tensor, Sequence[SamplingParams], torch.Tensor], torch.Tensor]


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    """One token a row. logits: (R, vocab) float32; params and indices (how many tokens were generated before) by row.

    Rows are drawn in groups that a row's own parameters choose, never its neighbours.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    groups: dict[tuple[Draw, int], list[int]] = {}
    for row, p in enumerate(params):
        if p.temperature > 0 and p.top_k != 1:
            draw: Draw = _top_k if p.top_k else _top_p if p.top_p < 1 else _plain
            groups.setdefault((draw, p.top_k), []).append(row)
    for (draw_rows, _), rows in groups.items():
        own = [params[row] for row in rows]
        u = _column([uniform(params[row].seed, indices[row]) for row in rows])
        for row, token in zip(rows, draw_rows(logits[rows].cpu(), own, u).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _plain(logits: torch.Tensor, params: Sequence[SamplingParams], u: torch.Tensor) -> torch.Tensor:
    return _invert(_probabilities(logits, params), u)


def _top_p(logits: torch.Tensor, params: Sequence[SamplingParams], u: torch.Tensor) -> torch.Tensor:
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    return _nucleus(ordered, ids, params, u)


def _top_k(logits: torch.Tensor, params: Sequence[SamplingParams], u: torch.Tensor) -> torch.Tensor:
    """The k likeliest of each row, k being one number for all of them; top_p counts within them."""
    ordered, ids = logits.topk(min(params[0].top_k, logits.shape[1]))
    return _nucleus(ordered, ids, params, u)


def _probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """In float64, and relative to the largest logit, so that no temperature is too small."""
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / _column([p.temperature for p in params])
    return scaled.softmax(-1)


def _nucleus(ordered: torch.Tensor, ids: torch.Tensor, params: Sequence[SamplingParams], u: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020); never empty."""
    probs = _probabilities(ordered, params)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((before >= _column([p.top_p for p in params])) & (before > 0), 0.0)
    return ids.gather(-1, _invert(probs, u)[:, None])[:, 0]


def _invert(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse transform: the place (R,) at which the cumulated probability of each row passes `u` (R, 1)."""
    cumulated = probs.cumsum(-1)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)[:, 0].clamp(max=probs.shape[1] - 1)


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for draw `index` of `seed`: SplitMix64's output function (Steele et al. 2014) over both."""
    x = (_mix(seed & MASK64) + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    return (_mix(x) >> 11) / (1 << 53)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
