"""Layer normalization against float64."""

import pytest
import torch

from kernels.layer_norm import layer_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1 / 400)])
@pytest.mark.parametrize("width", [2, 7, 64, 1600])
@pytest.mark.parametrize("tokens", [1, 5])
def test_layer_norm_is_that_of_float64(dtype: torch.dtype, tolerance: float, width: int, tokens: int):
    torch.manual_seed(5)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    x = (1 + 3 * torch.randn(width, tokens)).to(dtype).T  # strided
    y = layer_norm(x, weight, bias, 1e-5)
    wanted = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    assert y.dtype == dtype
    assert (y - wanted).norm() <= tolerance * wanted.norm()


def test_a_token_gets_the_same_bits_alone():
    x, weight, bias = torch.randn(9, 200), torch.randn(200), torch.randn(200)
    together = layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(torch.cat([layer_norm(row[None], weight, bias, 1e-5) for row in x]), together)


def test_a_row_without_variance_is_the_bias():
    bias = torch.randn(64)
    assert torch.equal(layer_norm(torch.full((1, 64), 3.0), torch.ones(64), bias, 1e-5)[0], bias)
