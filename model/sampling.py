"""Drawing the next token. The randomness of a draw is a function of (stream, token index, token) alone, so that batching,
preemption and the mode never change a text.

A token is drawn as the argmax of its scaled logit plus Gumbel noise (Gumbel 1954; "Gumbel-max"). Against inverting the
cumulated distribution this has one merit that counts here: rounding errors of a logit, which differ with the batch's shape,
change a draw only where the two best are that close, not at each of 50,257 boundaries.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, log

import torch

from batching.request import SamplingParams
from model.device import to_device
from model.penalties import Past, adjust

MASK64 = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's (Steele et al. 2014)
NO_PASTS: Mapping[int, Past] = {}
Narrow = Callable[[torch.Tensor, Sequence[SamplingParams]], tuple[torch.Tensor, torch.Tensor]]


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    pasts: Mapping[int, Past] = NO_PASTS,
    drawn: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a row: (R,) int64, on the device of the logits. logits: (R, vocab) float32; params and indices (how many tokens
    were generated before) by row; `pasts` and `drawn`: what came before, for rows with penalties (`penalties.adjust`).

    Rows are drawn in groups that a row's own parameters choose, never its neighbours. The host never waits for the device.
    """
    logits = adjust(logits, params, indices, pasts, drawn)
    tokens = logits.argmax(-1)
    groups: dict[tuple[Narrow, int], list[int]] = {}
    for row, p in enumerate(params):
        if p.temperature > 0 and p.top_k != 1:
            how: Narrow = _top_k if p.top_k else _top_p if p.top_p < 1 else _all
            groups.setdefault((how, p.top_k), []).append(row)
    for (narrow, _), rows in groups.items():
        own = [params[row] for row in rows]
        places = to_device(rows, torch.int64, logits.device)
        few = logits if len(rows) == len(params) else logits[places]
        kept, ids = narrow(few, own)  # both (rows, candidates)
        u = uniforms([row_key(params[row].stream, indices[row]) for row in rows], ids)
        best = (_scaled(kept, own) - torch.log(-torch.log(u))).argmax(-1, keepdim=True)
        tokens[places] = ids.gather(-1, best)[:, 0]
    return tokens


def _all(logits: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    return _likely(logits, params), torch.arange(logits.shape[1], device=logits.device).expand_as(logits)


def _top_p(logits: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    return _nucleus(ordered, params), ids


def _top_k(logits: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest of each row, k being one number for all of them; top_p counts within them."""
    ordered, ids = logits.topk(min(params[0].top_k, logits.shape[1]))
    return _nucleus(ordered, params), ids


def _nucleus(ordered: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020); never empty. It counts
    within what min_p leaves."""
    ordered = _likely(ordered, params)
    probs = _scaled(ordered, params).softmax(-1)
    before = probs.cumsum(-1) - probs
    return ordered.masked_fill((before >= _column([p.top_p for p in params], ordered.device)) & (before > 0), -torch.inf)


def _likely(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keep the tokens that are at least min_p times as probable as the likeliest (Nguyen et al. 2024): the ratio of two
    probabilities needs no sum. logits: with the likeliest among them."""
    if not any(p.min_p for p in params):
        return logits
    least = _column([log(p.min_p) if p.min_p else -inf for p in params], logits.device)
    return logits.masked_fill(_scaled(logits, params) < least, -torch.inf)


def _scaled(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """In float64, and relative to the largest logit, so that no temperature is too small."""
    return (logits.double() - logits.amax(-1, keepdim=True)) / _column([p.temperature for p in params], logits.device)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return to_device(values, torch.float64, device)[:, None]


def row_key(stream: int, index: int) -> int:
    """64 bits for draw `index` of `stream`."""
    return _mix((_mix(stream & MASK64) + (index + 1) * GOLDEN) & MASK64)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK64
    x = ((x ^ (x >> 27)) * MIX_2) & MASK64
    return x ^ (x >> 31)


def uniforms(keys: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """A number in (0, 1), float64, for each row's key and token id. ids: (R, n) int64. SplitMix64 once more, on tensors."""
    x = to_device([_signed(key) for key in keys], torch.int64, ids.device)[:, None] + (ids + 1) * _signed(
        GOLDEN
    )  # wraps, as it should
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    x = x ^ _shift(x, 31)
    return (_shift(x, 12).double() + 0.5) / (1 << 52)  # 52 bits and a half are exact; 53 would round up to 1


def _signed(x: int) -> int:
    """The same 64 bits as torch's int64 reads them."""
    return x - (1 << 64) if x >> 63 else x


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
