"""A layer for one token: bit for bit what a batch gets, and no other layout is taken for the one it reads."""

import pytest
import torch
import torch.nn as nn

from kernels import one_token
from model.linear import Int8Linear

needs_vnni = pytest.mark.skipif(
    not one_token.llvm.get_host_cpu_features().get("avx512vnni"), reason="this processor has no AVX512-VNNI"
)


def pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def levels(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)


@needs_vnni
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 4), (96, 64), (1024, 192), (256, 4096), (50257, 64)])
@pytest.mark.parametrize(("gelu", "bias"), [(False, True), (True, True), (False, False)])
def test_one_token_gets_bit_for_bit_what_it_gets_in_a_batch(outputs: int, inputs: int, gelu: bool, bias: bool):
    layer = Int8Linear(nn.Linear(inputs, outputs, bias=bias), gelu)
    assert layer.alone
    x = 3 * torch.randn(5, inputs) + 0.5
    together = layer(x)
    for token in range(5):
        assert torch.equal(layer(x[token : token + 1])[0], together[token])


@needs_vnni
def test_a_token_that_is_strided_is_read_as_it_is():
    layer = Int8Linear(nn.Linear(64, 96))
    x = torch.randn(64, 2).T
    assert torch.equal(layer(x[:1])[0], layer(x.contiguous())[0])


@needs_vnni
def test_only_the_layout_that_it_knows_is_read():
    weight = levels(128, 64)
    packed = pack(weight)
    assert one_token.can_read(packed, weight)
    assert not one_token.can_read(packed, weight.flip(0)), "other weights, as another layout would look"
    assert not one_token.can_read(packed, levels(192, 64)), "too few bytes"


@pytest.mark.parametrize("shape", [(63, 64), (64, 63), (1024, 200)])
def test_a_layer_that_is_packed_otherwise_is_left_to_the_library(shape: tuple[int, int]):
    weight = levels(*shape)
    assert not one_token.can_read(pack(weight), weight)
    assert not Int8Linear(nn.Linear(shape[1], shape[0])).alone


@needs_vnni
def test_activations_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"float32, not torch\.bfloat16"):
        Int8Linear(nn.Linear(64, 64))(torch.ones(1, 64, dtype=torch.bfloat16))
