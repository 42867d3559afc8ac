"""Drawing the next token, against probabilities computed plainly in float64."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batching.request import SamplingParams
from model import sampling
from model.sampling import row_key, uniforms

DRAWS = 6000


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    tokens: list[int] = sampling.sample(logits, params, indices).tolist()
    return tokens


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def tied_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Full of equal values, as logits computed in bfloat16 are."""
    return random_logits(rows, vocab, seed).round()


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """The probability of each token: temperature, then the top_k likeliest, then the fewest of them that reach top_p."""
    highest = max(logits)
    weights = [math.exp((x - highest) / params.temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda token: -weights[token])
    if params.top_k:
        kept = kept[: params.top_k]
    total, nucleus, mass = sum(weights[token] for token in kept), [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= params.top_p:
            break
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=1.0, top_k=4),
    SamplingParams(temperature=1.0, top_k=500),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.7, top_p=0.35),
    SamplingParams(temperature=1.3, top_k=6, top_p=0.7),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(params: SamplingParams):
    logits = random_logits(1, 12)
    drawn = Counter(sample(logits.expand(DRAWS, -1), [params] * DRAWS, range(DRAWS)))
    for token, p in enumerate(reference(logits[0].tolist(), params)):
        if p == 0:
            assert drawn[token] == 0, f"token {token} is cut off"
        sigma = math.sqrt(DRAWS * p * (1 - p))
        assert abs(drawn[token] - DRAWS * p) <= 5 * sigma, f"token {token}: {drawn[token]} draws, probability {p:.4f}"


