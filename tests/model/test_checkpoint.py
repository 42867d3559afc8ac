"""Checkpoints as they come, whole and damaged: every fault is one CheckpointError of one line that names what is wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import DEMO, CheckpointError, GPTConfig, config_of, load, random
from model.engine import load_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(small, tmp_path: Path) -> Path:
    """A checkpoint that transformers saved, to be damaged."""
    return Path(shutil.copytree(small[1], tmp_path / "checkpoint"))


def load_from(folder: Path, name: str = "twin"):
    return load(folder, config_of(name, folder), torch.float32, CPU)


def fault(folder: Path, name: str = "twin") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_from(folder, name)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Whole ones.


def test_the_prefix_that_transformers_writes_is_accepted_and_so_is_its_absence(folder: Path):
    assert "transformer.wte.weight" in load_file(folder / "model.safetensors")
    prefixed = load_from(folder).state_dict()
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the causal mask that OpenAI's checkpoints carry along
    save_file(tensors, folder / "model.safetensors")
    plain = load_from(folder).state_dict()
    assert prefixed.keys() == plain.keys()
    assert all(torch.equal(prefixed[name], plain[name]) for name in plain)


def test_the_shape_comes_from_config_json_before_the_models_name(folder: Path):
    assert config_of("gpt2", folder) == GPTConfig(n_layer=3, n_head=2, n_embd=128, vocab_size=211, block_size=64)
    assert config_of("gpt2", None) == GPTConfig(n_layer=12, n_head=12, n_embd=768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_16_bits_are_loaded_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype):
    rewrite(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    model = load(folder, config_of("twin", folder), dtype, CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())


# Damaged ones.


def test_a_missing_folder_is_named(tmp_path: Path):
    assert str(tmp_path / "nowhere") in fault(tmp_path / "nowhere")
    assert "model.safetensors" in fault(tmp_path / "nowhere", "gpt2")


def test_a_missing_weights_file_is_named(folder: Path):
    (folder / "model.safetensors").unlink()
    assert f"{folder}: has no weights: none of model.safetensors, " in fault(folder)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, size: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in fault(folder)


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, b"PK\x03\x04", b"<!DOCTYPE html>\n", b"version https://git-lfs\n"])
def test_a_file_of_something_else_is_named(folder: Path, start: bytes):
    path = folder / "model.safetensors"
    path.write_bytes(start + os.urandom(5000))
    assert str(path) in fault(folder)


def test_a_missing_tensor_is_named(folder: Path):
    rewrite(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    message = fault(folder)
    assert "h.1.mlp.c_fc.bias" in message
    assert "missing" in message


def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(folder: Path):
    rewrite(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(127)}))
    message = fault(folder)
    assert "ln_f.weight" in message
    assert "(127,), not (128,)" in message


def test_a_tensor_of_three_dimensions_is_a_wrong_shape(folder: Path):
    rewrite(
        folder, lambda tensors: tensors.update({name: t[None] for name, t in tensors.items() if "0.attn.c_attn.weight" in name})
    )
    assert "c_attn.weight has shape" in fault(folder)


def test_a_file_with_more_layers_than_its_configuration_is_not_cut_short(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": config["n_layer"] - 1}))
    assert "more layers" in fault(folder)


@pytest.mark.parametrize("epsilon", [None, "x", -1, float("nan"), True])
def test_an_epsilon_that_is_no_small_number_is_named(folder: Path, epsilon):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": epsilon}))
    assert "layer_norm_epsilon" in fault(folder)


def test_weights_of_another_layout_are_a_wrong_shape(folder: Path):
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.0.mlp.c_fc.weight"
        tensors[name] = tensors[name].t().contiguous()

    rewrite(folder, transpose)
    assert "h.0.mlp.c_fc.weight" in fault(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not\nJSON", "[]", "null", "3", '"gpt2"', "{}", '{"model_type": "llama", "n_layer": 2}', "\xff"],
)
def test_a_config_json_that_is_not_gpt2s_is_named(folder: Path, text: str):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "config.json") in fault(folder)


@pytest.mark.parametrize(
    "change", [{"n_layer": "many"}, {"n_layer": None}, {"n_head": 3}, {"n_head": 0}, {"n_embd": -1}], ids=str
)
def test_a_config_json_with_an_impossible_shape_is_named(folder: Path, change: dict):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert str(folder / "config.json") in fault(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "b"}', '{"\\u0001": 0}'])
def test_a_damaged_vocab_json_is_named(folder: Path, text: str):
    (folder / "vocab.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        load_model("gpt2", str(folder), "fp32", "cpu", fall_back=False)


def test_a_folder_for_the_demo_model_without_its_vocabulary_is_a_checkpoint_error(tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"brings no vocabulary .*, and with 2560 tokens it is not GPT-2's"):
        load_model("demo", str(tmp_path), "fp32", "cpu", fall_back=False)


# The hub, offline; its client reads the environment when it is imported, hence the processes.


def offline(cache: Path, code: str, hub: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    env |= {"HF_ENDPOINT": hub} if hub else {"HF_HUB_OFFLINE": "1"}
    lines = ["from model.checkpoint import CheckpointError, fetch", "try:", f"    {code}"]
    lines += ["except CheckpointError as error:", "    print('E', error)"]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=env, cwd=cache, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.json"])
def test_what_is_in_the_hubs_cache_is_found_offline(folder: Path, tmp_path: Path, vocabulary: str):
    revision = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    repository = tmp_path / "hub" / "models--openai-community--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = Path(shutil.copytree(folder, repository / "snapshots" / revision))
    (snapshot / vocabulary).write_text("{}")
    run = offline(tmp_path / "hub", "print(fetch('gpt2'))")
    assert run.stdout.strip() == str(snapshot), run.stderr


def test_what_is_not_in_the_hubs_cache_is_a_checkpoint_error_offline(tmp_path: Path):
    run = offline(tmp_path, "fetch('gpt2')")
    lines = run.stdout.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("E openai-community/gpt2 can neither be found in the hub's cache nor downloaded: ")


def test_a_hub_that_never_answers_does_not_hold_up_the_start(tmp_path: Path):
    """Left to itself the hub's client goes on trying for minutes: the process would run into its time-out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run = offline(tmp_path, "fetch('gpt2')", hub=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert run.stdout.startswith("E openai-community/gpt2 can neither be found"), run.stderr


# Seeded random weights.


def test_random_weights_are_the_same_each_time_and_differ_by_seed():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=16)
    first, again = (random(config, torch.float32, CPU, seed=3).state_dict() for _ in range(2))
    other = random(config, torch.float32, CPU, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
