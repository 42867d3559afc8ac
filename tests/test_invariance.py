"""The mode, the batch, preemption and switching never change a text: 64 requests on the real engine (demo model).

In int8 that holds bit for bit, since integers are summed exactly. In float32 and bfloat16 a product's rounding may differ with
the number of its rows, and could turn a draw between two almost equal tokens; with these streams it turns none."""

import random
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import cycle

import pytest

from batching import loop as loop_module
from batching.driver import Driver
from batching.loop import BatchingLoop, Engine
from batching.policies import POLICIES
from batching.policy import Limits
from batching.replay import replay
from batching.request import Priority, Request, SamplingParams
from batching.scheduler import Scheduler
from model.device import kv_dtype
from model.engine import Loaded, load_model, make_executor
from model.executor import GPTExecutor
from model.kv_cache import KVCache

TEXT = """It was a bright morning, and the whole family had come down to the shore to see the ships. Nobody spoke; the old
captain looked through his glass, the children held their breath, and far away over the water a small white sail appeared."""
PATIENCE_S = 120
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.1}


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def demo(request: pytest.FixtureRequest) -> Loaded:
    return load_model("demo", "pretrained", request.param, "cpu", fall_back=False)


def requests_for(demo: Loaded) -> list[Request]:
    """Outputs of 1..128 tokens, prompts of 1..50; every second one sampled, each with its own stream; every fourth with
    penalties and a bias."""
    rng = random.Random(5)
    words = demo.tokenizer.encode(TEXT)
    requests = []
    for i in range(64):
        prompt = words[(begin := rng.randrange(20)) : begin + rng.randint(1, min(50, len(words) - begin))]
        how = SamplingParams(temperature=0.9, top_k=(0, 40)[i % 4 == 1], top_p=(1.0, 0.9)[i % 8 == 3], stream=i)
        sampling = how if i % 2 else SamplingParams()
        if i % 8 in (5, 6):
            sampling = replace(sampling, **PENALTIES, min_p=0.01, logit_bias=((5, 2.0),))
        requests.append(Request(str(i), prompt, rng.randint(1, 128), list(Priority)[i % 3 == 0], sampling=sampling))
    requests[0].max_tokens, requests[1].max_tokens = 1, 128
    return requests


def outputs(requests: list[Request]) -> dict[str, list[int]]:
    assert all(req.error is None for req in requests)
    assert all(len(req.output) == req.max_tokens for req in requests)
    return {req.id: req.output for req in requests}


def run(
    demo: Loaded,
    mode: str,
    *,
    requests: list[Request] | None = None,
    num_blocks: int = 1024,
    log=None,
    plans: list | None = None,
    **changes: int,
) -> tuple[Driver, list[Request]]:
    """All 64, or `requests`, at once through the real scheduler, driver and executor, on one thread."""
    config = demo.model.config
    limits = Limits(**{"max_batch_size": 64, "max_context": config.block_size, "num_blocks": num_blocks} | changes)
    cache = KVCache(
        config.n_layer, num_blocks, 16, config.n_head, config.head_size, kv_dtype(demo.dtype, demo.device), demo.device
    )
    executor = GPTExecutor(demo.model, cache, demo.tokenizer.vocab_size, time.monotonic, limits.max_batch_size)
    driver = Driver(Scheduler(POLICIES[mode](), limits), time.monotonic, lambda req: None, log)
    submit = executor.submit
    executor.submit = lambda step: (plans.append(step.values()) if plans is not None else None, submit(step))  # type: ignore[method-assign]
    requests = requests_for(demo) if requests is None else requests
    for req in requests:
        req.arrival = time.monotonic()
        driver.submit(req)
    while driver.iterate(executor) is not None:
        pass
    return driver, requests


@pytest.fixture(scope="module")
def alone(demo: Loaded) -> dict[str, list[int]]:
    """What each gives by itself: nobatch runs one at a time."""
    return outputs(run(demo, "nobatch")[1])


@pytest.mark.parametrize("mode", [mode for mode in POLICIES if mode != "nobatch"])
def test_every_mode_gives_each_request_the_tokens_it_gets_alone(demo, alone, mode):
    assert outputs(run(demo, mode)[1]) == alone


