"""The keys of config.json against transformers: those that change the mathematics are computed as it does, in every dtype and
on every path, and none is skipped without a word."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from kernels.panels import INT8, llvm
from model.checkpoint import load
from model.checkpoint_config import ACTIVATIONS, HARMLESS, READ, UNSUPPORTED, CheckpointError, read_config, special_ids
from model.device import kv_dtype
from model.gpt import GPTConfig, cut
from model.linear import LaidOutBlock, lay_out
from tests.model.conftest import SMALL, make_oracle
from tests.model.paged import PagedRun
from tests.model.test_gpt_against_transformers import TOLERANCE, expected, mixed_run, prompts, worst

CPU = torch.device("cpu")
CHANGES = {
    "head of its own": {"tie_word_embeddings": False},
    "scores divided by the layer's number": {"scale_attn_by_inverse_layer_idx": True},
    "scores not divided": {"scale_attn_weights": False},
    "scores divided by the layer's number alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "exact GELU": {"activation_function": "gelu"},
    "ReLU": {"activation_function": "relu"},
    "SiLU": {"activation_function": "silu"},
}
SAME = {
    "wider MLP": {"n_inner": 640},
    "MLP of a width that no kernel is for": {"n_inner": 90},
    "GELU by its other name": {"activation_function": "gelu_pytorch_tanh"},
    "GELU by its third name": {"activation_function": "gelu_fast"},
    "scores in another order": {"reorder_and_upcast_attn": True},
    "all at once": {"n_inner": 200, **{key: value for change in CHANGES.values() for key, value in change.items()}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """By the name of a case: transformers' model, and the folder in which it is saved. Made once."""
    made: dict[str, tuple] = {}

    def make(case: str):
        if case not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[case] = make_oracle(SMALL | (CHANGES | SAME)[case], folder), folder
        return made[case]

    return make


def twin(folder: Path, dtype: torch.dtype = torch.float32):
    return load(folder, read_config(folder / "config.json"), dtype, CPU)


@pytest.mark.parametrize("case", [*CHANGES, *SAME])
def test_logits_are_those_of_transformers(saved, case: str):
    oracle, folder = saved(case)
    sequences = prompts(SMALL["vocab_size"], [13, 22, 9])
    for tokens, logits in zip(sequences, mixed_run(twin(folder), sequences), strict=True):
        assert worst(logits, oracle, tokens) < TOLERANCE


@pytest.mark.parametrize("case", CHANGES)
def test_the_comparison_fails_where_the_key_is_ignored(saved, case: str, tmp_path: Path):
    oracle, folder = saved(case)
    ignoring = Path(shutil.copytree(folder, tmp_path / "ignoring"))
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in CHANGES[case]}
    (ignoring / "config.json").write_text(json.dumps(config))
    if case == "head of its own":
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, ignoring / "model.safetensors")
    tokens = prompts(SMALL["vocab_size"], [22])[0]
    error = worst(PagedRun(twin(ignoring), 1).step([(0, tokens)])[0], oracle, tokens)
    assert error > (3 if case == "exact GELU" else 100) * TOLERANCE, "GELU and its approximation are that near"


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.1)])
@pytest.mark.parametrize("case", [*CHANGES, *SAME])
def test_so_they_are_in_the_dtypes_of_a_processor_whether_a_token_comes_alone_or_not(saved, case: str, dtype: str, tolerance):
    """As in test_linear. A step of one token is computed by kernels/one_token.py where the block is laid out for it."""
    oracle, folder = saved(case)
    model = twin(folder, torch.bfloat16 if dtype == "bf16" else torch.float32)
    lay_out(model, dtype)
    if case == "wider MLP" and dtype == "int8" and llvm.get_host_cpu_features().get(INT8.feature):
        assert isinstance(model.h[0], LaidOutBlock)
    tokens = prompts(SMALL["vocab_size"], [22])[0]
    wanted = expected(oracle, tokens)
    for size in (9, 1):
        run = PagedRun(model, 1, dtype=kv_dtype(dtype, CPU))
        got = torch.cat([run.step([(0, tokens[i : i + size])])[0] for i in range(0, 22, size)])
        assert (got - wanted).pow(2).mean().sqrt() < tolerance * wanted.std()


@pytest.mark.parametrize("case", [*CHANGES, *SAME])
def test_in_int8_a_token_gets_the_same_alone_and_beside_others(saved, case: str):
    model = twin(saved(case)[1])
    lay_out(model, "int8")
    one, two = prompts(SMALL["vocab_size"], [6, 6])
    alone, beside = PagedRun(model, 1), PagedRun(model, 2)
    for first, second in zip(one, two, strict=True):
        logits = alone.step([(0, [first])])[0]
        assert torch.equal(logits, beside.step([(0, [first]), (1, [second])])[0])


