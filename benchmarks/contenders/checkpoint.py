"""A checkpoint of gpt2-medium's shape with seeded random weights, in Hugging Face's layout, for programs that load one from a
folder. Its vocabulary is made up, so that nothing has to be downloaded: the 256 bytes, then strings of ASCII letters.
"""

import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from string import ascii_letters

import numpy as np
from safetensors.numpy import save_file

from benchmarks.workload import VOCAB_SIZE
from model.tokenizer import END_OF_TEXT, byte_of_printable

MEDIUM = (24, 16, 1024)  # layers, heads, width
TINY = (2, 4, 64)  # to try the benchmark itself
CONTEXT = 1024


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which `make` has written if it was not there. It gets its name when it is whole, so that one that is there is."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            make(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)
    return path


def write(folder: Path, shape: tuple[int, int, int], seed: int = 0) -> None:
    """config.json, vocab.json, merges.txt and model.safetensors (float32)."""
    folder.mkdir(parents=True)
    layers, heads, width = shape
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "n_positions": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": VOCAB_SIZE - 1,
        "eos_token_id": VOCAB_SIZE - 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tokens = vocabulary()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges(tokens)) + "\n", "utf-8")
    save_file(_weights(layers, width, seed), folder / "model.safetensors", {"format": "pt"})


def vocabulary() -> list[str]:
    """Tokens by id, as GPT-2's vocab.json writes them (a space is U+0120)."""
    pairs = [a + b for a, b in product("\u0120" + ascii_letters, ascii_letters)]
    triples = (pair + c for pair in pairs if pair[0] != "\u0120" for c in ascii_letters)
    bytes_ = list(byte_of_printable())
    rest = VOCAB_SIZE - len(bytes_) - len(pairs) - 1
    return [*bytes_, *pairs, *(triple for triple, _ in zip(triples, range(rest), strict=False)), END_OF_TEXT]


def merges(tokens: list[str]) -> list[str]:
    """merges.txt's lines: a token of the vocabulary is the one without its last letter, and that letter."""
    return [f"{token[:-1]} {token[-1]}" for token in tokens[:-1] if len(token) > 1]


def _weights(layers: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Normal with GPT-2's spread of 0.02; layer norms around 1. Linear weights are (in, out)."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB_SIZE, width), "wpe.weight": (CONTEXT, width)}
    for i in range(layers):
        for name, size in {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}.items():
            shapes[f"h.{i}.{name}.weight"] = (size[0] * width, size[1] * width)
            shapes[f"h.{i}.{name}.bias"] = (size[1] * width,)
        shapes |= {f"h.{i}.{name}": (width,) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        weights[f"transformer.{name}"] = values + np.float32(1) if "ln_" in name and name.endswith("weight") else values
    return weights
