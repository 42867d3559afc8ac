"""The files in which people have weights: shards, pickles of torch, nanoGPT's checkpoints. Each gives the same model, and what
is not right with one is a CheckpointError of one line."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model.checkpoint import DEMO, config_of, load
from model.checkpoint_config import CheckpointError
from model.engine import load_model
from model.gpt import GPT
from tests.model.paged import PagedRun
from tests.model.test_gpt_against_transformers import TOLERANCE, prompts

CPU = torch.device("cpu")


@pytest.fixture
def tensors(small) -> dict[str, torch.Tensor]:
    return load_file(small[1] / "model.safetensors")


@pytest.fixture
def folder(small, tmp_path: Path) -> Path:
    """With the configuration alone."""
    shutil.copy(small[1] / "config.json", tmp_path)
    return tmp_path


def load_from(folder: Path) -> GPT:
    return load(folder, config_of("twin", folder), torch.float32, CPU)


def fault(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_from(folder)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 800
    return message


def same(one: GPT, other: GPT) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def shards(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> tuple[Path, dict]:
    """Two, and their index, which is returned to be spoiled."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    places = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    path = folder / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps(index))
    return path, index


# Whole ones.


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_the_model(small, folder: Path, tensors, kind: str):
    shards(folder, tensors, kind)
    assert same(load_from(folder), load_from(small[1]))


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin_is_the_model_with_torchs_present_format_and_its_first(small, folder: Path, tensors, zipped: bool):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(load_from(folder), load_from(small[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_numbers_will_do(folder: Path, tensors, dtype: torch.dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    model = load_from(folder)
    assert model.wte.weight.dtype == torch.float32
    assert torch.equal(model.wte.weight, tensors["transformer.wte.weight"].to(dtype).float())


def test_safetensors_come_before_pickles_and_one_file_before_shards(small, folder: Path, tensors):
    shards(folder, tensors, "bin")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 whatever")
    (folder / "ckpt.pt").write_bytes(b"\x80\x04 whatever")
    shutil.copy(small[1] / "model.safetensors", folder)
    assert same(load_from(folder), load_from(small[1]))


def test_the_model_does_not_change_with_its_file(folder: Path, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")
    model = load_from(folder)
    before = model.wte.weight.clone()
    path = folder / "pytorch_model.bin"
    path.write_bytes(b"\x7f" * path.stat().st_size)  # in place, where it was mapped
    assert torch.equal(model.wte.weight, before)


def test_the_heads_of_other_tasks_and_masks_are_passed_over(small, folder: Path, tensors):
    tensors["score.weight"] = tensors["v_head.summary.weight"] = torch.ones(2, 2)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert same(load_from(folder), load_from(small[1]))


def test_the_demo_model_retrained_is_served_from_its_folder(tmp_path: Path):
    folder = tmp_path / "retrained"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py"))
    loaded = load_model("demo", str(folder), "fp32", "cpu", fall_back=False)
    assert (loaded.name, loaded.weights, loaded.tokenizer.name, loaded.note) == ("demo", str(folder), "retrained", None)


# nanoGPT. Its model, as far as texts go, in a few lines of its own: GELU is the exact one, and there may be no biases.


class NanoGPT(nn.Module):
    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, bias: bool, vocab_size: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        block = lambda: nn.ModuleDict(  # noqa: E731
            {
                "ln_1": nn.LayerNorm(n_embd, bias=bias),
                "attn": nn.ModuleDict(
                    {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias=bias), "c_proj": nn.Linear(n_embd, n_embd, bias=bias)}
                ),
                "ln_2": nn.LayerNorm(n_embd, bias=bias),
                "mlp": nn.ModuleDict(
                    {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias=bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias=bias)}
                ),
            }
        )
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList([block() for _ in range(n_layer)]),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: len(tokens)]
        for block in self.transformer.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).view(len(x), 3, self.n_head, -1).permute(1, 2, 0, 3)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(0, 1).reshape(x.shape))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


