"""What a request asks to be done to its logits before a token is drawn: a bias by token, penalties for tokens that were there,
and tokens that may not come yet. The order is vLLM's (its V1 sampler): bans and biases, then penalties; temperature, min_p,
top_k and top_p come after (sampling.py). Rows that ask for none of it cost nothing, and what is done to a row follows from its
own parameters and tokens alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from batching.request import SamplingParams
from model.device import to_device


class Past(NamedTuple):
    """The tokens before the one to be drawn, the prompt's first, as far as the host knows them. Where a step that is under way
    still draws the last of them, `place` says where in its tokens on the device; else it is -1."""

    tokens: Sequence[int]
    prompt_len: int
    place: int = -1


def adjust(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    pasts: Mapping[int, Past],
    drawn: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits (R, vocab) as they are to be drawn from: the same tensor where nothing is asked for, else a copy. `pasts`: by
    row, of those whose params are `penalised`. `drawn`: what a `place` points into, (n,) int64. The host never waits."""
    asking = [(row, p) for row, p in enumerate(params) if p.adjusts_logits]
    if not asking:
        return logits
    added = [(row, token, bias) for row, p in asking for token, bias in p.logit_bias]
    penalised = [row for row, p in asking if p.penalised]
    banned = [(row, token) for row, p in asking if indices[row] < p.min_tokens for token in p.stop_token_ids]
    logits, device = logits.clone(), logits.device
    if added:
        rows, tokens, biases = zip(*added, strict=True)
        places = to_device(rows, torch.int64, device), to_device(tokens, torch.int64, device)
        logits.index_put_(places, to_device(biases, logits.dtype, device), accumulate=True)
    if penalised:
        own = to_device(penalised, torch.int64, device)
        known = [pasts[row] for row in penalised]
        logits[own] = _penalise(logits[own], [params[row] for row in penalised], known, drawn)
    if banned:  # last, so that no bias brings one back
        rows, tokens = zip(*banned, strict=True)
        logits[to_device(rows, torch.int64, device), to_device(tokens, torch.int64, device)] = -torch.inf
    return logits


def _penalise(
    logits: torch.Tensor, params: Sequence[SamplingParams], pasts: Sequence[Past], drawn: torch.Tensor | None
) -> torch.Tensor:
    """The repetition penalty is for every token that was there, prompt included (Keskar et al. 2019); the frequency penalty for
    each time that one was generated, the presence penalty once (OpenAI's). logits: (r, vocab)."""
    device, width = logits.device, max(len(past.tokens) for past in pasts) + 1
    ids, was, output = (np.zeros((len(pasts), width), kind) for kind in (np.int64, np.float32, np.float32))
    for row, (tokens, prompt_len, place) in enumerate(pasts):
        end = len(tokens) + (place >= 0)
        ids[row, : len(tokens)] = tokens
        was[row, :end], output[row, prompt_len:end] = 1, 1
    at = to_device(ids, torch.int64, device)
    if drawn is not None and any(past.place >= 0 for past in pasts):
        places = to_device([past.place for past in pasts], torch.int64, device)[:, None]
        last = to_device([len(past.tokens) for past in pasts], torch.int64, device)[:, None]
        at.scatter_(1, last, torch.where(places < 0, 0, drawn[places.clamp(min=0)]))
    seen = torch.zeros_like(logits).scatter_add_(1, at, to_device(was, torch.float32, device)) > 0
    counts = torch.zeros_like(logits).scatter_add_(1, at, to_device(output, torch.float32, device))
    repetition, frequency, presence = (
        to_device(values, torch.float32, device)[:, None]
        for values in zip(*((p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params), strict=True)
    )
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)
