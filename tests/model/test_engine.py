"""From settings to an engine: what is loaded, what it falls back to, and how much memory it takes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.request import Request, SamplingParams
from batching.scheduler import Scheduler
from model.checkpoint import DEMO, CheckpointError, GPTConfig, random
from model.engine import Loaded, load_model, make_executor
from model.tokenizer import load_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small matrices gain nothing from more, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_gpt2_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load_model("demo", "pretrained", "fp32", "cpu", fall_back=False)


def test_the_demo_model_is_served_with_its_own_vocabulary_and_no_note(demo: Loaded):
    assert (demo.name, demo.dtype, demo.note) == ("demo", "fp32", None)
    assert demo.tokenizer.name == "demo"
    assert demo.tokenizer.vocab_size <= demo.model.config.vocab_size


def test_where_the_weights_cannot_be_had_the_demo_model_is_served_and_a_note_says_why(tmp_path: Path):
    loaded = load_model("gpt2", str(tmp_path / "nowhere"), "fp32", "cpu", fall_back=True)
    assert (loaded.name, loaded.weights, loaded.tokenizer.name) == ("demo", "bundled", "demo")
    assert loaded.note is not None
    assert "gpt2 cannot be served" in loaded.note
    assert "demo" in loaded.note
    assert "\n" not in loaded.note


def test_without_falling_back_weights_that_cannot_be_had_are_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere"))):
        load_model("gpt2", str(tmp_path / "nowhere"), "fp32", "cpu", fall_back=False)


@pytest.mark.usefixtures("no_gpt2_vocabulary")
def test_a_checkpoint_without_any_vocabulary_is_an_error(small):
    with pytest.raises(CheckpointError, match="vocabulary"):
        load_model("gpt2", str(small[1]), "fp32", "cpu", fall_back=False)


def with_vocabulary(small, folder: Path, **config) -> Path:
    """A checkpoint of 211 tokens' worth of weights made larger, with the demo's vocabulary of 2,560."""
    shape = json.loads((small[1] / "config.json").read_text()) | {"vocab_size": 2600} | config
    (folder / "config.json").write_text(json.dumps(shape))
    tensors = load_file(small[1] / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.randn(shape["vocab_size"], 128, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(DEMO / "tokenizer.json", folder)
    return folder


def test_a_checkpoints_own_vocabulary_is_used_and_the_padding_of_its_embeddings_is_never_drawn(small, tmp_path: Path):
    loaded = load_model("gpt2", str(with_vocabulary(small, tmp_path)), "fp32", "cpu", fall_back=False)
    assert (loaded.tokenizer.vocab_size, loaded.model.config.vocab_size, loaded.note) == (2560, 2600, None)
    executor, limits = make_executor(loaded, lambda: 0.0, 8, 64, 8, kv_gb=0.1)
    answered: list[Request] = []
    driver = Driver(Scheduler(Dynamic(), limits), lambda: 0.0, answered.append)
    driver.submit(Request("hot", [1, 7], 60, sampling=SamplingParams(temperature=50.0)))
    while not answered:
        driver.iterate(executor)
    assert max(answered[0].output) < 2560


def test_what_ends_a_text_is_what_the_checkpoint_says(small, tmp_path: Path):
    folder = str(with_vocabulary(small, tmp_path, eos_token_id=17, bos_token_id=5))
    tokenizer = load_model("gpt2", folder, "fp32", "cpu", fall_back=False).tokenizer
    assert (tokenizer.ends, tokenizer.begin) == ({17}, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2559]}')
    assert load_model("gpt2", folder, "fp32", "cpu", fall_back=False).tokenizer.ends == {3, 2559}


def test_a_vocabulary_larger_than_the_model_is_an_error(small, tmp_path: Path):
    with pytest.raises(CheckpointError, match="has 2560 tokens, the model only 2000"):
        load_model("gpt2", str(with_vocabulary(small, tmp_path, vocab_size=2000)), "fp32", "cpu", fall_back=False)


@pytest.mark.usefixtures("gpt2")
def test_a_checkpoint_of_gpt2s_size_without_a_vocabulary_has_gpt2s_and_says_so(medium):
    loaded = load_model("gpt2-medium", str(medium[1]), "fp32", "cpu", fall_back=False)
    assert loaded.tokenizer.name == "gpt2"
    assert loaded.note is not None
    assert "brings no vocabulary" in loaded.note
    assert loaded.note.endswith("using GPT-2's")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="device: cuda"):
        load_model("demo", "pretrained", "fp32", "cuda", fall_back=True)


@pytest.mark.usefixtures("no_gpt2_vocabulary")
def test_random_weights_without_gpt2s_vocabulary_use_the_demos_and_never_draw_an_id_beyond_it():
    loaded = load_model("distilgpt2", "random", "fp32", "cpu", fall_back=False)
    assert (loaded.name, loaded.weights, loaded.tokenizer.name) == ("distilgpt2", "random", "demo")
    assert loaded.model.config.vocab_size == 50257
    assert loaded.note is not None
    assert "demo's" in loaded.note
    executor, limits = make_executor(loaded, lambda: 0.0, 8, 64, 8, kv_gb=0.1)
    answered: list[Request] = []
    driver = Driver(Scheduler(Dynamic(), limits), lambda: 0.0, answered.append)
    for i in range(8):
        hot = SamplingParams(temperature=5.0 * (i % 2), top_k=[0, 0, 0, 40][i % 4], stream=i)
        driver.submit(Request(str(i), [i + 1, 7], 5, sampling=hot))
    while len(answered) < 8:
        driver.iterate(executor)
    drawn = [token for req in answered for token in req.output]
    assert len(drawn) == 40
    assert max(drawn) < loaded.tokenizer.vocab_size, "one in twenty would lie below it by chance"


# Memory. A shape is enough: the weights are random.


@pytest.fixture(scope="module")
def shape() -> Loaded:
    """16 MiB of KV cache a context: 64 blocks of 2 * 4 layers * 16 columns * 512 * 4 bytes."""
    model = random(GPTConfig(n_layer=4, n_head=8, n_embd=512, vocab_size=100), torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "model" / "demo")
    return Loaded(model, tokenizer, "shape", "random", "fp32", torch.device("cpu"))


def limits_of(loaded: Loaded, kv_gb: float | None, max_batch_size: int = 4):
    return make_executor(loaded, lambda: 0.0, max_batch_size, 64, 8, kv_gb)[1]


def test_the_kv_memory_asked_for_is_what_the_blocks_take(shape: Loaded):
    limits = limits_of(shape, 2.5 / 64)
    assert limits.num_blocks == 160
    assert (limits.block_size, limits.max_context) == (16, 1024)


def test_no_more_blocks_are_made_than_all_seats_could_use(shape: Loaded):
    assert limits_of(shape, 0.25, max_batch_size=2).num_blocks == 128
    assert limits_of(shape, None, max_batch_size=1).num_blocks == 64


def test_kv_memory_for_just_one_context_will_do(shape: Loaded):
    assert limits_of(shape, 1 / 64).num_blocks == 64


@pytest.mark.parametrize("given", [0.0, 0.001, 0.01])
@pytest.mark.parametrize("which", ["shape", "demo"])
def test_too_little_kv_memory_is_refused_with_what_is_needed_and_what_is_given(which: str, given: float, request):
    loaded = request.getfixturevalue(which)
    if which == "demo":
        given /= 10  # a smaller model
    with pytest.raises(ValueError, match=r"^kv-memory-gb: ") as caught:
        limits_of(loaded, given)
    needed, had = (float(number) for number in re.findall(r"([\d.e-]+) GiB", str(caught.value)))
    assert needed > had, "numbers that show why"


def test_more_kv_memory_than_is_free_is_refused_with_both_numbers(shape: Loaded):
    with pytest.raises(ValueError, match=r"^kv-memory-gb: 10000 GiB asked for, [\d.]+ GiB are free$"):
        limits_of(shape, 10_000)


def test_a_start_does_not_load_torchs_compiler():
    """Which some innocent call may: it takes as long as everything else, and 170 MB."""
    program = """
import sys, time
from model.engine import load_model, make_executor
make_executor(load_model("demo", "pretrained", "auto", "cpu", fall_back=False), time.monotonic, 4, 64, 8, 0.1)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
