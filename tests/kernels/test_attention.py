"""Paged ragged attention against plain float64 attention: the processor's kernel, the GPU's, and the plain torch beside them.

The GPU's run in Triton's interpreter where there is no GPU, else on it (`pytest -m gpu`; with TRITON_INTERPRET=1 in the
interpreter there too). Inputs are new in each run; a failure shows the seed, and BATCHLAB_TEST_SEED=<seed> brings it back."""

import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from kernels import attention as module
from kernels.attention import paged_attention, plain_attention
from kernels.batch import RaggedBatch
from kernels.cpu_attention import attention as cpu_attention
from kernels.decode_attention import _splits, decode_attention
from kernels.ragged_attention import ragged_attention
from tests.kernels import ragged
from tests.kernels.ragged import HEAD_SIZE, HEADS, Case, Share

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

CONTEXTS = [0, 1, 15, 16, 17, 255, 1023]
CHUNK = 5
RAGGED = [Share(0, 33), Share(17, 1), Share(16, 20), Share(255, 1), Share(0, 1), Share(31, 2), Share(1, 1), Share(15, 16)]
Attention = Callable[..., torch.Tensor]
BF16 = torch.bfloat16


def triton_attention(q, k, v, k_cache, v_cache, batch: RaggedBatch) -> torch.Tensor:
    """By the kernel that the engine would take on a GPU, there or in the interpreter. Caches are changed in place."""
    tensors = {field.name: getattr(batch, field.name).to(DEVICE) for field in fields(batch)}
    caches = k_cache.to(DEVICE), v_cache.to(DEVICE)
    kernel = decode_attention if len(q) == len(batch.tables) else ragged_attention
    qkv = torch.stack([q, k, v], 1).to(DEVICE).unbind(1)  # interleaved still
    out = kernel(*qkv, *caches, RaggedBatch(**tensors))
    k_cache.copy_(caches[0])
    v_cache.copy_(caches[1])
    return out.cpu()


TRITON = pytest.param(triton_attention, id="triton", marks=[] if DEVICE.type == "cpu" else pytest.mark.gpu)
ALL = pytest.mark.parametrize("attention", [cpu_attention, plain_attention, TRITON])


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("BATCHLAB_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {value}")
    return value


@pytest.fixture(autouse=True)
def dot_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies bfloat16 by its bits, as integers (github.com/triton-lang/triton/issues/11584)."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    original = InterpreterBuilder.create_dot

    def exact(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar is not tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, exact(a), exact(b), *rest))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(case: Case, attention: Attention) -> list[torch.Tensor]:
    return case.real(attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch))


USUAL_PEAK = 6.0  # of what is drawn; rounding errors grow with the values, and now and then a draw has one of 8 or 9


def check(case: Case, attention: Attention, tolerance: float = 1e-4) -> None:
    expected = case.reference()
    for share, actual, wanted in zip(case.shares, run(case, attention), expected, strict=True):
        assert actual.shape == wanted.shape
        peak = float(wanted.abs().max()) if wanted.numel() else 0.0
        bound = tolerance * max(1.0, peak / USUAL_PEAK)
        assert (actual - wanted).abs().le(bound).all(), share  # also false for NaN


@ALL
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_decode_attends_to_its_whole_context_and_itself(attention: Attention, context: int, seed: int):
    check(Case([Share(context, 1)], seed), attention)


@ALL
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_token_of_a_chunk_attends_to_the_context_and_the_chunk_up_to_itself(attention: Attention, context: int, seed: int):
    check(Case([Share(context, CHUNK)], seed), attention)
    check(Case([Share(context, 40)], seed + 1), attention)


@ALL
def test_a_ragged_mix_of_prefill_chunks_and_decodes_keeps_its_rows_apart(attention: Attention, seed: int):
    order = random.Random(seed).sample(RAGGED, len(RAGGED))
    check(Case(order, seed), attention)


def test_the_number_of_threads_changes_no_bit(threads: int, seed: int):
    """Nor does how many heads a piece of work has, which follows from it."""
    case, again = Case(RAGGED, seed), Case(RAGGED, seed)
    there = paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    torch.set_num_threads(1)
    alone = paged_attention(again.q, again.k, again.v, again.k_cache, again.v_cache, again.batch)
    assert torch.equal(there, alone)


@ALL
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


@ALL
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("count", [1, CHUNK])
def test_a_span_wider_than_the_context_changes_nothing(attention: Attention, context: int, count: int, seed: int):
    for wider in (1, 16, 40):
        check(Case([Share(context, count, span=context + count + wider), Share(3, 1)], seed), attention)