def test_preemption_and_recompute_change_no_token_and_the_log_replays_to_the_same_plans(demo, alone):
    log: list[dict] = []
    plans: list[tuple] = []
    driver, requests = run(demo, "dynamic", num_blocks=60, log=log.append, plans=plans)
    assert driver.stats.summary(0, live=False)["preemptions"] > 5
    assert outputs(requests) == alone
    assert replay(log) == plans


def test_preemption_that_keeps_the_kv_changes_no_token_and_computes_none_again(demo, alone):
    log: list[dict] = []
    plans: list[tuple] = []
    driver, requests = run(demo, "fastserve", max_batch_size=8, log=log.append, plans=plans)
    stats = driver.stats.summary(0, live=False)
    assert stats["preemptions"] > 20
    assert stats["recomputed_tokens"] == 0
    assert outputs(requests) == alone
    assert replay(log) == plans


def test_where_memory_is_short_fastserve_recomputes_and_changes_no_token(demo, alone):
    driver, requests = run(demo, "fastserve", max_batch_size=8, num_blocks=40)
    assert driver.stats.summary(0, live=False)["recomputed_tokens"] > 0
    assert outputs(requests) == alone


def alike(demo: Loaded) -> list[Request]:
    """Twenty with three beginnings of three full blocks, in turn; every fifth is no longer than that, and hits in full."""
    words = demo.tokenizer.encode(TEXT) * 3
    requests = []
    for i in range(20):
        prompt = words[i % 3 : i % 3 + 48] + ([] if i % 5 == 0 else words[i : i + i % 7 + 1])
        sampling = SamplingParams(temperature=0.9, top_k=40, stream=i) if i % 2 else SamplingParams()
        requests.append(Request(str(i), prompt, 3 + i % 7, list(Priority)[i % 2], sampling=sampling))
    return requests


@pytest.fixture(scope="module")
def alike_alone(demo: Loaded) -> dict[str, list[int]]:
    return outputs(run(demo, "nobatch", requests=alike(demo))[1])


@pytest.mark.parametrize("num_blocks", [1024, 12], ids=["memory", "little memory"])
@pytest.mark.parametrize("mode", ["dynamic", "mixed", "batchllm"])
def test_sharing_prefixes_changes_no_token(demo, alike_alone, mode, num_blocks):
    size = {"max_batch_size": 8, "token_budget": 64, "num_blocks": num_blocks}
    log: list[dict] = []
    plans: list[tuple] = []
    driver, requests = run(demo, mode, requests=alike(demo), prefix_caching=True, log=log.append, plans=plans, **size)
    assert outputs(requests) == alike_alone
    assert driver.stats.summary(0, live=False)["prefix_cache_hits"] >= 300
    assert replay(log) == plans


def test_switching_the_mode_twenty_times_under_way_changes_no_token_and_sets_each_event_once(demo, alone, monkeypatch):
    times_set: Counter[threading.Event] = Counter()

    class CountingEvent(threading.Event):
        def set(self) -> None:
            times_set[self] += 1
            super().set()

    monkeypatch.setattr(loop_module.threading, "Event", CountingEvent)

    def load() -> Engine:
        executor, limits = make_executor(demo, time.monotonic, 64, 512, 1024, 0.5)
        return Engine(executor, limits, demo.tokenizer, {})

    ready = threading.Event()
    loop = BatchingLoop(POLICIES["dynamic"](), load, on_ready=lambda engine: ready.set())
    loop.start()
    assert ready.wait(PATIENCE_S)
    requests, tickets = requests_for(demo), []
    modes = cycle([mode for mode in POLICIES if mode != "dynamic"] + ["dynamic"])
    for i in range(20):  # three or four requests join under each mode, so that there is always something to hand over
        for req in requests[i * 64 // 20 : (i + 1) * 64 // 20]:
            req.arrival = loop.clock()
            tickets.append(loop.submit(req))
        assert loop.switch(POLICIES[next(modes)]()).wait(PATIENCE_S)
    assert all(ticket.event.wait(PATIENCE_S) for ticket in tickets)
    stats = loop.stats()
    loop.drain("the test is over")
    assert loop.join(PATIENCE_S)
    assert outputs(requests) == alone
    assert len(tickets) == 64
    assert {times_set[ticket.event] for ticket in tickets} == {1}, "counted at the Event itself"
    assert stats["requests_finished"] == 64, "counted in the engine"
