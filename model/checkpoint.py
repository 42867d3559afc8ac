"""Weights: GPT-2 checkpoints from a folder, or from the hub and its cache, or seeded random ones.

Which files hold the tensors is `weight_files.py`'s, what their configuration says `checkpoint_config.py`'s. Every fault of a
checkpoint is one `CheckpointError` with one line that says which file or tensor, what is wrong and what to do.
"""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

import torch

from model.checkpoint_config import CONFIG_FILE, CheckpointError, one_line, read_config, read_nanogpt, shown
from model.gpt import GPT, GPTConfig
from model.weight_files import NANOGPT_FILE, WEIGHTS_FILE, Weights, find, open_weights, read_nanogpt_file

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
FILES = (CONFIG_FILE, WEIGHTS_FILE)
VOCABULARIES = ("tokenizer.json", "vocab.json")  # the first is fetched; the second may be in the cache from earlier days
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) there; nn.Linear holds (out, in)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD = "lm_head.weight"
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # of causal attention, which OpenAI's checkpoints carry along
OURS = ("h.", "wte.", "wpe.", "ln_f.", "lm_head.")  # what stands beside them are other tasks' heads, and has no part in a text


def config_of(name: str, folder: Path | None) -> GPTConfig:
    """The shape of model `name`, which what `folder` says of itself overrides. Raises CheckpointError."""
    if folder and (folder / CONFIG_FILE).is_file():
        return read_config(folder / CONFIG_FILE)
    if folder and (folder / NANOGPT_FILE).is_file() and find(folder).name == NANOGPT_FILE:
        return read_nanogpt(folder / NANOGPT_FILE, read_nanogpt_file(folder / NANOGPT_FILE)["model_args"])
    if name in CONFIGS:
        return CONFIGS[name]
    raise CheckpointError(f"{folder and folder / CONFIG_FILE}: not found")


def fetch(name: str) -> Path:
    """The folder of `name` in the hub's cache, downloaded (with a progress bar) where it is not there yet."""
    if name == "demo":
        return DEMO
    from huggingface_hub import constants, get_session, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(vocabulary: str, cached: bool) -> Path:
        paths = [hf_hub_download(HUB[name], file, local_files_only=cached) for file in (*FILES, vocabulary)]
        return Path(paths[0]).parent

    try:
        for vocabulary in VOCABULARIES:
            with contextlib.suppress(LocalEntryNotFoundError):
                return snapshot(vocabulary, cached=True)
        # Its client tries a hub that does not answer again and again; one short call of our own knows sooner.
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
        return snapshot(VOCABULARIES[0], cached=False)
    except Exception as error:  # the hub's client has many: no network, no such file, no disk, a proxy's answer
        told = f"{HUB[name]} can neither be found in the hub's cache nor downloaded: {one_line(error)}"
        raise CheckpointError(told) from error


def load(folder: Path, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """The model with the weights of `folder`. Raises CheckpointError."""
    weights = open_weights(folder)
    prefix = "transformer." if "transformer.wte.weight" in weights.owners else ""
    names = {name.removeprefix(prefix): name for name in weights.owners}
    last, beyond = (f"h.{layer}.ln_1.weight" for layer in (config.n_layer - 1, config.n_layer))
    if beyond in names:
        raise CheckpointError(f"{weights.path}: holds more layers than the {config.n_layer} of the configuration")
    if last not in names:  # before a model of so many layers is made
        raise CheckpointError(f"{weights.path}: tensor {prefix + last} is missing")
    model = _empty(config)
    parameters = dict(model.named_parameters()) | {HEAD: model.lm_head.weight}
    _check_names(weights.path, names, parameters, bias=config.bias)
    state = {}
    for name, parameter in parameters.items():
        if name in names:
            tensor = _read(weights, names[name], parameter.shape)
            factor = config.query_factor(int(name.split(".")[1])) if "c_attn" in name else 1.0
            if factor != 1:  # attention divides by the root of the head size; any other scale is the queries' from here on
                tensor = torch.cat((tensor[: config.n_embd].float() * factor, tensor[config.n_embd :].float()))
            if name == HEAD and torch.equal(tensor.float(), _read(weights, names["wte.weight"], parameter.shape).float()):
                continue
            state[name] = torch.empty(parameter.shape, dtype=dtype, device=device).copy_(tensor)  # the file may change
        elif name == HEAD:
            if not config.tied:
                raise CheckpointError(f"{weights.path}: tensor {HEAD} is missing, and tie_word_embeddings is false")
        elif name.endswith(".bias") and not config.bias:
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
        else:
            raise CheckpointError(f"{weights.path}: tensor {prefix + name} is missing")
    return _filled(model, state)


def _check_names(path: Path, names: Collection[str], known: Collection[str], *, bias: bool) -> None:
    """Refuses tensors that have a part in the model's texts, but none in this model."""
    for name in names:
        superfluous = name.endswith(".bias") and not bias and not MASKS.fullmatch(name)
        if name.startswith(OURS) and (name not in known or superfluous) and not MASKS.fullmatch(name):
            raise CheckpointError(
                f"{path}: tensor {shown(name)[1:-1]} has no place in this model: if it is an adapter's, merge it first"
            )


def _read(weights: Weights, name: str, shape: torch.Size) -> torch.Tensor:
    """As nn.Linear holds it, still where the file is mapped."""
    tensor = weights.get(name)
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise CheckpointError(f"{weights.path}: tensor {name} is {kind}: save the weights as float32, float16 or bfloat16")
    if weights.in_out and name.endswith(CONV1D) and tensor.dim() == 2:
        tensor = tensor.t()
    if tensor.shape != shape:
        raise CheckpointError(f"{weights.path}: tensor {name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


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
    model.load_state_dict({HEAD: state["wte.weight"]} | state, assign=True)
    return model.requires_grad_(False).eval()
