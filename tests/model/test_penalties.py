"""What requests ask to be done to their logits: against transformers' processors and plain loops, alone and in a batch."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from batching.request import SamplingParams
from model.penalties import Past, adjust
from model.sampling import _all, _nucleus, sample

VOCAB = 40
PARAMS = [
    SamplingParams(),
    SamplingParams(logit_bias=((3, 2.5), (7, -100.0))),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(presence_penalty=-1.3),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.8, frequency_penalty=1.9, presence_penalty=0.4, logit_bias=((0, 1.5),)),
    SamplingParams(min_tokens=5, stop_token_ids=(2, 9), logit_bias=((9, 100.0),)),
    SamplingParams(frequency_penalty=-2.0, min_tokens=2, stop_token_ids=(4,)),
]


def random_rows(rows: int, seed: int = 0) -> tuple[torch.Tensor, list[Past]]:
    """Logits of both signs, and for each row tokens that came before, some of them several times."""
    rng = random.Random(seed)
    pasts = [Past(rng.choices(range(12), k=rng.randint(2, 25)), rng.randint(1, 2)) for _ in range(rows)]
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)), pasts


def plainly(logits: Sequence[float], params: SamplingParams, past: Past, index: int) -> list[float]:
    changed, output = list(logits), Counter(past.tokens[past.prompt_len :])
    for token, bias in params.logit_bias:
        changed[token] += bias
    for token in set(past.tokens):
        changed[token] *= 1 / params.repetition_penalty if changed[token] > 0 else params.repetition_penalty
    for token, times in output.items():
        changed[token] -= params.frequency_penalty * times + params.presence_penalty
    if index < params.min_tokens:
        for token in params.stop_token_ids:
            changed[token] = -math.inf
    return changed


def test_rows_of_every_kind_in_one_batch_are_changed_as_a_plain_loop_does():
    logits, pasts = random_rows(len(PARAMS))
    before = logits.clone()
    changed = adjust(logits, PARAMS, [3] * len(PARAMS), dict(enumerate(pasts)))
    for row, (params, past) in enumerate(zip(PARAMS, pasts, strict=True)):
        assert changed[row].tolist() == pytest.approx(plainly(before[row].tolist(), params, past, 3), abs=1e-5)
    assert torch.equal(logits, before), "the model's logits stay as they are: log probabilities are of them"


def test_a_row_is_changed_alone_as_among_neighbours_bit_for_bit():
    logits, pasts = random_rows(len(PARAMS), seed=1)
    together = adjust(logits, PARAMS, [1] * len(PARAMS), dict(enumerate(pasts)))
    for row, params in enumerate(PARAMS):
        alone = adjust(logits[row : row + 1], [params], [1], {0: pasts[row]})
        assert torch.equal(alone[0], together[row])


def test_rows_that_ask_for_nothing_cost_nothing():
    logits, _ = random_rows(3)
    assert adjust(logits, [SamplingParams(), SamplingParams(1.0, top_k=5), SamplingParams(min_p=0.1)], [0, 0, 0], {}) is logits


def test_the_repetition_penalty_is_transformers():
    logits, pasts = random_rows(1, seed=2)
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([pasts[0].tokens]), logits.clone())
    ours = adjust(logits, [SamplingParams(repetition_penalty=1.4)], [0], {0: pasts[0]})
    assert torch.allclose(ours, theirs)


def test_a_token_that_only_the_device_knows_counts_like_one_that_the_host_knows():
    """With two steps under way the last token is still being drawn while the next step is launched."""
    logits, pasts = random_rows(len(PARAMS), seed=3)
    drawn = torch.tensor([past.tokens[-1] for past in pasts])
    known = dict(enumerate(pasts))
    pending = {row: Past(past.tokens[:-1], past.prompt_len, row) for row, past in known.items() if row % 2}
    indices = [1] * len(PARAMS)
    assert torch.equal(adjust(logits, PARAMS, indices, known | pending, drawn), adjust(logits, PARAMS, indices, known, drawn))


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.9])
def test_min_p_keeps_what_transformers_keeps(min_p: float, temperature: float):
    logits, _ = random_rows(4, seed=4)
    theirs = MinPLogitsWarper(min_p)(torch.zeros(4, 1), logits / temperature)
    kept, _ = _all(logits, [SamplingParams(temperature, min_p=min_p)] * 4)
    assert torch.equal(kept.isinf(), theirs.isinf())


def test_top_p_counts_within_what_min_p_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()
    both = _nucleus(logits, [SamplingParams(1.0, top_p=0.8, min_p=0.3)])
    assert both[0].isfinite().tolist() == [True, True, False, False, False], "0.7 of 0.85: without min_p three"


def test_a_bias_of_100_makes_a_token_certain_and_one_of_minus_100_impossible():
    logits, _ = random_rows(1, seed=5)
    params = SamplingParams(1.0, logit_bias=((11, 100.0),))
    assert sample(logits.expand(50, -1), [params] * 50, range(50)).tolist() == [11] * 50
    likeliest = int(logits.argmax())
    never = SamplingParams(1.0, logit_bias=((likeliest, -100.0),))
    assert likeliest not in sample(logits.expand(500, -1), [never] * 500, range(500)).tolist()
