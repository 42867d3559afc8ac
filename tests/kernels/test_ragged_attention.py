"""Paged ragged attention against plain float64 attention: the processor's kernel, and the plain torch beside it. Inputs are new
in each run; a failure shows the seed, and BATCHLAB_TEST_SEED=<seed> brings it back."""

import math
import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels import ragged_attention as module
from kernels.cpu_attention import attention as cpu_attention
from kernels.ragged_attention import plain_attention, ragged_attention
from tests.kernels.ragged import HEAD_SIZE, HEADS, Case, Share

CONTEXTS = [0, 1, 15, 16, 17, 255, 1023]
CHUNK = 5
RAGGED = [Share(0, 33), Share(17, 1), Share(16, 20), Share(255, 1), Share(0, 1), Share(31, 2), Share(1, 1), Share(15, 16)]
Attention = Callable[..., torch.Tensor]
BOTH = pytest.mark.parametrize("attention", [cpu_attention, plain_attention])
BF16 = torch.bfloat16


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("BATCHLAB_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {value}")
    return value


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(case: Case, attention: Attention) -> list[torch.Tensor]:
    return case.real(attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch))


def check(case: Case, attention: Attention, tolerance: float = 1e-4) -> None:
    expected = case.reference()
    for share, actual, wanted in zip(case.shares, run(case, attention), expected, strict=True):
        assert actual.shape == wanted.shape
        assert (actual - wanted).abs().le(tolerance).all(), share  # also false for NaN


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_decode_attends_to_its_whole_context_and_itself(attention: Attention, context: int, seed: int):
    check(Case([Share(context, 1)], seed), attention)


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_token_of_a_chunk_attends_to_the_context_and_the_chunk_up_to_itself(attention: Attention, context: int, seed: int):
    check(Case([Share(context, CHUNK)], seed), attention)
    check(Case([Share(context, 40)], seed + 1), attention)


@BOTH
def test_a_ragged_mix_of_prefill_chunks_and_decodes_keeps_its_rows_apart(attention: Attention, seed: int):
    order = random.Random(seed).sample(RAGGED, len(RAGGED))
    check(Case(order, seed), attention)


def test_the_number_of_threads_changes_no_bit(threads: int, seed: int):
    """Nor does how many heads a piece of work has, which follows from it."""
    case, again = Case(RAGGED, seed), Case(RAGGED, seed)
    there = ragged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    torch.set_num_threads(1)
    alone = ragged_attention(again.q, again.k, again.v, again.k_cache, again.v_cache, again.batch)
    assert torch.equal(there, alone)


@BOTH
def test_a_row_gives_the_same_outputs_alone_and_among_others(attention: Attention, seed: int):
    case = Case(RAGGED, seed)
    together = run(case, attention)
    for i, share in enumerate(case.shares):
        alone = Case([share], seed)
        slots = case.slots_of(case.tables[i], 0, share.context)
        into = alone.slots_of(alone.tables[0], 0, share.context)
        alone.put(alone.k_cache, into, case.at(case.k_cache, slots))
        alone.put(alone.v_cache, into, case.at(case.v_cache, slots))
        own = slice(case.batch.begins[i], case.batch.begins[i + 1])
        alone.q, alone.k, alone.v = case.q[own], case.k[own], case.v[own]
        difference = (run(alone, attention)[0] - together[i]).abs().max()
        assert difference == 0 if attention is cpu_attention else difference < 1e-5


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("count", [1, CHUNK])
def test_a_span_wider_than_the_context_changes_nothing(attention: Attention, context: int, count: int, seed: int):
    for wider in (1, 16, 40):
        check(Case([Share(context, count, span=context + count + wider), Share(3, 1)], seed), attention)


@BOTH
@pytest.mark.parametrize("count", [1, CHUNK])
def test_the_columns_of_a_span_are_really_read(attention: Attention, count: int, seed: int):
    """Static pays for its rectangle: a value that is no number shows through any weight, 0 too."""
    case = Case([Share(20, count, span=60)], seed)
    case.put(case.v_cache, case.slots_of(case.tables[0], 59, 60), torch.full((1, HEADS, HEAD_SIZE), math.nan))
    assert run(case, attention)[0].isnan().all()


@BOTH
def test_a_span_within_the_context_changes_nothing(attention: Attention, seed: int):
    check(Case([Share(40, 1, span=20), Share(40, CHUNK, span=41)], seed), attention)


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_columns_do_not_change_the_real_tokens(attention: Attention, context: int, seed: int):
    case = Case([Share(context, 2, pad=30), Share(0, 7, pad=1), Share(context, 1, pad=9, span=context + 33)], seed)
    for share, begin, end in zip(case.shares, case.batch.begins, case.batch.begins[1:], strict=False):
        padding = slice(begin + share.count, end)
        case.q[padding], case.k[padding], case.v[padding] = 1e3, 1e3, 1e3
    check(case, attention)


@BOTH
def test_a_finished_row_that_keeps_its_seat_changes_no_other_row(attention: Attention, seed: int):
    check(Case([Share(20, 1, span=40), Share(30, 0, pad=1, span=40), Share(39, 1, span=40)], seed), attention)


@BOTH
@pytest.mark.parametrize("cached_as", [torch.float32, BF16])
def test_the_caches_hold_the_new_keys_and_values_in_their_slots_and_nothing_else_is_touched(
    attention: Attention, cached_as: torch.dtype, seed: int
):
    case = Case([*RAGGED, Share(20, 3, pad=14), Share(30, 0, pad=1, span=40)], seed, cached_as=cached_as)
    before = {"k": case.k_cache.clone(), "v": case.v_cache.clone()}
    run(case, attention)
    for name, cache, new in (("k", case.k_cache, case.k), ("v", case.v_cache, case.v)):
        assert torch.equal(case.at(cache, case.batch.slots), new.to(cached_as)), name
        case.put(before[name], case.batch.slots, new)
        whole = torch.int16 if cached_as is BF16 else torch.int32
        assert torch.equal(cache.view(whole), before[name].view(whole)), f"{name}: compared bit by bit, since NaN != NaN"


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("cached_as", [torch.float32, BF16])
def test_queries_and_caches_of_16_bits_cost_their_rounding(
    attention: Attention, dtype: torch.dtype, cached_as: torch.dtype, seed: int
):
    exact = dtype is cached_as is torch.float32
    check(Case(RAGGED, seed, dtype, cached_as), attention, tolerance=1e-4 if exact else 0.1)


def test_the_output_has_the_dtype_of_the_queries(seed: int):
    case = Case(RAGGED, seed, BF16)
    out = ragged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert out.dtype == BF16
    assert case.k_cache.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float32, "cpu"), (BF16, "cpu"), (torch.float16, "plain")])
def test_the_device_and_the_dtypes_decide_which_kernel_runs(dtype: torch.dtype, kernel: str, seed: int, monkeypatch):
    asked = []
    monkeypatch.setattr(module.cpu_attention, "attention", lambda *args: asked.append("cpu"))
    monkeypatch.setattr(module, "plain_attention", lambda *args: asked.append("plain"))
    case = Case([Share(3, 1)], seed, dtype)
    ragged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert asked == [kernel]
