"""From settings to an engine that computes: find the weights, the vocabulary, the memory; say plainly where it fell back."""

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batching.blocks import blocks_for
from batching.policy import Limits
from batching.step import Executor
from kernels.attention import has_triton
from kernels.batch import HEAD_SIZES
from model import checkpoint
from model.checkpoint_config import CheckpointError, special_ids
from model.cuda_graphs import CudaCapture
from model.device import free_memory, kv_dtype, pick_device, pick_dtype, weight_dtype
from model.executor import GPTExecutor
from model.gpt import GPT, cut
from model.kv_cache import KVCache
from model.linear import lay_out
from model.tokenizer import NoVocabulary, Tokenizer, VocabularyError, load_gpt2_tokenizer, load_tokenizer
from model.variants import VariantExecutor
from model.weight_files import find

BLOCK_SIZE = 16
CPU_KV_BYTES = 4 << 30
GPT2_EMBEDDINGS = (50257, 50304)  # GPT-2's own, and nanoGPT's, which pads them to a multiple of 64


@dataclass(frozen=True)
class Loaded:
    """A model with the vocabulary it speaks, under the names that /stats shows. `note`: what was not as asked for, and why."""

    model: GPT
    tokenizer: Tokenizer
    name: str
    weights: str
    dtype: str
    device: torch.device
    note: str | None = None


def load_model(name: str, weights: str, dtype: str, device: str, *, fall_back: bool) -> Loaded:
    """`weights`: pretrained, random, or a folder. With `fall_back` the demo model is served where they cannot be had.

    Raises CheckpointError, or ValueError for a device that is not there.
    """
    on = pick_device(device)
    kind = pick_dtype(dtype, on)
    if weights == "random":
        config = checkpoint.config_of(name, checkpoint.DEMO if name == "demo" else None)
        tokenizer = (None if name == "demo" else load_gpt2_tokenizer()) or load_tokenizer(checkpoint.DEMO)
        note = None if tokenizer.vocab_size == config.vocab_size else "GPT-2's vocabulary is not on this machine: using demo's"
        model = _ready(checkpoint.random(config, weight_dtype(kind), on), kind, on)
        return Loaded(model, tokenizer, name, "random", kind, on, note)
    try:
        folder = checkpoint.fetch(name) if weights == "pretrained" else Path(weights)
        find(folder)  # without weights that is what to say first
        config = checkpoint.config_of(name, folder)
        tokenizer, note = _tokenizer_for(folder, config.vocab_size)
        model = _ready(checkpoint.load(folder, config, weight_dtype(kind), on), kind, on)
        shown = "bundled" if folder == checkpoint.DEMO else weights
        return Loaded(model, tokenizer, name, shown, kind, on, note)
    except CheckpointError as error:
        if not fall_back:
            raise
        demo = load_model("demo", "pretrained", dtype, device, fall_back=False)
        note = f"{name} cannot be served: {error}. Serving the bundled demo model instead."
        return replace(demo, note=note)


def load_variants(loaded: Loaded, names: Sequence[str], dtype: str, device: str) -> list[Loaded]:
    """The cheaper models beside `loaded`, with the same kind of weights: by name, or NAME:LAYERS for the first layers of one.

    Raises CheckpointError, or ValueError for one that has not so many layers or speaks another vocabulary.
    """
    weights = "random" if loaded.weights == "random" else "pretrained"
    variants = []
    for variant in names:
        name, _, layers = variant.partition(":")
        if variant == loaded.name:
            raise ValueError(f"variants: {variant} is the model itself; name those beside it")
        whole = loaded if name == loaded.name else load_model(name, weights, dtype, device, fall_back=False)
        if whole.tokenizer.pieces != loaded.tokenizer.pieces:
            theirs = f"{whole.tokenizer.name}, {loaded.name}'s is {loaded.tokenizer.name}"
            raise ValueError(f"variants: the vocabulary of {variant} is {theirs}")
        most = whole.model.config.n_layer - 1
        if layers and int(layers) > most:
            raise ValueError(f"variants: {variant} must leave out a layer: at most {name}:{most}")
        variants.append(replace(whole, model=cut(whole.model, int(layers)), name=variant) if layers else whole)
    return variants