def nanogpt(vocab_size: int = 211, bias: bool = True) -> tuple[NanoGPT, dict]:
    """A model and the contents of its ckpt.pt."""
    torch.manual_seed(5)
    args = {"n_layer": 3, "n_head": 2, "n_embd": 128, "block_size": 64, "bias": bias, "vocab_size": vocab_size, "dropout": 0.1}
    model = NanoGPT(**args).requires_grad_(False)
    for name, tensor in model.named_parameters():
        tensor.normal_(float("ln_" in name and name.endswith("weight")), 0.1 if tensor.ndim == 1 else 128**-0.5)
    optimizer = torch.optim.AdamW(nn.Linear(3, 3).parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 7}
    return model, state | {"best_val_loss": torch.tensor(3.2), "config": {"dataset": "openwebtext", "compile": True}}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_checkpoint_gives_nanogpts_logits(tmp_path: Path, bias: bool, prefix: str):
    oracle, state = nanogpt(bias=bias)
    state["model"] = {prefix + name: tensor for name, tensor in state["model"].items()}
    state["model"][f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # its mask, without flash attention
    torch.save(state, tmp_path / "ckpt.pt")
    tokens = prompts(211, [22])[0]
    logits = PagedRun(load_from(tmp_path), 1).step([(0, tokens)])[0]
    assert (logits - oracle(torch.tensor(tokens))).abs().max() < TOLERANCE
    assert logits.std() > 0.1


@pytest.mark.usefixtures("gpt2")
def test_nanogpts_50304_embeddings_speak_gpt2s_vocabulary_and_none_beyond_it_is_drawn(tmp_path: Path):
    torch.save(nanogpt(50304)[1], tmp_path / "ckpt.pt")
    loaded = load_model("gpt2", str(tmp_path), "fp32", "cpu", fall_back=False)
    assert (loaded.tokenizer.name, loaded.tokenizer.vocab_size) == ("gpt2", 50257)
    assert loaded.model.config.vocab_size == 50304
    assert loaded.note is not None
    assert loaded.note.endswith("using GPT-2's")


def test_nanogpts_characters_are_refused_with_what_to_do(tmp_path: Path):
    torch.save(nanogpt(65)[1], tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"with 65 tokens it is not GPT-2's: put its tokenizer\.json there"):
        load_model("gpt2", str(tmp_path), "fp32", "cpu", fall_back=False)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {}}))
    with pytest.raises(
        CheckpointError, match=r"meta\.pkl: the vocabulary is nanoGPT's characters, pickled Python, which is never run"
    ):
        load_model("gpt2", str(tmp_path), "fp32", "cpu", fall_back=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model_args"), "there is no model_args and model"),
        (lambda state: state.update(model=[1]), "there is no model_args and model"),
        (lambda state: state["model_args"].update(n_layer=2), "more layers than the 2"),
        (lambda state: state["model_args"].update(n_layer=10**9), "h.999999999.ln_1.weight is missing"),
        (lambda state: state["model_args"].update(n_head="two"), "n_head must be a whole number"),
        (lambda state: state["model_args"].update(n_kv_head=1), "model_args has 'n_kv_head'"),
        (lambda state: state["model_args"].update(bias=None), "bias must be true or false"),
        (lambda state: state["model_args"].update(bias=False), "bias has no place in this model"),
        (lambda state: state["model"].update({"step": 3}), "not a dictionary of tensors"),
        (lambda state: state["model"].pop("transformer.h.2.mlp.c_fc.bias"), "h.2.mlp.c_fc.bias is missing"),
    ],
)
def test_a_checkpoint_that_is_not_nanogpts_is_one_line(tmp_path: Path, change: Callable[[dict], object], said: str):
    state = nanogpt()[1]
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    message = fault(tmp_path)
    assert said in message
    assert str(tmp_path / "ckpt.pt") in message


# Damaged and hostile ones.


