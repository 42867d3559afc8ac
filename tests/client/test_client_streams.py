"""Arrivals, distributions and lengths: sums exact, times in their bins, draws truncated, one seed."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.arrivals import BURSTS, INNER, OUTER, Bursts, counts_by_bin, draw_arrivals, read_arrivals
from client.distributions import Shape, gaussian, inverse_gaussian, read_shape, zipf
from client.lengths import WORDS, draw_lengths, fit, read_lengths, words
from client.main import main
from client.shared.plan import PlanError, read_plan, write_plan
from client.workload import Workload, make_plan

SPANS = {"outer": st.sampled_from(sorted(OUTER)), "inner": st.sampled_from(sorted(INNER))}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(**SPANS, count=st.integers(1, 400), bins=st.integers(1, 60), seed=st.integers(0, 2**32), duration_s=st.floats(0.01, 1e4))
def test_each_outer_and_inner_shape_sends_exactly_so_many_requests_each_in_its_bin(
    outer: str, inner: str, count: int, bins: int, seed: int, duration_s: float
) -> None:
    bursts = Bursts(read_shape(outer, OUTER), read_shape(inner, INNER))
    counts = counts_by_bin(bursts.outer, count, bins, rng(seed))
    assert sum(counts) == count
    times = draw_arrivals(bursts, count, duration_s, bins, rng(seed))
    assert len(times) == count
    assert list(times) == sorted(times)
    width_s = duration_s / bins
    begun = 0
    for k, n in enumerate(counts):
        inside = times[begun : begun + n]
        assert all((inside >= k * width_s) & (inside < (k + 1) * width_s))
        begun += n


def test_what_rounding_leaves_over_goes_to_the_bins_that_lost_most_by_it() -> None:
    class Fixed(np.random.Generator):
        def uniform(self, *_: object) -> np.ndarray:  # type: ignore[override]
            return np.tile([0.5, 0.75, 1.25], 20)

    # Shares of 1.6, 2.4 and 4.
    assert counts_by_bin(read_shape("uniform", OUTER), 8, 3, Fixed(np.random.PCG64(0))) == [2, 2, 4]


def test_a_long_tail_does_not_squeeze_a_bin_into_its_first_percent() -> None:
    for inner in INNER:
        places = draw_arrivals(Bursts(read_shape("uniform", OUTER), read_shape(inner, INNER)), 5000, 1.0, 1, rng())
        assert np.mean(places < 0.01) < 0.15, inner
        assert np.mean(places > 0.5) > 0.05, inner


def test_uniform_places_do_not_stand_at_the_end_of_their_bin() -> None:
    places = draw_arrivals(read_arrivals("uniform/uniform"), 4000, 1.0, 1, rng())
    quarters, _ = np.histogram(places, 4, (0, 1))
    assert min(quarters) > 900


@pytest.mark.parametrize("seed", range(3))
def test_draws_outside_the_range_are_drawn_again_and_do_not_pile_up_at_its_edge(seed: int) -> None:
    for draws in (gaussian(rng(seed), 5000, 0.9, 0.5, 0.0, 1.0), inverse_gaussian(rng(seed), 5000, 0.9, 0.5, 0.0, 1.0)):
        assert draws.min() >= 0.0
        assert draws.max() < 1.0
        assert np.mean(draws > 0.99) < 0.03
    ranks = zipf(rng(seed), 5000, 0.8, 10)
    assert {int(rank) for rank in ranks} == set(range(1, 11))
    assert np.mean(ranks == 10) < np.mean(ranks == 9) * 1.6, "the tail was cut off, not piled up"


def test_the_named_bursts_are_in_the_order_of_their_names() -> None:
    def unevenness(name: str) -> float:
        found = []
        for seed in range(20):
            times = draw_arrivals(read_arrivals(name), 600, 60.0, 20, rng(seed))
            found.append(np.histogram(times, 240, (0, 60.0))[0].var() / 2.5)
        return float(np.mean(found))

    low, medium, high = (unevenness(name) for name in BURSTS)
    assert low < medium < high


@pytest.mark.parametrize(("burstiness", "expected"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gamma_gaps_have_the_spread_that_their_burstiness_says(burstiness: float, expected: float) -> None:
    times = draw_arrivals(read_arrivals(f"gamma:burstiness={burstiness}"), 20_000, 100.0, 1, rng())
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.05)
    assert times[-1] == pytest.approx(100.0)


def test_constant_gaps_are_equal_and_at_once_means_at_once() -> None:
    assert list(draw_arrivals(read_arrivals("constant"), 4, 2.0, 1, rng())) == [0.0, 0.5, 1.0, 1.5]
    assert list(draw_arrivals(read_arrivals("at-once"), 3, 2.0, 1, rng())) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pareto", "pareto"),
        ("zipf/pareto", "pareto"),
        ("zipf", "OUTER/INNER"),
        ("zipf:b=2/uniform", "'b'"),
        ("zipf:a=two/uniform", "two"),
        ("gamma:burstiness=nan", "nan"),
        ("constant:rate=2", "it has none"),
    ],
)
def test_an_unknown_distribution_or_parameter_is_one_line_naming_it(
    text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--arrivals", text, "--plan-only", "--out", str(tmp_path)])
    shown = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert shown.count("\n") == 1
    assert word in shown


@pytest.mark.parametrize(
    ("arrivals", "word"),
    [
        ("gaussian:mean=-50/uniform", "gaussian: hardly any draw"),
        ("uniform/gaussian:std=0", "std"),
        ("uniform:low=2,high=1/uniform", "low"),
        ("zipf:ranks=1.5/uniform", "ranks"),
        ("gamma:burstiness=0", "burstiness"),
    ],
)
def test_a_parameter_that_cannot_be_drawn_from_is_one_line_naming_it(
    arrivals: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--arrivals", arrivals, "--plan-only", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert word in shown


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("fixed:tokens=7", 7, 7),
        ("uniform:low=3,high=5", 3, 5),
        ("normal:mean=50,std=30,low=40,high=60", 40, 60),
        ("zipf", 8, 256),
    ],
)
def test_lengths_fill_their_range_and_stay_in_it(text: str, low: int, high: int) -> None:
    drawn = draw_lengths(read_lengths(text), 20_000, rng())
    assert (min(drawn), max(drawn)) == (low, high)


def test_both_ends_of_a_uniform_length_are_as_likely_as_the_middle() -> None:
    drawn = draw_lengths(read_lengths("uniform:low=1,high=4"), 8000, rng())
    assert all(1800 < drawn.count(n) < 2200 for n in range(1, 5))


@pytest.mark.parametrize("text", ["uniform:low=5,high=5", "fixed:tokens=0", "normal:low=1.5", "geometric", "zipf:low=9,high=3"])
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|there is no"):
        read_lengths(text)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((100, 100), (100, 100)),
        ((4000, 200), (312, 200)),
        ((100, 4000), (100, 412)),
        ((4000, 4000), (256, 256)),
        ((511, 2), (510, 2)),
    ],
)
def test_what_does_not_fit_the_context_is_cut_to_it(pair: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(*pair, 512) == expected


def test_a_prompt_made_to_a_length_has_it_in_both_vocabularies() -> None:
    pytest.importorskip("tokenizers", reason="the server's vocabularies need it")
    from model.tokenizer import load_gpt2_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(Path(__file__).parents[2] / "model" / "demo")
    draw = random.Random(0)
    for tokens in (1, 2, 7, 300):
        assert len(tokenizer.encode(words(tokens, draw))) == tokens
    for one in filter(None, (tokenizer, load_gpt2_tokenizer())):
        assert all(len(one.encode(f" {word}")) == 1 for word in WORDS)


def test_a_plan_read_from_its_file_is_the_plan(tmp_path: Path) -> None:
    lengths = Shape("uniform", {"low": 3.0, "high": 50.0})
    plan = make_plan(
        Workload(40, seed=3, arrivals=read_arrivals("high"), duration_s=9.0, prompt_lengths=lengths, output_lengths=(5,))
    )
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    marked = b"\xef\xbb\xbf" + (tmp_path / "plan.json").read_bytes()  # as some editors save it
    (tmp_path / "plan.json").write_bytes(marked)
    assert read_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8-sig"))["requests"][0].keys() >= {
        "at_s",
        "prompt",
        "num_tokens",
        "priority",
    }


def test_arrivals_are_drawn_by_seed_and_lengths_move_none_of_them() -> None:
    def times(seed: int, outputs: tuple[int, ...] | Shape) -> list[float]:
        workload = Workload(30, seed=seed, arrivals=read_arrivals("medium"), duration_s=5.0, output_lengths=outputs)
        return [request.at_s for request in make_plan(workload).requests]

    assert times(1, (5,)) == times(1, read_lengths("zipf"))
    assert times(1, (5,)) != times(2, (5,))
    assert all(earlier <= later for earlier, later in pairwise(times(1, (5,))))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"at_s": -1}, "request 2: at_s"),
        ({"num_tokens": 0}, "request 2: num_tokens"),
        ({"num_tokens": "5"}, "request 2: num_tokens"),
        ({"prompt": ""}, "request 2: prompt"),
        ({"priority": "urgent"}, "request 2: priority"),
        ({"seed": None}, "request 2: seed"),
        ({"prompt_tokens": 0.5}, "request 2: prompt_tokens"),
    ],
)
def test_a_bad_request_in_a_plan_is_named(change: dict[str, object], word: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, make_plan(Workload(3, output_lengths=(5,))))
    value = json.loads(path.read_text(encoding="utf-8"))
    value["requests"][1] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(PlanError, match=word):
        read_plan(path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"requests": []}', '{"plan": 2, "requests": [{}]}', '{"plan": 1, "requests": [1]}']
)
def test_a_file_that_is_no_plan_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(text)
    assert main(["--plan", str(tmp_path / "p.json"), "--plan-only", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "p.json" in shown
