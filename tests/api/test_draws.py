"""Seeds and draws over the routes: what must be the same text is, what must be independent is."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from api.burst import read_burst
from batching import random_streams as module
from batching.loop import Engine
from batching.policies import POLICIES
from batching.request import SamplingParams
from model.sampling import sample

from .conftest import PATIENCE_S, Server
from .server_process import wait_for

PROMPT = "The old house at the end of the lane"
OTHER = "My father kept a small shop"


def texts(server: Server, prompt: Any = PROMPT, **fields: Any) -> list[str]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 12, "ignore_eos": True} | fields
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.get_json()
    return [choice["text"] for choice in answer.get_json()["choices"]]


def test_equal_prompts_of_one_call_without_a_seed_have_different_texts(server: Server) -> None:
    assert len(set(texts(server, [PROMPT] * 8))) == 8
    assert len(set(texts(server, [PROMPT, OTHER] * 3, n=2))) == 12


def test_equal_prompts_of_one_call_with_a_seed_have_different_texts_the_same_ones_each_time(server: Server) -> None:
    first = texts(server, [PROMPT] * 4, n=2, seed=10)
    assert len(set(first)) == 8
    assert texts(server, [PROMPT] * 4, n=2, seed=10) == first


def test_neighbouring_seeds_share_no_choice(server: Server) -> None:
    found = [text for seed in range(8, 14) for text in texts(server, n=3, seed=seed)]
    assert len(set(found)) == 18


def test_one_prompt_with_one_seed_has_the_same_text_in_a_list_streamed_in_a_batch_and_on_inference(server: Server) -> None:
    (alone,) = texts(server, seed=5)
    assert texts(server, [OTHER, PROMPT, PROMPT], seed=5)[1] == alone
    assert texts(server, [OTHER, PROMPT], n=3, seed=5)[3] == alone
    assert texts(server, server.loop.ready_engine().tokenizer.encode(PROMPT), seed=5) == [alone]
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "seed": 5}
    events = server.client.post("/v1/completions", json=asked | {"stream": True}).get_data(as_text=True).split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone
    answer = server.ask(PROMPT, 12, temperature=1, top_k=0, seed=5).get_json()
    assert answer["completion"] == PROMPT + alone, "the same sampling: /inference has other defaults"
    assert batch_texts(server, [asked, asked | {"prompt": [OTHER, PROMPT]}]) == [
        [alone],
        [texts(server, OTHER, seed=5)[0], alone],
    ]


def batch_texts(server: Server, bodies: list[dict[str, Any]]) -> list[list[str]]:
    entries = ({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies))
    content = io.BytesIO("\n".join(map(json.dumps, entries)).encode())
    file = server.client.post("/v1/files", data={"purpose": "batch", "file": (content, "lines.jsonl")}).get_json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
    url = "/v1/batches/" + server.client.post("/v1/batches", json=asked).get_json()["id"]
    wait_for(lambda: server.client.get(url).get_json()["status"] == "completed", PATIENCE_S, "the batch is completed")
    output = server.client.get(url).get_json()["output_file_id"]
    lines = map(json.loads, server.client.get(f"/v1/files/{output}/content").get_data(as_text=True).splitlines())
    return [[choice["text"] for choice in line["response"]["body"]["choices"]] for line in lines]


def test_a_seeded_call_has_the_same_texts_in_every_mode(serve: Callable[..., Server]) -> None:
    server, found = serve(), {}
    for mode in POLICIES:
        assert server.put_mode_later(mode).result(PATIENCE_S).status_code == 200
        found[mode] = texts(server, [PROMPT, OTHER, PROMPT], n=2, seed=77)
    assert len(set(found["dynamic"])) == 6
    assert {mode: texts for mode, texts in found.items() if texts != found["dynamic"]} == {}


def test_any_int64_is_a_seed_of_its_own_with_as_many_choices_as_there_may_be(server: Server) -> None:
    seeds = [-(2**63), -10, -2, 0, 2, 10, 2**62, 2**63 - 1]
    found = {seed: texts(server, n=2, seed=seed) for seed in seeds}
    assert len({text for pair in found.values() for text in pair}) == 16
    assert {seed: texts(server, n=2, seed=seed) for seed in seeds} == found
    assert len(texts(server, "a", n=128, seed=2**63 - 1, max_tokens=1)) == 128


def test_the_seed_minus_1_is_none(server: Server) -> None:
    assert len({texts(server, seed=-1)[0] for _ in range(4)}) == 4
    assert len({server.ask(PROMPT, 12, temperature=1, seed=-1).get_json()["completion"] for _ in range(4)}) == 4


def test_first_tokens_of_equal_prompts_without_a_seed_are_as_frequent_as_the_softmax_says(
    server: Server, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over calls of 16 prompts of 8 choices; with fixed entropy, so that each run sees the same."""
    calls = count()
    monkeypatch.setattr(module, "token_bytes", lambda size: next(calls).to_bytes(size, "big"))
    shown = 5
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": shown}
    top = server.client.post("/v1/completions", json=asked).get_json()["choices"][0]["logprobs"]["top_logprobs"][0]
    drawn = Counter(text for _ in range(12) for text in texts(server, [PROMPT] * 16, n=8, max_tokens=1, ignore_eos=True))
    draws = drawn.total()
    assert len(top) == shown
    assert draws == 12 * 128
    for name, logprob in top.items():
        p = torch.tensor(logprob).exp().item()
        deviation = (draws * p * (1 - p)) ** 0.5
        assert abs(drawn[name] - draws * p) < 4 * deviation, f"{name!r}: {drawn[name]} of {draws}, probability {p:.4f}"


def test_no_two_requests_of_a_burst_draw_alike(engine: Engine) -> None:
    """Most of them begin alike: their prompts are cut from one text, and some are equal."""
    requests = read_burst({"requests": 2000, "prompt_tokens": [1, 2], "num_tokens": 4}, engine, 0.0)
    assert len({req.sampling.stream for req in requests}) == 2000
    assert len({tuple(req.tokens) for req in requests}) < 200
    flat = torch.zeros(2000, 8)
    first = sample(flat, [SamplingParams(1.0, stream=req.sampling.stream) for req in requests], [0] * 2000).tolist()
    assert all(abs(number - 250) < 5 * (2000 * 7 / 64) ** 0.5 for number in Counter(first).values())
