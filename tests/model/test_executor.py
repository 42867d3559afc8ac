"""The executor under a real scheduler: texts are transformers' in every mode, and static's padding is really computed. What a
GPU has beside, two steps under way and graphs, is tried here on the processor; a graph is then a function called again."""

import itertools
from array import array
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
from kernels.batch import RaggedBatch
from model import gpt
from model.checkpoint import DEMO, GPTConfig, config_of, load, random
from model.cuda_graphs import buckets
from model.executor import GPTExecutor
from model.gpt import GPT
from model.kv_cache import KVCache
from model.tokenizer import load_tokenizer

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
    encoded = [load_tokenizer(DEMO).encode(text) for text in TEXTS]
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


WAYS = pytest.mark.parametrize("way", ["at once", "overlapped", "graphs"])


def engine(model: GPT, way: str = "at once", **changes: int) -> tuple[GPTExecutor, Limits]:
    """Over a cache in which whoever reads a column that was never written will show."""
    config = model.config
    given = {"max_context": config.block_size, "num_blocks": 300, "max_prefill_tokens": 4096}
    limits = Limits(**given | changes)
    num_blocks = limits.num_blocks + (way == "graphs")
    cache = KVCache(config.n_layer, num_blocks, limits.block_size, config.n_head, config.head_size, torch.float32, CPU)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(1e4)
    clock, depth = itertools.count().__next__, 1 if way == "at once" else 2
    executor = GPTExecutor(model, cache, config.vocab_size, clock, limits.max_batch_size, depth)
    if way == "graphs":
        executor.capture(again)
    return executor, limits


def again(function: Callable[[], None]) -> Callable[[], None]:
    """A graph's stand-in. It runs once while it is captured, as a real one does twice."""
    function()
    return function


def run(model: GPT, policy: Policy, requests: Sequence[Request], way: str = "at once", **changes: int) -> Sequence[Request]:
    executor, limits = engine(model, way, **changes)
    return serve(executor, limits, policy, requests)


def serve(executor: GPTExecutor, limits: Limits, policy: Policy, requests: Sequence[Request]) -> Sequence[Request]:
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


@WAYS
@pytest.mark.parametrize("mode", POLICIES)
def test_every_mode_generates_the_tokens_of_transformers(mode: str, way: str, demo: GPT, prompts, expected):
    policy = static() if mode == "static" else POLICIES[mode]()
    assert [req.output for req in run(demo, policy, greedy(prompts), way)] == expected


@WAYS
def test_prompts_cut_into_small_chunks_give_the_same_tokens(way: str, demo: GPT, prompts, expected):
    requests = run(demo, Dynamic(), greedy(prompts), way, max_batch_size=4, token_budget=5)
    assert [req.output for req in requests] == expected