def _ready(model: GPT, dtype: str, device: torch.device) -> GPT:
    """The model as it computes: on a CPU its weights are laid out for the matrix products, and the originals let go."""
    if device.type == "cpu":
        lay_out(model, dtype)
        with contextlib.suppress(AttributeError):  # glibc alone has it, and alone would keep what was let go for itself
            ctypes.CDLL(None).malloc_trim(0)
    return model


def _tokenizer_for(folder: Path, embeddings: int) -> tuple[Tokenizer, str | None]:
    """The vocabulary of a checkpoint, and what is to be said of it. One that brings none has GPT-2's, if it has as many
    embeddings. Raises CheckpointError."""
    try:
        return load_tokenizer(folder).for_model(embeddings, *special_ids(folder)), None
    except NoVocabulary as error:
        if embeddings not in GPT2_EMBEDDINGS:
            told = f"{error}, and with {embeddings} tokens it is not GPT-2's: put its tokenizer.json there"
            raise CheckpointError(told) from error
        if (gpt2 := load_gpt2_tokenizer()) is None:
            told = f"{error}, and GPT-2's is not in tiktoken's cache either: put a tokenizer.json there"
            raise CheckpointError(told) from error
        return gpt2.for_model(embeddings, *special_ids(folder)), f"{error}: using GPT-2's"
    except VocabularyError as error:
        raise CheckpointError(str(error)) from error


def make_executor(
    loaded: Loaded,
    clock: Callable[[], float],
    max_batch_size: int,
    token_budget: int,
    max_queue: int,
    kv_gb: float | None,
    cheaper: Sequence[Loaded] = (),
) -> tuple[Executor, Limits]:
    """The executor with its KV cache, and the limits that follow from them. `cheaper`: variants of the model beside it, the
    most accurate first; each has a cache of its own. Raises ValueError if the memory does not do."""
    variants = [loaded, *cheaper]
    block_bytes = sum(map(_block_bytes, variants))
    free = free_memory(loaded.device)
    budget = min(free // 2, CPU_KV_BYTES if loaded.device.type == "cpu" else free) if kv_gb is None else int(kv_gb * 2**30)
    if budget > free:
        raise ValueError(f"kv-memory-gb: {kv_gb:g} GiB asked for, {free / 2**30:.1f} GiB are free")
    context = min(variant.model.config.block_size for variant in variants)
    a_context = blocks_for(context, BLOCK_SIZE)
    num_blocks = min(budget // block_bytes, max_batch_size * a_context)  # more could never be in use
    if num_blocks < a_context:
        need = a_context * block_bytes / 2**30
        raise ValueError(f"kv-memory-gb: one context takes {need:.3g} GiB of KV cache, {budget / 2**30:.3g} GiB are given")
    fitting = all(variant.model.config.head_size in HEAD_SIZES for variant in variants)
    graphs = (
        has_triton(loaded.device) and fitting
    )  # plain torch's attention asks the device for numbers, which no graph can hold
    limits = Limits(
        max_batch_size=max_batch_size,
        token_budget=token_budget,
        max_prefill_tokens=max(8192, max_batch_size, context),
        max_context=context,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_queue=max_queue,
        variants=tuple(variant.name for variant in variants),
    )
    executors = [_executor(variant, num_blocks, clock, max_batch_size, graphs) for variant in variants]
    return VariantExecutor(executors) if cheaper else executors[0], limits


def _block_bytes(loaded: Loaded) -> int:
    config = loaded.model.config
    return 2 * config.n_layer * BLOCK_SIZE * config.n_embd * kv_dtype(loaded.dtype, loaded.device).itemsize


def _executor(loaded: Loaded, num_blocks: int, clock: Callable[[], float], max_batch_size: int, graphs: bool) -> GPTExecutor:
    config, dtype = loaded.model.config, kv_dtype(loaded.dtype, loaded.device)
    cache = KVCache(config.n_layer, num_blocks + graphs, BLOCK_SIZE, config.n_head, config.head_size, dtype, loaded.device)
    depth = 2 if loaded.device.type == "cuda" else 1
    executor = GPTExecutor(loaded.model, cache, loaded.tokenizer.vocab_size, clock, max_batch_size, depth)
    executor.warm_up()
    if graphs:
        executor.capture(CudaCapture(loaded.device))
    return executor