def test_the_first_layers_of_such_a_model_keep_their_scale_and_its_head(saved):
    """The oracle's own first two layers."""
    oracle, folder = saved("all at once")
    model = cut(twin(folder), 2)
    tokens = prompts(SMALL["vocab_size"], [13])[0]
    whole, oracle.transformer.h = oracle.transformer.h, oracle.transformer.h[:2]
    try:
        assert worst(PagedRun(model, 1).step([(0, tokens)])[0], oracle, tokens) < TOLERANCE
    finally:
        oracle.transformer.h = whole


# Which head.


def edited(folder: Path, tmp_path: Path, **config) -> tuple[Path, dict[str, torch.Tensor]]:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
    return copy, load_file(copy / "model.safetensors")


def test_a_head_that_is_stored_counts_though_the_config_says_it_is_tied(saved, tmp_path: Path):
    """As transformers 5 has it."""
    folder, _ = edited(saved("head of its own")[1], tmp_path, tie_word_embeddings=True)
    model = twin(folder)
    assert not torch.equal(model.lm_head.weight, model.wte.weight)


def test_a_head_that_is_stored_twice_is_kept_once(small, tmp_path: Path):
    folder, tensors = edited(small[1], tmp_path, tie_word_embeddings=False)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    model = twin(folder)
    assert model.lm_head.weight.data_ptr() == model.wte.weight.data_ptr()


def test_a_head_that_is_not_there_though_it_is_not_tied_is_missing(small, tmp_path: Path):
    folder, _ = edited(small[1], tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"^\S+: tensor lm_head\.weight is missing, and tie_word_embeddings is false$"):
        twin(folder)


# Every key.


def read(tmp_path: Path, **keys) -> GPTConfig:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **keys}))
    return read_config(tmp_path / "config.json")


def test_every_key_that_transformers_writes_is_known_at_its_default(tmp_path: Path):
    written = GPT2Config().to_dict()
    assert read(tmp_path, **written) == GPTConfig(n_layer=12, n_head=12, n_embd=768)
    assert written.keys() <= READ | HARMLESS | UNSUPPORTED.keys()


def test_what_is_left_out_is_as_in_GPT2Config(tmp_path: Path):
    assert read(tmp_path) == GPTConfig(n_layer=12, n_head=12, n_embd=768)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope_theta", 10000.0, "10000.0"),
        ("attn_logit_softcapping", 30, "30"),
        ("auto_map", {"AutoModel": "modeling.MyGPT"}, "modeling.MyGPT"),
        ("quantization_config", {"quant_method": "gptq"}, "gptq"),
        ("add_cross_attention", True, "True"),
        ("pruned_heads", {"0": [1]}, "[1]"),
        ("is_encoder_decoder", True, "True"),
        ("architectures", ["GPT2ForSequenceClassification"], "GPT2ForSequenceClassification"),
        ("activation_function", "quick_gelu", "quick_gelu"),
        ("activation_function", None, "None"),
        ("activation_function", ["gelu"], "gelu"),
        ("scale_attn_weights", "yes", "yes"),
        ("scale_attn_by_inverse_layer_idx", 1, "1"),
        ("tie_word_embeddings", None, "None"),
        ("n_inner", 0, "0"),
        ("n_inner", "wide", "wide"),
        ("n_positions", 1.5, "1.5"),
        ("a\nb", "x" * 500, "a\\nb"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line_that_names_it(tmp_path: Path, key: str, value, said: str):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, **{key: value})
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert json.dumps(key)[1:-1] in message
    assert said in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
@pytest.mark.parametrize("value", [None, False, {}])
def test_what_is_not_supported_may_be_there_where_it_is_off(tmp_path: Path, key: str, value):
    assert read(tmp_path, **{key: value}) == read(tmp_path)


def test_each_activation_has_a_layer():
    from model.gpt import ACTIVATIONS as LAYERS

    assert set(ACTIVATIONS.values()) == LAYERS.keys()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": "gpt2", "n_layer": 1e400}', "\ufeff{}"])
def test_strange_json_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        read_config(tmp_path / "config.json")


# What ends a text.


@pytest.mark.parametrize(
    ("config", "generation", "ends", "begin"),
    [
        ({"eos_token_id": 7, "bos_token_id": 3}, None, (7,), 3),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, (8, 9), None),
        ({"eos_token_id": [5]}, {"bos_token_id": 2}, (5,), 2),
        ({"eos_token_id": None}, {"eos_token_id": None}, (), None),
        ({}, {}, (), None),
        (None, None, (), None),
    ],
)
def test_the_ends_of_a_text_are_generation_configs_before_configs(tmp_path: Path, config, generation, ends, begin):
    for name, given in (("config.json", config), ("generation_config.json", generation)):
        if given is not None:
            (tmp_path / name).write_text(json.dumps(given))
    assert special_ids(tmp_path) == (ends, begin)


@pytest.mark.parametrize(
    "given", [{"eos_token_id": "x"}, {"eos_token_id": [1, None]}, {"eos_token_id": 1.5}, {"bos_token_id": []}]
)
def test_an_end_that_is_no_token_is_named(tmp_path: Path, given):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {next(iter(given))} must be a token id, not"):
        special_ids(tmp_path)
