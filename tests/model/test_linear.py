"""Linear layers laid out for the processor: the same products, and what 8 bits may cost."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import quantize
from kernels.gelu import gelu_
from model.checkpoint import GPTConfig, random
from model.device import kv_dtype
from model.linear import Int8Linear, PackedLinear, lay_out
from tests.model.paged import PagedRun

CPU = torch.device("cpu")
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=101, block_size=64)
WIDTHS = [(96, 64), (17, 200), (256, 1024)]  # outputs, inputs
TOKENS = [1, 3, 64, 65]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def layer(outputs: int, inputs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def exact(linear: nn.Linear, x: torch.Tensor, gelu: bool) -> torch.Tensor:
    """In float64."""
    y = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    return F.gelu(y, approximate="tanh") if gelu else y


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the size of the whole."""
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
def test_a_packed_layer_is_the_layer_it_was_made_of(shape, tokens, gelu, dtype, tolerance):
    linear = layer(*shape).to(dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    y = PackedLinear(linear, gelu)(x)
    assert y.dtype == dtype
    assert error(y, exact(linear, x, gelu)) < tolerance


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("gelu", "bias"), [(False, True), (True, True), (False, False)])
def test_eight_bits_cost_about_a_hundredth(shape, tokens, gelu, bias):
    linear = layer(*shape, bias=bias)
    x = 3 * torch.randn(tokens, shape[1]) + 0.5
    y = Int8Linear(linear, gelu)(x)
    assert y.dtype == torch.float32
    assert error(y, exact(linear, x, gelu)) < 0.02


def test_in_eight_bits_a_token_gets_bit_for_bit_the_same_alone_and_in_any_batch():
    linear = Int8Linear(layer(256, 1024), gelu=True)
    x = torch.randn(64, 1024) * torch.logspace(-3, 3, 64)[:, None]
    together = linear(x)
    for i in range(64):
        assert torch.equal(linear(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("row", [torch.zeros(64), torch.full((64,), 2.5), torch.full((64,), -1e-3), torch.full((64,), 1e-38)])
def test_rows_without_any_spread_are_exact_to_a_level(row: torch.Tensor):
    linear = layer(96, 64)
    wanted = exact(linear, row[None], gelu=False)
    assert (Int8Linear(linear)(row[None]) - wanted).abs().max() < 0.02 * max(1.0, row.abs().max())


def test_a_channel_of_zeros_gives_its_bias():
    linear = layer(96, 64)
    linear.weight[5] = 0
    assert torch.allclose(Int8Linear(linear)(torch.randn(3, 64))[:, 5], linear.bias[5])


@pytest.mark.parametrize("most", [255, 127])
def test_levels_are_within_half_a_step_of_what_they_stand_for(most: int, monkeypatch: pytest.MonkeyPatch):
    """127: processors that would overflow 16 bits with more."""
    monkeypatch.setattr(quantize, "LEVELS", most)
    x = torch.randn(5, 333) * torch.tensor([1.0, 1e-4, 1e4, 7.0, 7.0])[:, None]
    x[3], x[4] = x[3].abs(), -x[4].abs()
    levels, scales, zeros = quantize.quantize(x)
    assert levels.max() <= most
    assert levels.amax(1).min() == most, "the whole range is used"
    back = (levels.float() - zeros[:, None]) * scales[:, None]
    assert ((back - x).abs() <= 0.51 * scales[:, None] + 1e-6 * x.abs()).all()


def test_zero_is_a_level_of_its_own():
    x = torch.randn(1, 100)
    x[0, 40] = 0
    levels, _, zeros = quantize.quantize(x)
    assert levels[0, 40] == zeros[0]


def test_activations_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"float32, not torch\.bfloat16"):
        quantize.quantize(torch.ones(1, 8, dtype=torch.bfloat16))


def test_gelu_is_torchs():
    x = torch.cat([torch.linspace(-12, 12, 999), torch.tensor([-1e30, 1e30, 0.0])])[None]
    wanted = F.gelu(x.double(), approximate="tanh")
    assert (gelu_(x.clone()) - wanted).abs().max() < 1e-6
    rounded = x.bfloat16()
    wanted = F.gelu(rounded.double(), approximate="tanh")
    assert ((gelu_(rounded.clone()) - wanted).abs() <= wanted.abs() / 250 + 1e-6).all()
    one, none = torch.ones(1), torch.zeros(1002)
    assert torch.equal(quantize.scale_(x.clone(), one, none[:1], none, none, gelu=True), gelu_(x.clone()))


# A whole model.


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_linear_layer_of_a_model_is_laid_out_and_gelu_is_part_of_one(dtype: str):
    model = random(CONFIG, torch.bfloat16 if dtype == "bf16" else torch.float32, CPU)
    lay_out(model, dtype)
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds
    assert nn.GELU not in kinds
    assert kinds.count(Int8Linear if dtype == "int8" else PackedLinear) == 4 * CONFIG.n_layer + 1
    assert model.wte.weight.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)


def test_what_no_kernel_is_for_stays_as_it_is():
    model = random(CONFIG, torch.float16, CPU)
    lay_out(model, "fp16")
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 4 * CONFIG.n_layer + 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.1)])
@pytest.mark.parametrize("shape", ["small", "medium"])
def test_the_logits_are_those_of_transformers_to_within_what_the_dtype_costs(dtype, tolerance, shape, request, load_twin):
    """Root mean square, relative to the spread of the logits: the weights are random and their attention peaked."""
    oracle, folder = request.getfixturevalue(shape)
    model = load_twin(folder, torch.bfloat16 if dtype == "bf16" else torch.float32)
    lay_out(model, dtype)
    tokens = torch.randint(model.config.vocab_size, (22,)).tolist()
    with torch.inference_mode():
        wanted = oracle(torch.tensor([tokens])).logits[0]
    chunked = PagedRun(model, 1, dtype=kv_dtype(dtype, CPU))
    got = torch.cat([chunked.step([(0, tokens[i : i + 9])])[0] for i in range(0, 22, 9)])
    assert (got - wanted).pow(2).mean().sqrt() < tolerance * wanted.std()
