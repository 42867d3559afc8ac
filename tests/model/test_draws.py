"""Draws that must be independent are: on the demo model's own logits, over the streams of many choices, seeded and not."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch

from batching import random_streams as module
from batching.random_streams import random_streams
from batching.request import SamplingParams
from model.checkpoint import config_of, load
from model.sampling import sample
from model.tokenizer import load_tokenizer

from .paged import PagedRun
from .test_sampling import reference

DEMO = Path(__file__).parents[2] / "model" / "demo"
TEXT = """It was a bright morning, and the whole family had come down to the shore to see the ships. Nobody spoke; the old
captain looked through his glass, the children held their breath, and far away over the water a small white sail appeared.
The king had waited three days for news of the battle, and when at last a rider came over the hill he could not rise."""
DRAWS = 20_000
AT_ONCE = 1000
PLAIN = SamplingParams(1.0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Sixty, none of which is another's end."""
    tokens = load_tokenizer(DEMO).encode(TEXT)
    return [tokens[begin : begin + 3 + begin % 7] for begin in range(60)]


@pytest.fixture(scope="module")
def logits(prompts: list[list[int]]) -> torch.Tensor:
    """Of the token after each prompt: (60, vocab)."""
    model = load(DEMO, config_of("demo", DEMO), torch.float32, torch.device("cpu"))
    vocab = load_tokenizer(DEMO).vocab_size
    return torch.stack([chunk[-1, :vocab] for chunk in PagedRun(model, len(prompts)).step(list(enumerate(prompts)))])


@pytest.fixture
def fixed_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what these tests see of calls without a seed is the same in each run."""
    calls = iter(range(10**9))
    monkeypatch.setattr(module, "token_bytes", lambda size: next(calls).to_bytes(size, "big"))


def drawn(logits: torch.Tensor, streams: Sequence[int], index: int = 0, params: SamplingParams = PLAIN) -> list[int]:
    """A token of each stream, all after the same prompt. logits: (vocab,)."""
    tokens: list[int] = []
    for begin in range(0, len(streams), AT_ONCE):
        rows = [SamplingParams(params.temperature, params.top_k, params.top_p, one) for one in streams[begin : begin + AT_ONCE]]
        tokens += sample(logits.expand(len(rows), -1), rows, [index] * len(rows)).tolist()
    return tokens


def excess(counts: Counter, expected: dict[object, float]) -> float:
    """Pearson's chi-square in standard deviations above its mean; what is expected less than 20 times counts as one."""
    often = {what: number for what, number in expected.items() if number >= 20}
    rest = sum(expected.values()) - sum(often.values())
    chi2 = sum((counts[what] - number) ** 2 / number for what, number in often.items())
    if rest >= 20:
        chi2 += (counts.total() - sum(counts[what] for what in often) - rest) ** 2 / rest
    df = len(often) - (rest < 20)
    return (chi2 - df) / math.sqrt(2 * df)


def excess_of_tokens(tokens: list[int], logits: torch.Tensor, params: SamplingParams = PLAIN) -> float:
    probabilities = reference(logits.tolist(), params)
    return excess(Counter(tokens), {token: p * len(tokens) for token, p in enumerate(probabilities) if p})


def excess_of_pairs(left: list[int], right: list[int]) -> float:
    """Of tokens that were drawn side by side, against what independence would give."""
    often = [token for token, _ in Counter(left).most_common(12)]
    left, right = ([token if token in often else -1 for token in side] for side in (left, right))
    first, second = Counter(left), Counter(right)
    return excess(
        Counter(zip(left, right, strict=True)), {(a, b): first[a] * second[b] / len(left) for a in first for b in second}
    )


CHOICES = {
    "three choices of each of neighbouring seeds": lambda: [s for i in range(DRAWS // 3) for s in random_streams(i, [[5]], 3)],
    "the choices of one call": lambda: random_streams(7, [[5]], DRAWS),
    "equal prompts of one call": lambda: random_streams(7, [[5]] * DRAWS),
    "different prompts of one call": lambda: random_streams(7, [[i // 2000, i % 2000] for i in range(DRAWS)]),
    "different prompts, each in a call with the same seed": lambda: [random_streams(7, [[5] * i])[0] for i in range(3000)],
    "equal prompts of one call without a seed": lambda: random_streams(None, [[5]] * (DRAWS // 2), 2),
    "calls without a seed": lambda: [random_streams(None, [[5]])[0] for _ in range(DRAWS)],
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.usefixtures("fixed_entropy")
def test_over_many_choices_the_first_tokens_are_as_frequent_as_the_softmax_says_and_independent(choices: str, logits):
    streams, likeliest = CHOICES[choices](), logits[0].topk(50).values
    first, second = (drawn(likeliest, streams, index) for index in (0, 1))
    assert excess_of_tokens(first, likeliest) < 5
    assert excess_of_tokens(second, likeliest) < 5
    assert excess_of_pairs(first, second) < 5, "a choice's first draw says nothing of its second"
    for lag in range(1, 5):
        assert excess_of_pairs(first[:-lag], first[lag:]) < 5, f"nor of the choice {lag} further"
        assert excess_of_pairs(first[:-lag], second[lag:]) < 5
        assert excess_of_pairs(second[:-lag], first[lag:]) < 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.6, top_k=40),
        SamplingParams(1.7),
        SamplingParams(1.0, top_p=0.8),
        SamplingParams(0.9, top_k=100, top_p=0.9),
        SamplingParams(2.0, top_k=5),
    ],
    ids=str,
)
def test_first_tokens_of_neighbouring_seeds_are_as_frequent_as_the_softmax_says(params: SamplingParams, logits, prompts):
    tokens = drawn(logits[9], [random_streams(seed, [prompts[9]])[0] for seed in range(DRAWS)], params=params)
    allowed = reference(logits[9].tolist(), params)
    assert all(allowed[token] for token in tokens)
    assert excess_of_tokens(tokens, logits[9], params) < 5


@pytest.mark.parametrize("call", ["one", "sixty"])
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.usefixtures("fixed_entropy")
def test_sixty_prompts_begin_with_the_same_token_no_more_often_than_their_probabilities_say(call, seeded, logits, prompts):
    """In one call, or each in a call of its own with the same seed."""
    probabilities = logits.double().softmax(-1)
    alike = probabilities @ probabilities.T
    expected = sum(alike[a, b].item() for a, b in combinations(range(60), 2))
    found = []
    for seed in range(60):
        own = seed if seeded else None
        streams = random_streams(own, prompts) if call == "one" else [random_streams(own, [one])[0] for one in prompts]
        tokens = sample(logits, [SamplingParams(1.0, stream=stream) for stream in streams], [0] * 60).tolist()
        found.append(sum(a == b for a, b in combinations(tokens, 2)))
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in found) / (len(found) - 1) / len(found))
    assert abs(mean - expected) < 5 * deviation, f"{mean:.1f} pairs alike, {expected:.1f} expected"