def test_a_shard_that_is_missing_is_named(folder: Path, tensors):
    shards(folder, tensors, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: not found, but model.safetensors.index.json names it: fetch all" in fault(folder)


@pytest.mark.parametrize("size", [0, 7, 5000, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_a_shard_is_named(folder: Path, tensors, kind: str, size: int):
    index, _ = shards(folder, tensors, kind)
    path = next(iter(sorted(index.parent.glob(f"*00001*.{kind}"))))
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: damaged or not " in fault(folder)


@pytest.mark.parametrize(
    "elsewhere",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "model.bin",
        "\\..\\x.safetensors/",
        "x\0.safetensors/..",
    ],
)
def test_an_index_names_files_beside_it_only(folder: Path, tensors, elsewhere: str):
    save_file(tensors, folder.parent / "secret.safetensors")
    path, index = shards(folder, tensors, "safetensors")
    index["weight_map"]["transformer.ln_f.bias"] = elsewhere
    path.write_text(json.dumps(index))
    assert "is not the name of a .safetensors file beside it" in fault(folder)


def test_an_index_that_names_a_tensor_which_is_not_there_is_refused(folder: Path, tensors):
    path, index = shards(folder, tensors, "safetensors")
    index["weight_map"]["transformer.h.9.x"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "tensor transformer.h.9.x is missing, which model.safetensors.index.json says is there" in fault(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_none_is_named(folder: Path, text: str):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in fault(folder)


class Malicious:
    def __reduce__(self):
        return Path.write_text, (Path("/tmp/batchlab-was-here"), "x")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_code_in_a_pickle_is_never_run(folder: Path, name: str, zipped: bool):
    if name == "ckpt.pt":
        (folder / "config.json").unlink()
    torch.save({"transformer.wte.weight": Malicious()}, folder / name, _use_new_zipfile_serialization=zipped)
    message = fault(folder)
    assert f"{folder / name}: it would run Python code (" in message
    assert message.endswith("which is never done: where you trust it, load it and save it as model.safetensors")
    assert not Path("/tmp/batchlab-was-here").exists()


def test_a_plain_pickle_is_not_run_either(folder: Path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    assert "pytorch_model.bin: " in fault(folder)
    assert not Path("/tmp/batchlab-was-here").exists()


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_before_it_is_unpacked(folder: Path, tensors):
    buffer = io.BytesIO()
    torch.save({"transformer.wte.weight": torch.zeros(50_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    assert (folder / "pytorch_model.bin").stat().st_size < 1_000_000
    assert "not written by torch.save: " in fault(folder)


def test_a_small_tensor_that_says_it_is_large_is_a_wrong_shape(folder: Path, tensors):
    tensors["transformer.ln_f.bias"] = torch.zeros(1).expand(10**12)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "ln_f.bias has shape (1000000000000,), not (128,)" in fault(folder)


@pytest.mark.parametrize(
    "start", [b"", b"\x80\x02", b"PK\x03\x04", b"<!DOCTYPE html>\n", b"version https://git-lfs\n", b"\0" * 600]
)
def test_a_file_of_something_else_is_named(folder: Path, start: bytes):
    (folder / "pytorch_model.bin").write_bytes(start + b"x" * 3000 * bool(start))
    assert f"{folder / 'pytorch_model.bin'}: " in fault(folder)


@pytest.mark.parametrize("cut", [1, 100, 4000, 100_000])
def test_half_an_archive_is_named(folder: Path, tensors, cut: int):
    torch.save(tensors, folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    assert f"{path}: damaged or not written by torch.save: " in fault(folder)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"state_dict": {}, "epoch": 3}, "found state_dict, epoch"),
        ([torch.ones(3)], "found list"),
        (torch.ones(3), "found Tensor"),
        ({1: 2}, "found 1"),
    ],
)
def test_a_pickle_of_something_else_says_what_was_found(folder: Path, state, said: str):
    torch.save(state, folder / "pytorch_model.bin")
    assert said in fault(folder)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.ones(128, dtype=torch.int8), "int8"), (torch.ones(128).to_sparse(), "sparse_coo")],
)
def test_numbers_of_another_kind_are_named(folder: Path, tensors, tensor: torch.Tensor, kind: str):
    torch.save(tensors | {"transformer.ln_f.bias": tensor}, folder / "pytorch_model.bin")
    assert f"tensor transformer.ln_f.bias is {kind}: save the weights as float32" in fault(folder)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.lora_A.weight", "h.0.crossattention.c_attn.weight", "lm_head.bias", "h.x"])
def test_a_tensor_that_has_a_part_in_the_text_but_no_place_is_refused(folder: Path, tensors, name: str):
    stored = name if name.startswith("lm_head") else "transformer." + name
    save_file(tensors | {stored: torch.ones(3)}, folder / "model.safetensors")
    assert f"tensor {name} has no place in this model: if it is an adapter's, merge it first" in fault(folder)


# None at all.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.safetensors", "merge_and_unload"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("gpt2.Q4_K_M.gguf", "llama.cpp"),
        ("model.ckpt.index", "TensorFlow 1"),
        ("consolidated.safetensors", "name it model.safetensors"),
        ("final.pt", "ckpt.pt"),
        ("weights.bin", "pytorch_model.bin"),
        ("model.onnx", "ONNX"),
    ],
)
def test_weights_in_another_format_are_named_with_what_to_do(folder: Path, name: str, said: str):
    (folder / name).write_bytes(b"x")
    message = fault(folder)
    assert f"{name} was found: " in message
    assert said in message


def test_a_file_is_not_a_folder(small):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a folder: a checkpoint is one"):
        load_model("gpt2", str(small[1] / "model.safetensors"), "fp32", "cpu", fall_back=False)


def test_an_empty_folder_says_what_it_may_have(folder: Path):
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "ckpt.pt"):
        assert name in fault(folder)
