"""transformers' GPT-2 with every tensor random, saved to disk and read back by our loader: the oracle and its twin."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from model.checkpoint import config_of, load
from model.gpt import GPT
from model.tokenizer import Tokenizer, load_gpt2_tokenizer

SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 128, "vocab_size": 211, "n_positions": 64}
MEDIUM = {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 50257, "n_positions": 1024}

transformers_logging.set_verbosity_error()


def make_oracle(shape: dict[str, Any], folder: Path) -> GPT2LMHeadModel:
    """`shape`: of GPT2Config. Biases and LayerNorm gains are random too, and queries and keys large, so that attention is
    peaked."""
    torch.manual_seed(1)
    with torch.device("meta"):
        oracle = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    oracle.to_empty(device="cpu")
    width, scaled = shape["n_embd"], shape.get("scale_attn_weights", True)
    with torch.no_grad():
        for name, tensor in oracle.named_parameters():
            gain = "ln_" in name and name.endswith("weight")
            tensor.normal_(float(gain), 0.02 if "wte" in name or "wpe" in name else 0.1 if tensor.ndim == 1 else width**-0.5)
            if name.endswith("c_attn.weight"):
                # scores spread over several units, whatever they are divided by: attention is peaked
                tensor[:, : 2 * width] *= 2.0 if scaled else 2.0 / (width / shape["n_head"]) ** 0.25
        oracle.tie_weights()
    oracle.eval()
    oracle.save_pretrained(folder)
    return oracle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Path]:
    folder = tmp_path_factory.mktemp("small")
    return make_oracle(SMALL, folder), folder


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Path]:
    folder = tmp_path_factory.mktemp("medium")
    return make_oracle(MEDIUM, folder), folder


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    """GPT-2's vocabulary, where this machine has it."""
    found = load_gpt2_tokenizer() if "TIKTOKEN_CACHE_DIR" in os.environ else None
    if found is None:
        pytest.skip("tiktoken's cache (TIKTOKEN_CACHE_DIR) does not hold GPT-2's vocabulary")
    return found


@pytest.fixture(scope="session")
def load_twin() -> Callable[..., GPT]:
    return lambda folder, dtype=torch.float32: load(folder, config_of("twin", folder), dtype, torch.device("cpu"))
