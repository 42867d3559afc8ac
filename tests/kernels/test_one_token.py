"""A step of one token: what a batch gets, and no other layout of weights is taken for the one it reads."""

import math

import pytest
import torch
import torch.nn as nn

from kernels import panels
from model.checkpoint import GPTConfig, random
from model.linear import Int8Linear, LaidOutBlock, PackedLinear, lay_out
from tests.kernels import ragged
from tests.kernels.ragged import Case, Share

CPU = torch.device("cpu")
HEADS = 4
WIDTH = HEADS * ragged.HEAD_SIZE


def needs(instruction: panels.Instruction) -> pytest.MarkDecorator:
    missing = not panels.llvm.get_host_cpu_features().get(instruction.feature)
    return pytest.mark.skipif(missing, reason=f"this processor has no {instruction.feature}")


BOTH = [pytest.param("int8", marks=needs(panels.INT8)), pytest.param("bf16", marks=needs(panels.BF16))]
DTYPES = {"int8": torch.float32, "bf16": torch.bfloat16}  # of activations


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def layer(dtype: str, outputs: int, inputs: int, gelu: bool = False, bias: bool = True) -> Int8Linear | PackedLinear:
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(DTYPES[dtype])
    return (Int8Linear if dtype == "int8" else PackedLinear)(linear, gelu)


def same(dtype: str, alone: torch.Tensor, together: torch.Tensor) -> bool:
    """Bit for bit in int8. In bfloat16 here and there rounded otherwise, by a unit in the last of its 8 places."""
    if dtype == "int8":
        return torch.equal(alone, together)
    difference = (alone.float() - together.float()).abs()
    return bool((difference <= 0.01 + 0.01 * together.float().abs()).all() and (difference > 1e-5).float().mean() < 0.03)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 4), (96, 64), (1024, 192), (256, 4096), (50257, 64)])
@pytest.mark.parametrize(("gelu", "bias"), [(False, True), (True, True), (False, False)])
def test_one_token_gets_from_a_layer_what_it_gets_in_a_batch(dtype: str, outputs: int, inputs: int, gelu: bool, bias: bool):
    linear = layer(dtype, outputs, inputs, gelu, bias)
    assert linear.alone
    x = (3 * torch.randn(5, inputs) + 0.5).to(DTYPES[dtype])
    together = linear(x)
    for token in range(5):
        assert same(dtype, linear(x[token : token + 1])[0], together[token])


@pytest.mark.parametrize("dtype", BOTH)
def test_a_token_that_is_strided_is_read_as_it_is(dtype: str):
    linear, x = layer(dtype, 96, 64), torch.randn(64, 2).to(DTYPES[dtype]).T
    assert torch.equal(linear(x[:1])[0], linear(x[:1].contiguous())[0])


def test_activations_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"float32, not torch\.bfloat16"):
        layer("int8", 64, 64)(torch.ones(1, 64, dtype=torch.bfloat16))


# A whole block.


@pytest.fixture(params=[None, 3 * WIDTH, 64], ids=lambda inner: f"inner {inner}")
def blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, nn.Module]:
    monkeypatch.setattr(ragged, "HEADS", HEADS)
    found = {}
    for dtype in ("int8", "bf16"):
        model = random(GPTConfig(1, HEADS, WIDTH, 101, 2048, n_inner=request.param), DTYPES[dtype], CPU)
        lay_out(model, dtype)
        found[dtype] = model.h[0]
    return found


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("cached_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [*(Share(n, 1) for n in (0, 1, 15, 16, 17, 1023)), Share(20, 1, span=70)], ids=str)
def test_one_token_gets_from_a_block_what_it_gets_in_a_batch(blocks, dtype, cached_as, share):
    block = blocks[dtype]
    assert isinstance(block, LaidOutBlock)
    alone = Case([share], 3, cached_as=cached_as)
    both = Case([share, Share(5, 1)], 3, cached_as=cached_as)
    for cache, own in ((both.k_cache, alone.k_cache), (both.v_cache, alone.v_cache)):
        cache[both.tables[0]] = own[alone.tables[0]]
    x = 2 * torch.randn(2, WIDTH).to(DTYPES[dtype])
    together = block(x, both.k_cache, both.v_cache, both.batch)[0]
    y = block(x[:1], alone.k_cache, alone.v_cache, alone.batch)[0]
    assert y.isfinite().all()
    assert same(dtype, y, together)
    for cache, own in ((both.k_cache, alone.k_cache), (both.v_cache, alone.v_cache)):
        assert same(dtype, own[alone.tables[0]].nan_to_num(5), cache[both.tables[0]].nan_to_num(5)), "K and V are written"
    untouched = [i for i in range(len(alone.k_cache)) if i not in alone.tables[0].tolist()]
    assert alone.k_cache[untouched].isnan().all()


@pytest.mark.parametrize("dtype", BOTH)
def test_the_number_of_threads_changes_no_bit(blocks, dtype):
    usual, outputs = torch.get_num_threads(), []
    x = 2 * torch.randn(1, WIDTH).to(DTYPES[dtype])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            case = Case([Share(40, 1)], 3)
            outputs.append(blocks[dtype](x, case.k_cache, case.v_cache, case.batch))
    finally:
        torch.set_num_threads(usual)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", BOTH)
def test_a_nan_stays_one(blocks, dtype):
    case = Case([Share(3, 1)], 3)
    case.v_cache[case.tables[0], :, :3] = math.nan
    assert blocks[dtype](torch.ones(1, WIDTH).to(DTYPES[dtype]), case.k_cache, case.v_cache, case.batch).isnan().any()


# Whose panels are read.


def pack(weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype == torch.int8:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)


def weights(dtype: str, outputs: int, inputs: int) -> torch.Tensor:
    if dtype == "int8":
        return torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return torch.randn(outputs, inputs).bfloat16()


@pytest.mark.parametrize("dtype", BOTH)
def test_only_the_layout_that_it_knows_is_read(dtype: str):
    weight = weights(dtype, 128, 64)
    packed = pack(weight)
    assert panels.can_read(packed, weight)
    assert not panels.can_read(packed, weight.flip(0)), "other weights, as another layout would look"
    assert not panels.can_read(packed, weights(dtype, 192, 64)), "too few bytes"


@pytest.mark.parametrize(
    ("dtype", "shape"), [("int8", (63, 64)), ("int8", (64, 63)), ("int8", (1024, 200)), ("bf16", (63, 64))]
)
def test_a_layer_that_is_packed_otherwise_is_left_to_the_library(dtype: str, shape: tuple[int, int]):
    weight = weights(dtype, *shape)
    assert not panels.can_read(pack(weight), weight)
    assert not layer(dtype, *shape).alone


def test_a_block_with_such_a_layer_is_too():
    model = random(GPTConfig(1, 2, 18, 101, 64), torch.float32, CPU)
    lay_out(model, "int8")
    assert not isinstance(model.h[0], LaidOutBlock)


def test_a_processor_without_the_instruction_reads_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panels.llvm, "get_host_cpu_features", dict)
    weight = weights("int8", 128, 64)
    assert not panels.can_read(pack(weight), weight)