@WAYS
def test_preempted_requests_recompute_to_the_same_tokens(way: str, demo: GPT, prompts, expected):
    room = sum(-(-len(prompt) // 4) for prompt in prompts) + 4
    requests = run(demo, Dynamic(), greedy(prompts), way, block_size=4, num_blocks=room)
    assert sum(req.preemptions for req in requests) > 0
    assert [req.output for req in requests] == expected


@WAYS
def test_statics_padding_and_kept_rows_do_not_change_a_text(way: str, demo: GPT, prompts, expected):
    lengths = (NUM_TOKENS, 1, 7, 12)
    requests = run(demo, static(), greedy(prompts, lengths), way)
    assert [req.output for req in requests] == [text[:n] for text, n in zip(expected, lengths, strict=True)]


@WAYS
def test_a_stop_ends_its_text_where_it_is_met(way: str, demo: GPT, prompts, expected):
    """With two steps under way one more token was being drawn by then; it is not looked at."""
    requests, wanted = greedy(prompts), [text[: text.index(text[5]) + 1] for text in expected]
    for req, text in zip(requests, expected, strict=True):
        req.stop = lambda req, end=text[5]: req.tokens[-1] == end
    assert [req.output for req in run(demo, Dynamic(), requests, way)] == wanted


def drawn(model: GPT, policy: Policy, prompts: list[list[int]], way: str = "at once") -> list[list[int]]:
    requests = greedy(prompts)
    for i, req in enumerate(requests):
        req.sampling = SamplingParams(1.0, top_k=[0, 50, 0, 5][i], top_p=[1.0, 1.0, 0.9, 0.9][i], stream=i)
    return [req.output for req in run(model, policy, requests, way)]


def penalised(model: GPT, policy: Policy, prompts: list[list[int]], way: str = "at once") -> list[list[int]]:
    """Greedy, and each token is the less likely the more often it has come: with all that came before counted, there is but
    one such text."""
    requests = greedy(prompts)
    for i, req in enumerate(requests):
        req.sampling = SamplingParams(frequency_penalty=2.0, presence_penalty=2.0 * i, repetition_penalty=1.0 + i / 4)
    return [req.output for req in run(model, policy, requests, way)]


@WAYS
def test_seeded_draws_give_the_same_tokens_in_every_mode(way: str, demo: GPT, prompts):
    alone = drawn(demo, NoBatch(), prompts)
    for policy in (static(), Dynamic(), POLICIES["mixed"]()):
        assert drawn(demo, policy, prompts, way) == alone, policy


@WAYS
def test_penalties_count_every_token_that_came_before_in_every_mode(way: str, demo: GPT, prompts, expected):
    alone = penalised(demo, NoBatch(), prompts)
    assert alone != expected
    for policy in (static(), Dynamic(), POLICIES["fastserve"]()):
        assert penalised(demo, policy, prompts, way) == alone, policy


# Two steps under way, and graphs.


def test_with_two_steps_under_way_the_plans_are_the_same(demo: GPT, prompts):
    plans: dict[str, list[tuple]] = {}
    for way in ("at once", "overlapped"):
        executor, limits = engine(demo, way, max_batch_size=3, token_budget=16)
        own, submit = plans.setdefault(way, []), executor.submit
        executor.submit = lambda step, own=own, submit=submit: (own.append(step.values()), submit(step))
        serve(executor, limits, Dynamic(), greedy(prompts, (20, 3, 11, 1)))
    assert plans["overlapped"] == plans["at once"]


def test_the_next_step_is_launched_before_a_result_is_asked_for(demo: GPT, prompts):
    executor, limits = engine(demo, "overlapped")
    calls: list[str] = []
    submit, collect = executor.submit, executor.collect
    executor.submit = lambda step: (calls.append("submit"), submit(step))
    executor.collect = lambda: (calls.append("collect"), collect())[1]
    serve(executor, limits, NoBatch(), greedy(prompts[:1], (4,)))
    assert calls == ["submit", "submit", "collect", "submit", "collect", "submit", "collect", "collect"]


def test_a_step_takes_the_next_larger_graph_and_fills_it_with_rows_that_touch_nobodys_blocks(demo: GPT):
    executor, limits = engine(demo, "graphs", max_batch_size=16)
    requests = [Request(str(i), [i + 1] * 17, 2) for i in range(11)]
    for i, req in enumerate(requests):
        req.blocks = array("i", [2 * i, 2 * i + 1])
        req.tokens.append(5)
    cache = executor._cache
    before = [tensor.clone() for tensor in (*cache.k, *cache.v)]
    executor.submit(Step(1, tuple(Row(req, 17, 1, 0, 0, True) for req in requests), 0.0))
    result = executor.collect()
    assert (result.error, len(result.tokens), result.graph_padding) == (None, 11, 16 - 11)
    changed = {
        block
        for now, then in zip((*cache.k, *cache.v), before, strict=True)
        for block in (now != then).flatten(1).any(1).nonzero()[:, 0].tolist()
    }
    assert changed == {2 * i + 1 for i in range(11)} | {limits.num_blocks}


def test_steps_with_prompts_in_them_take_no_graph(demo: GPT):
    executor, _ = engine(demo, "graphs")
    req = Request("r", [1, 2, 3], 5)
    req.blocks = array("i", [0])
    executor.submit(Step(1, (Row(req, 0, 3, 0, 0, True),), 0.0))
    executor.submit(Step(2, (Row(req, 3, 1, 0, 0, True),), 0.0))
    assert [executor.collect().graph_padding, executor.collect().graph_padding] == [0, 0]


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 300, 1000])
def test_buckets_hold_every_number_of_rows_and_waste_little(most: int):
    sizes = buckets(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for rows in range(1, most + 1):
        bucket = next(size for size in sizes if size >= rows)
        assert bucket <= max(rows * 1.25 + 7, 1)


# Failures.


def test_with_two_steps_under_way_a_failed_one_ends_its_own_requests(demo: GPT, prompts, expected):
    executor, limits = engine(demo, "overlapped")
    answered: list[Request] = []
    driver = Driver(Scheduler(Dynamic(), limits), lambda: 0.0, answered.append)
    first, bad, good = (
        Request("first", list(prompts[1]), 3),
        Request("bad", [10**6], 5),
        Request("good", list(prompts[0]), NUM_TOKENS),
    )
    driver.submit(first)
    driver.iterate(executor)
    driver.submit(bad)
    driver.iterate(executor)  # first and bad are in one step
    driver.submit(good)
    while len(answered) < 3:
        driver.iterate(executor)
    assert [req.error and req.error.code for req in (first, bad, good)] == ["step_failed", "step_failed", None]
    assert good.output == expected[0]
    assert driver.scheduler.blocks.num_free == limits.num_blocks


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
        self._attention = gpt.paged_attention
        self._read: list[tuple[int, int]] = []
        monkeypatch.setattr(gpt, "paged_attention", self._attend)
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


@pytest.mark.parametrize(("prompt", "computed"), [(64, 64), (65, 72), (71, 72), (72, 72), (509, 512)])
def test_a_step_with_many_tokens_is_rounded_up_so_that_products_are_compiled_for_few_sizes(metered, prompt: int, computed: int):
    assert metered(Dynamic(), [(prompt, 2)]) == [(computed, prompt, prompt * prompt), (1, prompt + 1, prompt + 1)]


@WAYS
def test_log_probabilities_are_the_models_own_of_prompts_and_drawn_tokens(demo: GPT, prompts: list[list[int]], way: str):
    """In chunks, and with a request between them that wants none."""
    oracle = GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32).eval()
    drawn = [SamplingParams(temperature=1.0, top_k=20, stream=i) for i in range(len(prompts))]
    requests = [Request(str(i), list(prompt), 6, sampling=drawn[i], num_logprobs=i) for i, prompt in enumerate(prompts)]
    requests[0].prompt_logprobs = requests[3].prompt_logprobs = True
    requests[1].num_logprobs = None
    run(demo, Dynamic(), requests, way, token_budget=16, max_batch_size=4)
    assert requests[1].logprobs == {}
    for req in (requests[0], requests[2], requests[3]):
        with torch.inference_mode():
            expected = oracle(torch.tensor([req.tokens])).logits[0].log_softmax(-1)
        first = 1 if req.prompt_logprobs else req.prompt_len
        assert sorted(req.logprobs) == list(range(first, len(req.tokens)))
        for place, found in req.logprobs.items():
            row = expected[place - 1]
            assert found.logprob == pytest.approx(float(row[req.tokens[place]]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(row.topk(req.num_logprobs or 0).values.tolist(), abs=1e-4)
            assert all(abs(float(row[token]) - value) < 1e-4 for token, value in found.top)