@ALL
@pytest.mark.parametrize("count", [1, CHUNK])
def test_the_columns_of_a_span_are_really_read(attention: Attention, count: int, seed: int):
    """Static pays for its rectangle: a value that is no number shows through any weight, 0 too."""
    case = Case([Share(20, count, span=60)], seed)
    case.put(case.v_cache, case.slots_of(case.tables[0], 59, 60), torch.full((1, HEADS, HEAD_SIZE), math.nan))
    assert run(case, attention)[0].isnan().all()


@ALL
def test_a_span_within_the_context_changes_nothing(attention: Attention, seed: int):
    check(Case([Share(40, 1, span=20), Share(40, CHUNK, span=41)], seed), attention)


@ALL
@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_columns_do_not_change_the_real_tokens(attention: Attention, context: int, seed: int):
    case = Case([Share(context, 2, pad=30), Share(0, 7, pad=1), Share(context, 1, pad=9, span=context + 33)], seed)
    for share, begin, end in zip(case.shares, case.batch.begins, case.batch.begins[1:], strict=False):
        padding = slice(begin + share.count, end)
        case.q[padding], case.k[padding], case.v[padding] = 1e3, 1e3, 1e3
    check(case, attention)


@ALL
def test_a_finished_row_that_keeps_its_seat_changes_no_other_row(attention: Attention, seed: int):
    check(Case([Share(20, 1, span=40), Share(30, 0, pad=1, span=40), Share(39, 1, span=40)], seed), attention)


@pytest.mark.parametrize("attention", [cpu_attention, plain_attention])
def test_tokens_after_the_last_row_touch_nothing_and_give_0(attention: Attention, seed: int):
    case, exact = Case(RAGGED, seed), Case(RAGGED, seed)
    wanted = run(exact, attention)
    more = torch.full((5, HEADS, HEAD_SIZE), math.nan)
    case.q, case.k, case.v = (torch.cat([x, more]) for x in (case.q, case.k, case.v))
    case.batch = replace(case.batch, slots=torch.cat([case.batch.slots, torch.zeros(5, dtype=torch.int64)]))
    out = attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert all(torch.equal(mine, same) for mine, same in zip(case.real(out), wanted, strict=True))
    assert not out[-5:].any()
    for mine, same in ((case.k_cache, exact.k_cache), (case.v_cache, exact.v_cache)):
        assert torch.equal(mine.view(torch.int32), same.view(torch.int32))


@ALL
@pytest.mark.parametrize("cached_as", [torch.float32, BF16])
def test_the_caches_hold_the_new_keys_and_values_in_their_slots_and_nothing_else_is_touched(
    attention: Attention, cached_as: torch.dtype, seed: int
):
    # Triton's interpreter cuts off what a GPU rounds; the engine's queries have the cache's dtype there, so nothing is.
    dtype = cached_as if attention is triton_attention else torch.float32
    case = Case([*RAGGED, Share(20, 3, pad=14), Share(30, 0, pad=1, span=40)], seed, dtype, cached_as)
    before = {"k": case.k_cache.clone(), "v": case.v_cache.clone()}
    run(case, attention)
    for name, cache, new in (("k", case.k_cache, case.k), ("v", case.v_cache, case.v)):
        assert torch.equal(case.at(cache, case.batch.slots), new.to(cached_as)), name
        case.put(before[name], case.batch.slots, new)
        whole = torch.int16 if cached_as is BF16 else torch.int32
        assert torch.equal(cache.view(whole), before[name].view(whole)), f"{name}: compared bit by bit, since NaN != NaN"


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("cached_as", [torch.float32, BF16])
def test_queries_and_caches_of_16_bits_cost_their_rounding(
    attention: Attention, dtype: torch.dtype, cached_as: torch.dtype, seed: int
):
    exact = dtype is cached_as is torch.float32
    check(Case(RAGGED, seed, dtype, cached_as), attention, tolerance=1e-4 if exact else 0.25)


def test_the_output_has_the_dtype_of_the_queries(seed: int):
    case = Case(RAGGED, seed, BF16)
    out = paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert out.dtype == BF16
    assert case.k_cache.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float32, "cpu"), (BF16, "cpu"), (torch.float16, "plain")])
def test_on_a_processor_the_dtypes_decide_which_kernel_runs(dtype: torch.dtype, kernel: str, seed: int, monkeypatch):
    asked = []
    monkeypatch.setattr(module.cpu_attention, "attention", lambda *args: asked.append("cpu"))
    monkeypatch.setattr(module, "plain_attention", lambda *args: asked.append("plain"))
    case = Case([Share(3, 1)], seed, dtype)
    paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert asked == [kernel]


@pytest.mark.parametrize(("count", "kernel"), [(1, "decode"), (2, "ragged")])
def test_on_a_gpu_that_has_triton_the_batch_decides(count: int, kernel: str, seed: int, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "has_triton", lambda device: True)
    monkeypatch.setattr("kernels.decode_attention.decode_attention", lambda *args: asked.append("decode"))
    monkeypatch.setattr("kernels.ragged_attention.ragged_attention", lambda *args: asked.append("ragged"))
    case = Case([Share(3, 1), Share(8, count)], seed)
    paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert asked == [kernel]


