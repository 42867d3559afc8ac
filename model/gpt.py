"""GPT-2 (Radford et al. 2019) in nanoGPT's shape, for inference over a flattened ragged batch: the tokens of all requests in
one row of T, prefill chunks and decodes mixed, attention per request over a paged KV cache.

Read it top down. It knows nothing of requests, policies or HTTP; `kernels/attention.py` does the attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn

from kernels.attention import paged_attention
from kernels.batch import RaggedBatch
from model.kv_cache import KVCache


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    vocab_size: int = 50257
    block_size: int = 1024  # the context: positions there are
    layer_norm_epsilon: float = 1e-5
    n_inner: int | None = None  # width of the MLP: 4 * n_embd, unless it is given
    activation: str = "gelu_new"  # of ACTIVATIONS
    bias: bool = True  # without, those of a checkpoint are zeros here
    tied: bool = True  # a checkpoint without a head of its own has the token embeddings for it
    scale_attn_weights: bool = True  # attention's scores are divided by sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, from 1 (Mistral: Karamcheti et al. 2021)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def query_factor(self, layer: int) -> float:
        """What queries are multiplied by when they are loaded, since the kernels always divide by sqrt(head size)."""
        factor = 1.0 if self.scale_attn_weights else self.head_size**0.5
        return factor / (layer + 1) if self.scale_attn_by_inverse_layer_idx else factor


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_new": partial(nn.GELU, approximate="tanh"),  # GPT-2's own
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # GPT-2 ties the two; a checkpoint may have two of its own

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, batch: RaggedBatch, sampled: torch.Tensor
    ) -> torch.Tensor:
        """Logits (R, vocab) in float32 of the R tokens whose places are `sampled`; writes the K and V of all T into `cache`.

        tokens, positions: (T,) int64. sampled: (R,) int64, places in the flattened batch.
        """
        return self.logits(self.features(tokens, positions, cache, batch, sampled))

    def features(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, batch: RaggedBatch, sampled: torch.Tensor
    ) -> torch.Tensor:
        """What the last layer makes of the R tokens: (R, C). As `forward` otherwise."""
        x = self.wte(tokens) + self.wpe(positions)  # (T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache.k[layer], cache.v[layer], batch)
        normed: torch.Tensor = self.ln_f(x[sampled])
        return normed

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(R, C) -> (R, vocab), float32."""
        logits: torch.Tensor = self.lm_head(features)
        return logits.float()


def cut(model: GPT, layers: int) -> GPT:
    """The first `layers` of `model`, with its embeddings and last norm: their weights are shared, not copied."""
    shorter = GPT.__new__(GPT)
    nn.Module.__init__(shorter)
    shorter.config = replace(model.config, n_layer=layers)
    shorter.wte, shorter.wpe, shorter.h = model.wte, model.wpe, model.h[:layers]
    shorter.ln_f, shorter.lm_head = model.ln_f, model.lm_head
    return shorter


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without values, which a checkpoint gives. nn.Embedding would draw some, and on the meta device, where models are made,
    torch loads its whole compiler for that: 170 MB, and half of the time of a start."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), k_cache, v_cache, batch)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        T, C = x.shape
        q, k, v = self.c_attn(x).view(T, 3, self.n_head, C // self.n_head).unbind(1)  # each (T, nh, hs)
        y = paged_attention(q, k, v, k_cache, v_cache, batch)  # (T, nh, hs)
        return self.c_proj(y.view(T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x)))
