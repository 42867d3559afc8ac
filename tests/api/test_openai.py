"""The /v1 routes as OpenAI's own client sees them, over the real server and the demo model."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest
import requests

from api.completion_request import read_completion
from api.errors import ApiError

from .server_process import ServerProcess, wait_for

Start = Callable[..., ServerProcess]
DEMO = ("--model", "demo", "--dtype", "fp32", "--device", "cpu")
KEY = "a-key-for-the-tests"
PROMPT = "The old house at the end of the lane"


@pytest.fixture(scope="module")
def server(start_process: Start) -> ServerProcess:
    return start_process("dynamic", *DEMO, "--api-key", KEY).wait_until_ready()


def client_of(server: ServerProcess, key: str = KEY, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=60, **settings)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, **{"temperature": 0, "max_tokens": 12} | fields)


def test_the_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.models.retrieve("gpt-9")


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI, server: ServerProcess) -> None:
    answer = complete(client)
    plain = requests.post(
        server.url + "/inference",
        json={"prompt": PROMPT, "num_tokens": 12, "temperature": 0},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    ).json()
    assert PROMPT + answer.choices[0].text == plain["completion"]
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "demo", "length")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert abs(answer.created - time.time()) < 60


def test_sixteen_tokens_where_a_call_does_not_say(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_several_prompts_and_choices_come_back_in_their_order(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "My father kept a small shop"]
    answer = complete(client, prompts, n=2, temperature=1, seed=5, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [complete(client, prompt, n=2, temperature=1, seed=5, max_tokens=8) for prompt in prompts]
    texts = [choice.text for choice in answer.choices]
    assert texts == [choice.text for one in alone for choice in one.choices], "choices differ by their seed, not their company"
    assert texts[0] != texts[1]
    assert answer.usage.completion_tokens == 32
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone), "a prompt counts once"


def test_token_ids_are_prompts_too(client: openai.OpenAI) -> None:
    tokens = [100, 200, 300]
    one, several = complete(client, tokens), complete(client, [tokens, [5]])
    assert several.choices[0].text == one.choices[0].text
    assert several.usage.prompt_tokens == 4


def test_an_empty_prompt_is_the_beginning_of_a_text(client: openai.OpenAI) -> None:
    assert complete(client, "").usage.prompt_tokens == 1


def test_a_stream_brings_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=30)
    chunks = list(complete(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_of_several_choices_keeps_them_apart(client: openai.OpenAI) -> None:
    asked = {"prompt": [PROMPT, "A great storm"], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 10}
    whole = complete(client, **asked)
    texts = [""] * 4
    for chunk in complete(client, **asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_a_stop_ends_the_text_before_it_streamed_or_not(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[20:26]
    answer = complete(client, max_tokens=40, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(complete(client, max_tokens=40, stop=[stop, "never said"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_does_not_count_before_min_tokens(client: openai.OpenAI) -> None:
    assert complete(client, stop=["e", "a", " "]).usage.completion_tokens < 12
    answer = complete(client, stop=["e", "a", " "], extra_body={"min_tokens": 12, "ignore_eos": True})
    assert answer.usage.completion_tokens == 12


def test_echo_gives_the_prompt_back_and_max_tokens_0_nothing_else(client: openai.OpenAI) -> None:
    assert complete(client, echo=True).choices[0].text == PROMPT + complete(client).choices[0].text
    alone = complete(client, echo=True, max_tokens=0)
    assert (alone.choices[0].text, alone.usage.completion_tokens) == (PROMPT, 0)
    streamed = list(complete(client, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == complete(client, echo=True).choices[0].text


def test_log_probabilities_come_with_their_tokens_and_alternatives(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(12)]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert logprob == max(top.values()) == top[token], "greedy: the drawn token is the likeliest"
    pieces = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    assert [token for piece in pieces for token in piece.tokens] == found.tokens
    assert [value for piece in pieces for value in piece.token_logprobs] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert [offset for piece in pieces for offset in piece.text_offset] == found.text_offset


def test_echo_with_log_probabilities_scores_the_prompt(client: openai.OpenAI) -> None:
    text = PROMPT + complete(client).choices[0].text
    scored = complete(client, text, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    assert scored.token_logprobs[0] is None, "nothing comes before the first token"
    assert scored.top_logprobs is None
    generated = complete(client, logprobs=0).choices[0].logprobs
    assert scored.token_logprobs[-12:] == pytest.approx(generated.token_logprobs, abs=1e-4)


def test_flex_and_priority_mark_a_request_deferred(client: openai.OpenAI, server: ServerProcess) -> None:
    def finished() -> int:
        answer = requests.get(server.url + "/stats", headers={"Authorization": f"Bearer {KEY}"}, timeout=10).json()
        return int(answer["latency"]["deferred"]["requests"])

    before = finished()
    assert complete(client, extra_body={"service_tier": "flex"}).service_tier == "flex"
    complete(client, extra_body={"priority": "deferred"})
    complete(client, extra_body={"service_tier": "default"})
    assert finished() == before + 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2000}, "max_tokens"),
        ({"max_tokens": 512, "prompt": "word " * 60}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 129}, "n"),
        ({"n": 100, "prompt": ["a", "b"]}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"extra_body": {"service_tier": []}}, "service_tier"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "two"]}, "prompt"),
        ({"prompt": ["one", 2]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"extra_body": {"min_tokens": 13}}, "min_tokens"),
        ({"extra_body": {"service_tier": "gold"}}, "service_tier"),
        ({"extra_body": {"priority": 1.5}}, "priority"),
        ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
)
def test_what_will_not_do_is_a_400_that_names_it(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, **fields)
    assert raised.value.param == param
    assert param in raised.value.message


def test_what_asks_for_nothing_is_no_error(client: openai.OpenAI) -> None:
    neutral = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "suffix": None, "user": "me"}
    assert complete(client, **neutral).choices[0].text == complete(client).choices[0].text


def test_another_model_and_the_chat_route_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hello"}])


def test_the_key_is_asked_for(server: ServerProcess) -> None:
    for key in ("wrong", KEY[:-1], KEY + "x"):
        with pytest.raises(openai.AuthenticationError):
            complete(client_of(server, key))


def test_a_full_queue_is_a_rate_limit_error_and_leaves_nothing_behind(start_process: Start) -> None:
    small = start_process("dynamic", *DEMO, "--max-batch-size", "1", "--max-queue", "4").wait_until_ready()
    with client_of(small) as client, ThreadPoolExecutor() as pool:
        others = pool.submit(complete, client, ["a"] * 3, max_tokens=400, extra_body={"ignore_eos": True})
        wait_for(lambda: small.stats()["queue_depth"] == 2, 20, "one of them runs")
        with pytest.raises(openai.RateLimitError):
            complete(client, ["a"] * 4, max_tokens=200)
        assert others.result().usage.completion_tokens == 1200
        wait_for(lambda: small.stats()["running"] == 0, 20, "those that found room are cancelled")
        assert complete(client).usage.completion_tokens == 12
        with pytest.raises(openai.BadRequestError, match="more than 4"):
            complete(client, ["a"] * 5)


def test_a_stop_is_never_streamed_though_the_answer_waits_for_its_batch(server: ServerProcess, client: openai.OpenAI) -> None:
    """Static: the row that stops first stays in the batch until its last row is finished."""
    headers = {"Authorization": f"Bearer {KEY}"}
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[20:26]
    assert requests.put(server.url + "/mode", json={"mode": "static"}, headers=headers, timeout=60).ok
    try:
        text = ""
        for chunk in complete(client, [PROMPT, "My father"], max_tokens=200, stop=[stop, "never said"], stream=True):
            text += chunk.choices[0].text if chunk.choices[0].index == 0 else ""
        assert text == whole[: whole.index(stop)]
    finally:
        assert requests.put(server.url + "/mode", json={"mode": "dynamic"}, headers=headers, timeout=60).ok


def test_a_client_that_leaves_a_stream_frees_its_slot(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 400, "stream": True, "n": 4, "ignore_eos": True}
    with requests.post(server.url + "/v1/completions", json=asked, headers=headers, stream=True, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith(b"data: ")
    stats = lambda: requests.get(server.url + "/stats", headers=headers, timeout=10).json()  # noqa: E731
    wait_for(lambda: stats()["running"] == 0, 10, "nothing runs for a client that has gone")


def test_a_deadline_or_failure_in_a_stream_is_an_event_that_clients_raise(serve: Callable[..., Any], gate: Any) -> None:
    server = serve()
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 50, "stream": True, "ignore_eos": True}
    gate.seconds_a_step = 0.02
    answer = server.client.post("/v1/completions", json=body)
    timer = threading.Timer(0.2, lambda: setattr(gate, "failure", RuntimeError("the step was told to fail")))
    timer.start()
    events = [line[6:] for line in answer.get_data(as_text=True).split("\n") if line.startswith("data: ")]
    assert json.loads(events[0])["choices"]
    assert json.loads(events[-1])["error"]["code"] == "step_failed"


def test_a_failure_before_the_first_token_has_its_own_status(serve: Callable[..., Any], gate: Any) -> None:
    server = serve()
    gate.failure = RuntimeError("the step was told to fail")
    answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": PROMPT, "stream": True})
    assert answer.status_code == 500
    assert answer.get_json()["error"]["code"] == "step_failed"


def test_a_prompt_that_fills_the_context_is_scored_without_a_token_more(client: openai.OpenAI) -> None:
    full = [5] * 512
    scored = complete(client, full, echo=True, max_tokens=0, logprobs=0)
    assert len(scored.choices[0].logprobs.token_logprobs) == 512
    assert scored.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError, match="the prompt has 513 tokens and max_tokens is 0; together at most 512"):
        complete(client, [*full, 5], echo=True, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="the prompt has 512 tokens and max_tokens is 1; together at most 512"):
        complete(client, full, echo=True, max_tokens=1)


@pytest.mark.parametrize("prompt", ["", ["The", ""]])
def test_an_empty_prompt_begins_a_document_where_the_model_has_a_token_for_that(engine: Any, prompt: Any) -> None:
    body = {"model": "demo", "prompt": prompt}
    assert read_completion(body, engine, 0.0).choices[-1].request.tokens == [2559]
    without = engine._replace(tokenizer=replace(engine.tokenizer, begin=None))
    with pytest.raises(ApiError, match="prompt: must not be empty: this model has no token that begins a text"):
        read_completion(body, without, 0.0)


def test_a_least_length_forbids_every_token_that_ends_a_text(engine: Any) -> None:
    """A model may have several."""
    two = engine._replace(tokenizer=replace(engine.tokenizer, ends=frozenset([7, 2559])))
    sampling = read_completion({"model": "demo", "prompt": "The", "min_tokens": 3}, two, 0.0).choices[0].request.sampling
    assert set(sampling.stop_token_ids) == {7, 2559}