def splitmix64(x: int) -> int:
    """Its output function, in plain whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(stream=st.integers(0, 2**64 - 1), index=st.integers(0, 4000), temperature=st.floats(0.05, 5.0))
def test_a_draw_is_the_largest_of_log_probability_plus_gumbel_noise(stream: int, index: int, temperature: float):
    logits = random_logits(1, 50, stream % 1000)
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((splitmix64(stream) + (index + 1) * golden) % 2**64)
    noise = [((splitmix64((key + (token + 1) * golden) % 2**64) >> 12) + 0.5) / 2**52 for token in range(50)]
    probabilities = reference(logits[0].tolist(), SamplingParams(temperature))
    best = max(range(50), key=lambda t: math.log(probabilities[t] or 1e-300) - math.log(-math.log(noise[t])))
    assert sample(logits, [SamplingParams(temperature, stream=stream)], [index]) == [best]


@pytest.mark.parametrize(
    "params", [SamplingParams(0.9), SamplingParams(0.9, top_k=40), SamplingParams(0.9, top_p=0.9)], ids=str
)
def test_rounding_errors_of_the_logits_change_next_to_no_draw(params: SamplingParams):
    """Inverting the cumulated distribution in the order of the ids would change some dozens of these."""
    draws = 2000
    logits = random_logits(1, 5000).expand(draws, -1)
    jitter = 1e-4 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    before, after = (sample(x, [params] * draws, range(draws)) for x in (logits, logits + jitter))
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 5


def uniform(stream: int, index: int, token: int = 0) -> float:
    return uniforms([row_key(stream, index)], torch.tensor([[token]])).item()


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 300]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
)
def test_only_tokens_that_the_cuts_leave_are_drawn(seed: int, temperature: float, top_k: int, top_p: float):
    logits = random_logits(1, 200, seed)
    params = SamplingParams(temperature, top_k, top_p, seed)
    allowed = reference(logits[0].tolist(), params)
    for token in sample(logits.expand(20, -1), [params] * 20, range(20)):
        assert allowed[token] > 0


def test_greedy_is_the_likeliest_token():
    logits = random_logits(40, 300)
    likeliest = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, [SamplingParams(stream=i) for i in range(40)], range(40)) == likeliest


def test_greedy_takes_the_first_of_equally_likely_tokens_in_any_batch():
    logits = tied_logits(40, 300)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, [SamplingParams()] * 40, range(40)) == first


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = random_logits(40, 300)
    params = [SamplingParams(temperature, stream=i) for i in range(40)]
    assert sample(logits, params, range(40)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [1e-9, 1e-300, 0.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_top_p_always_keeps_the_likeliest_token(top_p: float, top_k: int):
    logits = random_logits(40, 300)
    params = [SamplingParams(1.0, top_k, top_p, stream=i) for i in range(40)]
    assert sample(logits, params, range(40)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [5, 33, 300, 2000])
@pytest.mark.parametrize("make", [random_logits, tied_logits])
def test_top_k_of_1_is_greedy_also_where_logits_are_equal(make, vocab: int):
    logits = make(40, vocab)
    params = [SamplingParams(1.0, top_k=1, stream=i) for i in range(40)]
    assert sample(logits, params, range(40)) == sample(logits, [SamplingParams()] * 40, range(40))


ROW = st.tuples(
    st.integers(0, 1000),  # which logits
    st.booleans(),  # whether they are tied
    st.builds(
        SamplingParams,
        st.sampled_from([0.0, 1e-3, 0.7, 1.0, 2.0]),
        st.sampled_from([0, 1, 2, 5, 40, 1000]),
        st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
        st.integers(0, 2**63),
    ),
    st.integers(0, 4000),
)


@given(rows=st.lists(ROW, min_size=2, max_size=8))
def test_a_rows_draw_depends_neither_on_its_neighbours_nor_on_its_place(rows):
    logits = torch.cat([(tied_logits if tied else random_logits)(1, 300, seed) for seed, tied, _, _ in rows])
    params, indices = [row[2] for row in rows], [row[3] for row in rows]
    alone = [sample(logits[i : i + 1], [params[i]], [indices[i]])[0] for i in range(len(rows))]
    assert sample(logits, params, indices) == alone
    assert sample(logits.flip(0), params[::-1], indices[::-1]) == alone[::-1]


def test_a_neighbours_larger_top_k_does_not_change_which_of_equal_logits_are_kept():
    wide = SamplingParams(1.0, top_k=400)
    for seed in range(30):
        logits, params = tied_logits(1, 500, seed), SamplingParams(1.0, top_k=5, stream=seed)
        together = sample(logits.expand(2, -1), [params, wide], [0, 0])
        assert together[0] == sample(logits, [params], [0])[0]


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 300), [], []) == []


def test_the_uniform_number_differs_by_stream_index_and_token_and_is_the_same_each_time():
    places = list(product([0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1], range(100), range(5)))
    numbers = [uniform(*place) for place in places]
    assert all(0 < u < 1 for u in numbers)
    assert len(set(numbers)) == len(numbers)
    assert numbers == [uniform(*place) for place in places]


@pytest.mark.parametrize(("mixed", "u"), [(2**64 - 1, 1 - 2**-53), (0, 2**-53)])
def test_the_uniform_number_is_never_0_nor_1_whose_noise_would_be_infinite(mixed: int, u: float):
    """The key whose 64 bits come out as all ones, or none: each step of SplitMix64 taken back."""
    x = mixed
    for bits, factor in ((31, 1), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
        x = x * pow(factor, -1, 2**64) % 2**64
        x ^= (x >> bits) ^ (x >> 2 * bits)
    key = (x - 0x9E3779B97F4A7C15) % 2**64
    assert uniforms([key], torch.tensor([[0]])).item() == u


@pytest.mark.parametrize("along", ["streams", "indices", "tokens"])
def test_the_uniform_number_is_uniform_and_says_nothing_of_its_neighbours(along: str):
    """On neighbouring streams too, which hashed ones are not: the noise does not lean on the hash."""
    bins, draws = 16, 40_000
    counting = torch.arange(draws)
    if along == "tokens":
        numbers = uniforms([row_key(7, 3)], counting[None])[0]
    else:
        keys = [row_key(i, 3) if along == "streams" else row_key(7, i) for i in range(draws)]
        numbers = uniforms(keys, torch.full((draws, 1), 11))[:, 0]
    places = (numbers * bins).long()
    for lag in range(1, 6):
        pairs = torch.bincount(places[:-lag] * bins + places[lag:], minlength=bins**2)
        expected = (draws - lag) / bins**2
        chi2 = ((pairs - expected) ** 2 / expected).sum().item()
        assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6, f"{lag} further: 255 degrees of freedom, 255 +- 22.6"


def test_a_token_is_not_drawn_before_its_time():
    logits = random_logits(3, 12)
    logits[:, 7] = 50.0
    short = SamplingParams(temperature=1.0, min_tokens=4, stop_token_ids=(7, 3))
    greedy = SamplingParams(min_tokens=4, stop_token_ids=(7, 3))
    plain = SamplingParams(temperature=1.0)
    assert sample(logits, [short, greedy, plain], [3, 3, 3])[2] == 7
    assert 7 not in sample(logits, [short, greedy, plain], [3, 3, 3])[:2]
    assert sample(logits, [short, greedy, plain], [4, 4, 4]) == [7, 7, 7]
    assert logits[0, 7] == 50.0, "the logits stay as they are"
