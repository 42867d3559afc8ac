"""What a checkpoint says of itself: Hugging Face's config.json and generation_config.json, or the `model_args` of nanoGPT.

Every key of config.json is known here: as part of the model, as one that changes nothing in it, or as one that is supported at
one value only. Any other is refused, since a key that is skipped may be the one that changes the mathematics.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.gpt import GPTConfig


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or not supported; the message is one line."""


CONFIG_FILE = "config.json"
SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
}
SWITCHES = {
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings": "tied",
}
# Hugging Face's names by ours: GPT-2's own is the tanh approximation.
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
READ = {*SIZES, *SWITCHES, "model_type", "activation_function", "layer_norm_epsilon", "architectures"}  # below
# How it was trained, called or saved, and how transformers would sample from it: nothing of the forward pass.
# `reorder_and_upcast_attn` is another order of the same arithmetic; attention here adds up in float32 in any case.
# fmt: off
HARMLESS = {
    "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "use_cache", "n_ctx", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "return_dict", "output_hidden_states", "output_attentions", "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range",
    "gradient_checkpointing", "reorder_and_upcast_attn", "chunk_size_feed_forward", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "finetuning_task", "task_specific_params",
    "problem_type", "id2label", "label2id", "num_labels", "_num_labels", "custom_pipelines", "tokenizer_class", "prefix",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "is_decoder", "tie_encoder_decoder", "predict_special_tokens", "n_special",
}
# fmt: on
# Supported where they are empty or false.
UNSUPPORTED = {
    "add_cross_attention": "a decoder beside an encoder is not served",
    "cross_attention_hidden_size": "a decoder beside an encoder is not served",
    "is_encoder_decoder": "a decoder beside an encoder is not served",
    "pruned_heads": "save the model with its heads, or with n_head as it is",
    "quantization_config": "save the weights in float16 or float32; --dtype int8 rounds them here",
}
NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError."""
    try:
        given = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return given


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")[:300]


def read_config(path: Path) -> GPTConfig:
    """The model that a config.json describes. Raises CheckpointError."""
    given = read_json(path)
    if given.get("model_type") != "gpt2":
        found = shown(given["model_type"]) if "model_type" in given else "missing"
        raise CheckpointError(f"{path}: not the configuration of a GPT-2 (model_type is {found}, not 'gpt2')")
    for architecture in given.get("architectures") or ():
        if str(architecture).startswith("GPT2For"):
            raise CheckpointError(
                f"{path}: architectures has {shown(architecture)}, which is no language model: it has no texts"
            )
    for key, advice in UNSUPPORTED.items():
        if given.get(key):
            raise CheckpointError(f"{path}: {key} is {shown(given[key])}: {advice}")
    for key in given:
        if key not in READ and key not in HARMLESS and key not in UNSUPPORTED:
            told = "is not understood: take it out if the model computes the same without it"
            raise CheckpointError(f"{path}: {shown(key)[1:-1]} ({shown(given[key])}) {told}")
    activation = given.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: activation_function is {shown(activation)}; supported are {', '.join(ACTIVATIONS)}")
    for key in SWITCHES:
        if not isinstance(given.get(key, True), bool):
            raise CheckpointError(f"{path}: {key} must be true or false, not {shown(given[key])}")
    switches = {field: given[key] for key, field in SWITCHES.items() if key in given}
    epsilon = given.get("layer_norm_epsilon", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{path}: layer_norm_epsilon must be a number between 0 and 1, not {shown(epsilon)}")
    sizes = {key: given[key] for key in SIZES if key in given}
    if sizes.get("n_inner", 1) is None:
        del sizes["n_inner"]
    shape = _sized(path, sizes)
    return replace(shape, **switches, activation=ACTIVATIONS[activation], layer_norm_epsilon=float(epsilon))


def read_nanogpt(path: Path, given: Mapping[str, Any]) -> GPTConfig:
    """The model that the `model_args` in nanoGPT's ckpt.pt describe: its GELU is the exact one. Raises CheckpointError."""
    for key in given:
        if key not in NANOGPT_ARGS:
            raise CheckpointError(f"{path}: model_args has {shown(key)}, which nanoGPT's model does not: it is not understood")
    sizes = {key: value for key, value in given.items() if key not in ("bias", "dropout")}
    bias = given.get("bias", True)
    if not isinstance(bias, bool):
        raise CheckpointError(f"{path}: bias must be true or false, not {shown(bias)}")
    return replace(_sized(path, sizes), activation="gelu", bias=bias)


def _sized(path: Path, sizes: Mapping[str, Any]) -> GPTConfig:
    """What is left out is as in GPT2Config: the smallest GPT-2."""
    for key, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"{path}: {key} must be a whole number of at least 1, not {shown(size)}")
    fields = {SIZES.get(key, key): size for key, size in sizes.items()}
    config = replace(GPTConfig(n_layer=12, n_head=12, n_embd=768), **fields)
    if config.n_embd % config.n_head:
        raise CheckpointError(f"{path}: n_embd {config.n_embd} cannot be split over n_head {config.n_head} heads")
    return config


def special_ids(folder: Path) -> tuple[tuple[int, ...], int | None]:
    """The tokens that end a text, and the one that begins it, as the checkpoint has them: generation_config.json before
    config.json, as transformers reads them. () and None where neither says. Raises CheckpointError."""
    ends: tuple[int, ...] = ()
    begin = None
    for name in (CONFIG_FILE, "generation_config.json"):
        if not (folder / name).is_file():
            continue
        given = read_json(folder / name)
        end = given.get("eos_token_id")
        several = end if isinstance(end, list) else [] if end is None else [end]
        first = given.get("bos_token_id")
        known = [("eos_token_id", token) for token in several] + [("bos_token_id", first)] * (first is not None)
        for key, token in known:
            if isinstance(token, bool) or not isinstance(token, int):
                raise CheckpointError(f"{folder / name}: {key} must be a token id, not {shown(token)}")
        ends = tuple(several) or ends
        begin = begin if first is None else first
    return ends, begin


def shown(value: Any) -> str:
    """A value from a file, as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