def test_a_head_size_that_no_gpu_kernel_is_for_is_left_to_plain_torch(seed: int, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "has_triton", lambda device: True)
    monkeypatch.setattr(module.cpu_attention, "STORED", {})
    monkeypatch.setattr(module, "plain_attention", lambda *args: asked.append("plain"))
    monkeypatch.setattr(ragged, "HEAD_SIZE", 24)
    case = Case([Share(3, 1)], seed)
    paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)
    assert asked == ["plain"]


# What only the GPU's kernels have.


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.01), (BF16, 0.05)])
@pytest.mark.parametrize("attention", [TRITON])
def test_head_sizes_and_dtypes(
    attention: Attention, head_size: int, dtype: torch.dtype, tolerance: float, seed: int, monkeypatch
):
    monkeypatch.setattr(ragged, "HEAD_SIZE", head_size)
    monkeypatch.setattr(ragged, "HEADS", 2)
    check(Case([Share(100, 1), Share(0, 1), Share(17, 1)], seed, dtype, dtype), attention, tolerance)
    check(Case([Share(100, 1), Share(0, 19), Share(17, 3)], seed, dtype, dtype), attention, tolerance)


@pytest.mark.parametrize("attention", [TRITON])
@pytest.mark.parametrize("enough", [1, 20, 10_000])
def test_however_often_a_row_is_split_the_output_is_the_same(attention: Attention, enough: int, seed: int, monkeypatch):
    monkeypatch.setattr("kernels.decode_attention._enough", lambda device: enough)
    check(Case([Share(1000, 1), Share(0, 1), Share(64, 1), Share(127, 1), Share(128, 1, span=300)], seed), attention)


def test_a_row_is_split_no_further_than_keeps_the_device_busy_and_never_below_a_tile():
    device = torch.device("cpu")
    assert _splits(16, 1024, device) == 16
    assert _splits(16, 100, device) == 2
    assert _splits(16, 64, device) == 1
    assert _splits(300, 1024, device) == 2
    assert _splits(64 * 16, 1024, device) == 1


WRONG = {
    "q is (4, 160)": lambda a: a.update(q=a["q"].flatten(1)),
    "k is (3, 5, 32)": lambda a: a.update(k=a["k"][:3]),
    "v is (4, 5, 32) torch.float16": lambda a: a.update(v=a["v"].half()),
    "q, k, v are torch.float64": lambda a: a.update({n: a[n].double() for n in "qkv"}),
    "have to lie one after the other": lambda a: a.update(q=a["q"].transpose(1, 2).contiguous().transpose(1, 2)),
    "head size 24": lambda a: a.update({n: a[n][..., :24].contiguous() for n in "qkv"}),
    "k_cache is": lambda a: a.update(k_cache=a["k_cache"][:, :3]),
    "v_cache is": lambda a: a.update(v_cache=a["v_cache"][1:]),
    "k_cache is torch.int8": lambda a: a.update(k_cache=a["k_cache"].to(torch.int8)),
    "v_cache has to be contiguous": lambda a: a.update(v_cache=a["v_cache"].transpose(2, 3).contiguous().transpose(2, 3)),
    "starts is": lambda a: a.update(batch=replace(a["batch"], starts=a["batch"].starts.long())),
    "slots is": lambda a: a.update(batch=replace(a["batch"], slots=a["batch"].slots[:3])),
    "begins is": lambda a: a.update(batch=replace(a["batch"], begins=a["batch"].begins[:4])),
    "tables has to be contiguous": lambda a: a.update(batch=replace(a["batch"], tables=a["batch"].tables.T.contiguous().T)),
}


@pytest.mark.parametrize("kernel", [decode_attention, ragged_attention])
@pytest.mark.parametrize("message", WRONG)
def test_what_a_kernel_cannot_read_is_refused_before_the_launch(kernel, message: str, seed: int):
    case = Case([Share(n, 1) for n in (3, 20, 0, 70)], seed)
    arguments = {n: getattr(case, n) for n in ("q", "k", "v", "k_cache", "v_cache", "batch")}
    WRONG[message](arguments)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        kernel(**arguments)


def test_a_decode_step_has_one_token_a_row(seed: int):
    case = Case([Share(3, 2), Share(4, 1)], seed)
    with pytest.raises(ValueError, match="3 tokens in 2 rows"):
        decode_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, case.batch)


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_are_left_to_plain_torch(capability: tuple[int, int], serves: bool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module.has_triton.__wrapped__(torch.device("cuda")) is serves
    assert not module.has_triton.__wrapped__(torch.device("cpu"))
