"""The linear layers as a processor likes them: their weights laid out once, when the model is loaded, for its matrix product.

`lay_out` replaces every nn.Linear of a model. In float32 and bfloat16 the values stay what they are. In int8 the weights are
rounded to 8 bits, one scale an output channel, and each token's activations to 8 bits too, with a scale and a zero point of
its own (dynamic per-token quantization: Yao et al. 2022, ZeroQuant, section 4.1). Products of integers are summed exactly, so a
token's result does not depend on its neighbours in the batch. The products are oneDNN's, as torch's own compiler calls them.
"""

from typing import Any

import torch
import torch.nn as nn

from kernels import one_token, quantize
from model.gpt import GPT, MLP

USUAL_TOKENS = 64  # a layout is chosen for so many in a step, and serves any number


def lay_out(model: GPT, dtype: str) -> None:
    """Replace the linear layers of `model`, which is on a CPU: `dtype` is fp32, bf16 or int8; others stay as they are. GELU
    becomes a part of the layer before it. The token embeddings of an int8 model are kept in bfloat16."""
    if dtype != "int8" and not _can_pack(model.wte.weight.dtype):
        return
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                gelu = isinstance(module, MLP) and name == "c_fc"
                setattr(module, name, Int8Linear(layer, gelu) if dtype == "int8" else PackedLinear(layer, gelu))
            elif isinstance(layer, nn.GELU):
                setattr(module, name, nn.Identity())
    if dtype == "int8":
        model.wte.to(torch.bfloat16)  # half the memory; added to the float32 positions it becomes float32


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the blocked layout that oneDNN would otherwise make anew for every product."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), USUAL_TOKENS)
        self.bias = layer.bias
        self.after: tuple[str, list, str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)
        return product


class Int8Linear(nn.Module):
    """nn.Linear over float32 activations, computed in 8 bits: y = (q @ w - zero * sum(w)) * scale + bias, token by token."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        weight = layer.weight.detach().float()  # (out, in)
        self.scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        rounded = (weight / self.scales[:, None]).round().to(torch.int8)
        self.zeros = torch.zeros(len(rounded), dtype=torch.int64)
        self.sums = rounded.sum(1) * self.scales
        self.bias = torch.zeros(len(rounded)) if layer.bias is None else layer.bias.detach().float()
        self.weight: Any = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.gelu = gelu
        self.outputs = len(rounded)
        self.alone = one_token.can_read(self.weight, rounded)
        # Looked up once: a step has a hundred such layers, and for one token each microsecond shows.
        self.addresses = [torch.ops.mkldnn.data_ptr(self.weight)] if self.alone else []
        self.addresses += [tensor.data_ptr() for tensor in (self.scales, self.sums, self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.alone and x.shape[0] == 1:
            return one_token.linear(x, self.addresses, self.outputs, self.gelu)
        levels, scales, zeros = quantize.quantize(x)
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return quantize.scale_(product, scales, zeros, self.sums, self.bias, self.gelu)
