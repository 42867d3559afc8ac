"""Paged ragged attention against plain float64 attention. Inputs are new in each run; a failure shows the seed, and
BATCHLAB_TEST_SEED=<seed> brings it back."""

import os
import random

import pytest
import torch

from kernels.ragged_attention import ragged_attention
from tests.kernels.ragged import Case, Share

CONTEXTS = [0, 1, 15, 16, 17, 255]
CHUNK = 5
RAGGED = [Share(0, 33), Share(17, 1), Share(16, 20), Share(255, 1), Share(0, 1), Share(31, 2), Share(1, 1), Share(15, 16)]


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("BATCHLAB_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {value}")
    return value


def run(case: Case) -> list[torch.Tensor]:
    return case.real(ragged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch))


def check(case: Case, tolerance: float = 1e-4) -> None:
    expected = case.reference()
    for share, actual, wanted in zip(case.shares, run(case), expected, strict=True):
        assert actual.shape == wanted.shape
        assert (actual - wanted).abs().le(tolerance).all(), share  # also false for NaN


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_decode_attends_to_its_whole_context_and_itself(context: int, seed: int):
    check(Case([Share(context, 1)], seed))


@pytest.mark.parametrize("context", CONTEXTS)
def test_each_token_of_a_chunk_attends_to_the_context_and_the_chunk_up_to_itself(context: int, seed: int):
    check(Case([Share(context, CHUNK)], seed))
    check(Case([Share(context, 40)], seed + 1))


def test_a_ragged_mix_of_prefill_chunks_and_decodes_keeps_its_rows_apart(seed: int):
    order = random.Random(seed).sample(RAGGED, len(RAGGED))
    check(Case(order, seed))


def test_a_row_gives_the_same_outputs_alone_and_among_others(seed: int):
    case = Case(RAGGED, seed)
    together = run(case)
    for i, row in enumerate(case.batch.rows):
        own = slice(row.begin, row.end)
        alone = Case([case.shares[i]], seed)
        slots = case.slots_of(case.tables[i], 0, case.shares[i].context)
        into = alone.slots_of(alone.tables[0], 0, case.shares[i].context)
        alone.flat(alone.k_cache)[into] = case.flat(case.k_cache)[slots]
        alone.flat(alone.v_cache)[into] = case.flat(case.v_cache)[slots]
        alone.q, alone.k, alone.v = case.q[own], case.k[own], case.v[own]
        torch.testing.assert_close(run(alone)[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("count", [1, CHUNK])
def test_a_span_wider_than_the_context_changes_nothing(context: int, count: int, seed: int):
    for wider in (1, 16, 40):
        check(Case([Share(context, count, span=context + count + wider), Share(3, 1)], seed))


def test_a_span_within_the_context_changes_nothing(seed: int):
    check(Case([Share(40, 1, span=20), Share(40, CHUNK, span=41)], seed))


@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_columns_do_not_change_the_real_tokens(context: int, seed: int):
    case = Case([Share(context, 2, pad=30), Share(0, 7, pad=1), Share(context, 1, pad=9, span=context + 33)], seed)
    for share, row in zip(case.shares, case.batch.rows, strict=True):
        padding = slice(row.begin + share.count, row.end)
        case.q[padding], case.k[padding], case.v[padding] = 1e3, 1e3, 1e3
    check(case)


def test_a_finished_row_that_keeps_its_seat_changes_no_other_row(seed: int):
    check(Case([Share(20, 1, span=40), Share(30, 0, pad=1, span=40), Share(39, 1, span=40)], seed))


def test_the_caches_hold_the_new_keys_and_values_in_their_slots_and_nothing_else_is_touched(seed: int):
    case = Case([*RAGGED, Share(20, 3, pad=14), Share(30, 0, pad=1, span=40)], seed)
    before = {"k": case.k_cache.clone(), "v": case.v_cache.clone()}
    run(case)
    for name, cache, new in (("k", case.k_cache, case.k), ("v", case.v_cache, case.v)):
        assert torch.equal(case.flat(cache)[case.batch.slots], new), name
        others = torch.ones(len(case.flat(cache)), dtype=torch.bool)
        others[case.batch.slots] = False
        kept, was = case.flat(cache)[others], case.flat(before[name])[others]
        assert torch.equal(kept.view(torch.int32), was.view(torch.int32)), f"{name}: compared bit by bit, since NaN != NaN"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_16_bits_attend_over_a_float32_cache(dtype: torch.dtype, seed: int):
    check(Case(RAGGED, seed, dtype), tolerance=0.05)  # what rounding the output to bfloat16 may cost


def test_the_output_has_the_dtype_of_the_queries(seed: int):
    case = Case(RAGGED, seed, torch.bfloat16)
    out = ragged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert out.dtype == torch.bfloat16
    assert case.k_cache.dtype == torch.float32
