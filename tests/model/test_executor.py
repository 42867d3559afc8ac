"""The executor under a real scheduler: texts are transformers' in every mode, and static's padding is really computed."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from transformers import GPT2LMHeadModel

from batching.driver import Driver
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policies.static import Static, StaticParams
from batching.policy import Limits, Policy
from batching.request import Request, SamplingParams
from batching.scheduler import Scheduler
from batching.step import Row, Step
from kernels.ragged_attention import RaggedBatch
from model import gpt
from model.checkpoint import DEMO, GPTConfig, config_of, load, random
from model.executor import GPTExecutor
from model.gpt import GPT
from model.kv_cache import KVCache
from model.tokenizer import load_demo_tokenizer

CPU = torch.device("cpu")
TEXTS = [
    "The sun",
    "Once upon a time there was a machine that could read every book in the house, and",
    "A list:",
    "In the morning the two of them went down to the river and looked for the boat that they had left there.",
]
NUM_TOKENS = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small matrices gain nothing from more, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> GPT:
    return load(DEMO, config_of("demo", DEMO), torch.float32, CPU)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    encoded = [load_demo_tokenizer(DEMO).encode(text) for text in TEXTS]
    assert len({len(prompt) for prompt in encoded}) > 2, "lengths differ"
    return encoded


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates greedily, each text by itself."""
    oracle = GPT2LMHeadModel.from_pretrained(DEMO).eval()
    return [continued(oracle, prompt) for prompt in prompts]


