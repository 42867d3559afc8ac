"""A checkpoint's tensors by name, from the files that people have: safetensors and `pytorch_model.bin`, whole or in shards,
and nanoGPT's `ckpt.pt`. Files are mapped, not read as a whole, and never run: of a pickle torch takes tensors and plain values
only (`weights_only`). What the model makes of the tensors is `checkpoint.py`'s.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint_config import CheckpointError, one_line, read_json, shown

WEIGHTS_FILE = "model.safetensors"
NANOGPT_FILE = "ckpt.pt"
WHOLE = (WEIGHTS_FILE, "pytorch_model.bin")
FILES = (*(name + end for name in WHOLE for end in ("", ".index.json")), NANOGPT_FILE)  # the first that is there is read
# What is not read, and what to do.
OTHERS = {
    "adapter_model.*": "an adapter (PEFT): merge it into its model with merge_and_unload, and save that",
    "tf_model*.h5": "TensorFlow's weights: load them with transformers, and save_pretrained",
    "flax_model*.msgpack": "Flax' weights: load them with transformers, and save_pretrained",
    "*.gguf": "llama.cpp's format: take the safetensors that it was made from",
    "*.onnx": "ONNX: take the safetensors that it was made from",
    "model.ckpt*": "TensorFlow 1's checkpoint: take the safetensors of the Hugging Face hub",
    "*.safetensors": f"name it {WEIGHTS_FILE}, or put the index of its shards beside it",
    "*.pt": f"nanoGPT's is called {NANOGPT_FILE}",
    "*.bin": "weights are called pytorch_model.bin",
}
Get = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Tensors by the names that the file has, prefixes and all."""

    path: Path  # what an error names
    owners: Mapping[str, Get]  # by tensor
    in_out: bool  # matrices of the blocks are stored (in, out), as Hugging Face's Conv1D has them; else as nn.Linear does

    def get(self, name: str) -> torch.Tensor:
        """Raises CheckpointError."""
        try:
            return self.owners[name](name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: {one_line(error)}") from error


def find(folder: Path) -> Path:
    """The file in `folder` that has the weights, or the index of those that have. Raises CheckpointError."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        kind = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {kind}: a checkpoint is one, with {WEIGHTS_FILE} in it")
    for pattern, advice in OTHERS.items():
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(f"{folder}: has none of {', '.join(FILES)}; {path.name} was found: {advice}")
    raise CheckpointError(f"{folder}: has no weights: none of {', '.join(FILES)}")


def open_weights(folder: Path) -> Weights:
    """The tensors of a checkpoint; nothing of them is read yet. Raises CheckpointError."""
    path = find(folder)
    if path.name == NANOGPT_FILE:
        state = _tensors(path, read_nanogpt_file(path)["model"])
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}  # torch.compile's prefix
        return Weights(path, dict.fromkeys(state, state.__getitem__), in_out=False)
    if path.suffix != ".json":
        return Weights(path, _open(path), in_out=True)
    return Weights(path, _open_shards(path), in_out=True)


def read_nanogpt_file(path: Path) -> dict[str, Any]:
    """nanoGPT's ckpt.pt, which has `model_args` and `model`. Raises CheckpointError."""
    given = _load(path)
    if not isinstance(given, dict) or not all(isinstance(given.get(key), dict) for key in ("model_args", "model")):
        raise CheckpointError(f"{path}: not nanoGPT's: there is no model_args and model in it")
    return given


def _open(path: Path) -> dict[str, Get]:
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return dict.fromkeys(file.keys(), file.get_tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file: {one_line(error)}") from error
    state = _tensors(path, _load(path))
    return dict.fromkeys(state, state.__getitem__)


def _open_shards(index: Path) -> dict[str, Get]:
    kind = Path(index.name.removesuffix(".index.json")).suffix
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: there is no weight_map from tensors to files in it")
    shards: dict[str, dict[str, Get]] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or Path(file).suffix != kind:
            raise CheckpointError(f"{index}: {shown(file)} is not the name of a {kind} file beside it")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file}: not found, but {index.name} names it: fetch all shards")
        shards[file] = _open(index.parent / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file}: tensor {name} is missing, which {index.name} says is there")
    return {name: shards[file][name] for name, file in places.items()}


def _tensors(path: Path, state: Any) -> dict[str, torch.Tensor]:
    right = isinstance(state, dict) and all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items())
    if not right:
        held = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: not a dictionary of tensors by name (found {held[:100]}): save model.state_dict()")
    return state


def _load(path: Path) -> Any:
    """What torch.save wrote, as far as it is tensors and plain values. Raises CheckpointError."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as file:  # torch never compresses: who does may blow up what is in it
                packed = [entry.filename for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(f"{path}: not written by torch.save: {shown(packed[0])} in it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            told = f"it would run Python code ({code[1][:100]}), which is never done: where you trust it, load it and save it"
            raise CheckpointError(f"{path}: {told} as {WEIGHTS_FILE}") from error
        raise CheckpointError(f"{path}: damaged or not written by torch.save: {one_line(error)}") from error
