"""The layers of a model as a processor likes them: their weights laid out once, when the model is loaded.

`lay_out` replaces every nn.Linear of a model. In float32 and bfloat16 the values stay what they are. In int8 the weights are
rounded to 8 bits, one scale an output channel, and each token's activations to 8 bits too, with a scale and a zero point of
its own (dynamic per-token quantization: Yao et al. 2022, ZeroQuant, section 4.1). Products of integers are summed exactly, so a
token's result does not depend on its neighbours in the batch. The products are oneDNN's, as torch's own compiler calls them,
but for a step of one token, which `kernels/one_token.py` computes a block at a time.
"""

from typing import Any

import torch
import torch.nn as nn

from kernels import one_token, panels, quantize
from kernels.batch import RaggedBatch
from kernels.gelu import gelu_
from kernels.layer_norm import as_bits, layer_norm
from model.gpt import GPT, MLP, Block

USUAL_TOKENS = 64  # a layout is chosen for so many in a step, and serves any number


def lay_out(model: GPT, dtype: str) -> None:
    """Replace the layers of `model`, which is on a CPU: `dtype` is fp32, bf16 or int8; others stay as they are. GPT-2's GELU
    becomes a part of the layer before it; another activation stays a step of its own. The
    token embeddings of an int8 model are kept in bfloat16."""
    if dtype != "int8" and not _can_pack(model.wte.weight.dtype):
        return
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                gelu = isinstance(module, MLP) and name == "c_fc" and _is_gelu(module.act)
                setattr(module, name, Int8Linear(layer, gelu) if dtype == "int8" else PackedLinear(layer, gelu))
            elif isinstance(layer, nn.LayerNorm):
                setattr(module, name, LayerNorm(layer))
    block: Any
    for i, block in enumerate(model.h):  # after their layers
        if not _is_gelu(block.mlp.act):
            continue
        block.mlp.act = nn.Identity()
        if all(layer.alone for layer in _layers(block)):
            model.h[i] = LaidOutBlock(block)
    if dtype == "int8":
        model.wte.to(torch.bfloat16)  # half the memory; added to the float32 positions it becomes float32


def _is_gelu(activation: nn.Module) -> bool:
    """Whether it is the one that the kernels know."""
    return isinstance(activation, nn.GELU) and activation.approximate == "tanh"


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _layers(block: Any) -> list[Any]:
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


class LaidOutBlock(Block):
    """A block that computes a single token in one kernel."""

    def __init__(self, block: Any) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        tensors = [tensor for norm in (block.ln_1, block.ln_2) for tensor in (norm.weight, norm.bias)]
        self.addresses = [tensor.data_ptr() for tensor in tensors]  # looked up once: in a step each microsecond shows
        self.addresses += [address for layer in _layers(block) for address in layer.addresses]
        self.epsilon = as_bits(block.ln_1.epsilon)
        self.inner = block.mlp.c_fc.outputs

    def forward(self, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        if x.shape[0] == 1 and x.dtype is self.ln_1.weight.dtype:
            return one_token.block(x, k_cache, v_cache, batch, self.addresses, self.inner, self.epsilon)
        return super().forward(x, k_cache, v_cache, batch)


class LayerNorm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the blocked layout that oneDNN would otherwise make anew for every product."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_TOKENS)
        self.bias = layer.bias
        self.gelu = gelu
        self.alone = weight.dtype == torch.bfloat16 and panels.can_read(self.weight, weight)
        self.summand = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.outputs = len(weight)
        self.addresses = [torch.ops.mkldnn.data_ptr(self.weight), 0, 0, self.summand.data_ptr()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.alone and x.shape[0] == 1 and x.dtype is torch.bfloat16:
            return one_token.linear(x, self.addresses, self.outputs, self.gelu)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return gelu_(product) if self.gelu else product


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
        self.alone = panels.can_read(self.weight, rounded)
        self.addresses = [torch.ops.mkldnn.data_ptr(self.weight)] if self.alone else []
        self.addresses += [tensor.data_ptr() for tensor in (self.scales, self.sums, self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.alone and x.shape[0] == 1 and x.dtype is torch.float32:
            return one_token.linear(x, self.addresses, self.outputs, self.gelu)
        levels, scales, zeros = quantize.quantize(x)
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return quantize.scale_(product, scales, zeros, self.sums, self.bias, self.gelu)