@torch.inference_mode()
def continued(oracle: GPT2LMHeadModel, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    given, cache = prompt, None
    while len(tokens) < NUM_TOKENS:
        answer = oracle(torch.tensor([given]), past_key_values=cache, use_cache=True)
        tokens.append(int(answer.logits[0, -1].argmax()))
        given, cache = tokens[-1:], answer.past_key_values
    return tokens


def engine(model: GPT, **changes: int) -> tuple[GPTExecutor, Limits]:
    """Over a cache in which whoever reads a column that was never written will show."""
    config = model.config
    given = {"max_context": config.block_size, "num_blocks": 300, "max_prefill_tokens": 4096}
    limits = Limits(**given | changes)
    cache = KVCache(config.n_layer, limits.num_blocks, limits.block_size, config.n_head, config.head_size, torch.float32, CPU)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(1e4)
    return GPTExecutor(model, cache, config.vocab_size, itertools.count().__next__), limits


def run(model: GPT, policy: Policy, requests: Sequence[Request], **changes: int) -> Sequence[Request]:
    executor, limits = engine(model, **changes)
    answered: list[Request] = []
    driver = Driver(Scheduler(policy, limits), lambda: 0.0, answered.append)
    for req in requests:
        driver.submit(req)
    while len(answered) < len(requests):
        driver.iterate(executor)
    assert [req.error for req in requests] == [None] * len(requests)
    return requests


def static() -> Static:
    return Static(StaticParams(batch_timeout_ms=0))


def greedy(prompts: list[list[int]], lengths: Sequence[int] = (NUM_TOKENS,) * 4) -> list[Request]:
    return [Request(str(i), list(p), n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]


@pytest.mark.parametrize("mode", POLICIES)
def test_every_mode_generates_the_tokens_of_transformers(mode: str, demo: GPT, prompts, expected):
    policy = static() if mode == "static" else POLICIES[mode]()
    assert [req.output for req in run(demo, policy, greedy(prompts))] == expected


def test_prompts_cut_into_small_chunks_give_the_same_tokens(demo: GPT, prompts, expected):
    requests = run(demo, Dynamic(), greedy(prompts), max_batch_size=4, token_budget=5)
    assert [req.output for req in requests] == expected


def test_preempted_requests_recompute_to_the_same_tokens(demo: GPT, prompts, expected):
    room = sum(-(-len(prompt) // 4) for prompt in prompts) + 4
    requests = run(demo, Dynamic(), greedy(prompts), block_size=4, num_blocks=room)
    assert sum(req.preemptions for req in requests) > 0
    assert [req.output for req in requests] == expected


def test_statics_padding_and_kept_rows_do_not_change_a_text(demo: GPT, prompts, expected):
    lengths = (NUM_TOKENS, 1, 7, 12)
    requests = run(demo, static(), greedy(prompts, lengths))
    assert [req.output for req in requests] == [text[:n] for text, n in zip(expected, lengths, strict=True)]


def drawn(model: GPT, policy: Policy, prompts: list[list[int]]) -> list[list[int]]:
    requests = greedy(prompts)
    for i, req in enumerate(requests):
        req.sampling = SamplingParams(1.0, top_k=[0, 50, 0, 5][i], top_p=[1.0, 1.0, 0.9, 0.9][i], seed=i)
    return [req.output for req in run(model, policy, requests)]


def test_seeded_draws_give_the_same_tokens_in_every_mode(demo: GPT, prompts):
    alone = drawn(demo, NoBatch(), prompts)
    for policy in (static(), Dynamic(), POLICIES["mixed"]()):
        assert drawn(demo, policy, prompts) == alone, policy


# Failures.


def test_a_failing_model_is_the_steps_error_and_the_next_step_is_computed(demo: GPT):
    executor, _ = engine(demo)
    for i, token in enumerate([10**6, 1]):  # the first is no token of this model
        req = Request("r", [token], 5)
        req.blocks = [0]
        executor.submit(Step(i, (Row(req, 0, 1, 0, 0, True),), 0.0))
        result = executor.collect()
        assert result.step_id == i
        assert result.started < result.ended
        assert (result.error is None, set(result.tokens)) == [(False, set()), (True, {"r"})][i]


def test_a_failed_step_ends_its_own_requests_and_the_server_goes_on(demo: GPT, prompts, expected):
    executor, limits = engine(demo)
    answered: list[Request] = []
    driver = Driver(Scheduler(NoBatch(), limits), lambda: 0.0, answered.append)
    bad, good = Request("bad", [10**6], 5), Request("good", list(prompts[0]), NUM_TOKENS)
    driver.submit(bad)
    driver.submit(good)
    while len(answered) < 2:
        driver.iterate(executor)
    assert bad.error is not None
    assert bad.error.code == "step_failed"
    assert good.output == expected[0]


def test_a_step_that_only_prefills_draws_no_token(demo: GPT):
    executor, _ = engine(demo)
    req = Request("r", [1, 2, 3], 5)
    req.blocks = [0]
    executor.submit(Step(1, (Row(req, 0, 2, 0, 0, False),), 0.0))
    result = executor.collect()
    assert (result.error, dict(result.tokens)) == (None, {})


# What static pays, counted and not timed, on one layer with a context of 1024.


class Meter:
    """Per step: tokens through the layer's MLP, KV columns that attention is told to read, and queries times columns. (That it
    reads what it is told, masked or not, is tested with the kernels.)"""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self._attention = gpt.ragged_attention
        self._read: list[tuple[int, int]] = []
        monkeypatch.setattr(gpt, "ragged_attention", self._attend)
        model.h[0].mlp.register_forward_hook(self._end_of_step)

    def _attend(self, q, k, v, k_cache, v_cache, batch: RaggedBatch) -> torch.Tensor:
        self._read = [(end - begin, max(start + end - begin, span)) for begin, end, start, span in batch.rows]
        return self._attention(q, k, v, k_cache, v_cache, batch)

    def _end_of_step(self, module, args, output) -> None:
        columns, scores = sum(read for _, read in self._read), sum(queries * read for queries, read in self._read)
        self.steps.append((args[0].shape[0], columns, scores))


@pytest.fixture
def one_layer() -> GPT:
    return random(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64), torch.float32, CPU)


@pytest.fixture
def metered(one_layer: GPT, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int, int]]]:
    """The steps of a policy over requests of given prompt and output lengths."""
    meter = Meter(one_layer, monkeypatch)

    def measure(policy: Policy, shapes: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        meter.steps = []
        run(one_layer, policy, [Request(str(i), [1] * prompt, output) for i, (prompt, output) in enumerate(shapes)])
        return meter.steps

    return measure


def test_static_computes_for_a_short_prompt_what_it_computes_for_the_longest(metered):
    uneven = metered(static(), [(16, 4), (512, 4)])
    even = metered(static(), [(512, 4), (512, 4)])
    assert uneven == even
    assert even[0] == (1024, 1024, 2 * 512 * 512)
    assert even[1:] == [(2, 2 * columns, 2 * columns) for columns in (513, 514, 515)]


def test_static_computes_for_a_finished_row_what_it_computes_for_a_live_one(metered):
    uneven = metered(static(), [(512, 1), (512, 6), (16, 3)])
    even = metered(static(), [(512, 6)] * 3)
    assert uneven == even
    assert even[-1] == (3, 3 * 517, 3 * 517)


def test_dynamic_computes_no_padding(metered):
    steps = metered(Dynamic(), [(16, 1), (512, 6)])
    assert sum(tokens for tokens, _, _ in steps) == 16 + 512 + 5
    assert steps[-1] == (1, 517, 517)
