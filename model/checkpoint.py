"""Weights: GPT-2 checkpoints in Hugging Face's safetensors layout (a folder, or the hub and its cache), or seeded random ones.

Every fault of a checkpoint is one `CheckpointError` with one line that says which file or tensor and what is wrong.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model.gpt import GPT, GPTConfig

CONFIGS = {
    "distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
HUB = {name: f"openai-community/{name}" for name in CONFIGS} | {"distilgpt2": "distilbert/distilgpt2"}
DEMO = Path(__file__).parent / "demo"
CONNECT_TIMEOUT_S = 3
WEIGHTS_FILE = "model.safetensors"
FILES = ("vocab.json", "config.json", WEIGHTS_FILE)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) there; nn.Linear holds (out, in)


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or of another shape; the message is one line."""


def config_of(name: str, folder: Path | None) -> GPTConfig:
    """The shape of model `name`, which a config.json in `folder` overrides."""
    path = (folder / "config.json") if folder else None
    if path is None or not path.is_file():
        if name in CONFIGS:
            return CONFIGS[name]
        raise CheckpointError(f"{path}: not found")
    try:
        given = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(given, dict) or given.get("model_type") != "gpt2":
        raise CheckpointError(f"{path}: not the configuration of a GPT-2 (model_type is not gpt2)")
    if given.get("activation_function", "gelu_new") != "gelu_new":
        raise CheckpointError(f"{path}: activation_function is {given['activation_function']!r}, GPT-2's is gelu_new")
    names = {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
    }
    sizes = {field: given[key] for key, field in names.items() if key in given}
    for field, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"{path}: {field} must be a whole number of at least 1, not {size!r}")
    epsilon = given.get("layer_norm_epsilon", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{path}: layer_norm_epsilon must be a number between 0 and 1, not {epsilon!r}")
    config = replace(GPTConfig(), **sizes, layer_norm_epsilon=float(epsilon))
    if config.n_embd % config.n_head:
        raise CheckpointError(f"{path}: n_embd {config.n_embd} cannot be split over n_head {config.n_head} heads")
    return config


def fetch(name: str) -> Path:
    """The folder of `name` in the hub's cache, downloaded (with a progress bar) where it is not there yet."""
    if name == "demo":
        return DEMO
    from huggingface_hub import constants, get_session, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            paths = [hf_hub_download(HUB[name], file, local_files_only=True) for file in FILES]
        except LocalEntryNotFoundError:
            # Its client tries a hub that does not answer again and again; one short call of our own knows sooner.
            get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
            paths = [hf_hub_download(HUB[name], file) for file in FILES]
    except Exception as error:  # the hub's client has many: no network, no such file, no disk, a proxy's answer
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise CheckpointError(f"{HUB[name]} can neither be found in the hub's cache nor downloaded: {reason}") from error
    return Path(paths[0]).parent


def load(folder: Path, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """The model with the weights of `folder`/model.safetensors. Raises CheckpointError."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
    model = _empty(config)
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            prefix = "transformer." if "transformer.wte.weight" in stored else ""
            if f"{prefix}h.{config.n_layer}.ln_1.weight" in stored:
                raise CheckpointError(f"{path}: holds more layers than the {config.n_layer} of the configuration")
            for name, parameter in model.named_parameters():
                if prefix + name not in stored:
                    raise CheckpointError(f"{path}: tensor {prefix + name} is missing")
                tensor = file.get_tensor(prefix + name)
                tensor = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
                if tensor.shape != parameter.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(parameter.shape)}"
                    raise CheckpointError(f"{path}: tensor {prefix + name} has shape {shapes}")
                state[name] = tensor.to(device, dtype).contiguous()
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error
    return _filled(model, state)


def random(config: GPTConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> GPT:
    """Seeded random weights with GPT-2's initial spread: for measuring speed, not for reading the text."""
    generator = torch.Generator().manual_seed(seed)
    model = _empty(config)
    state = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator)
        state[name] = (values + 1 if "ln_" in name and name.endswith("weight") else values).to(device, dtype)
    return _filled(model, state)


def _empty(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def _filled(model: GPT, state: dict[str, torch.Tensor]) -> GPT:
    model.load_state_dict(state | {"lm_head.weight": state["wte.weight"]}, assign=True)
    return model.requires_grad_(False).eval()
