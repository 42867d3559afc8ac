"""What real clients send is answered: their requests as they were read off them, field by field, and the
programs themselves."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import TestResponse

from .client_programs import CLIENTS
from .conftest import Server
from .server_process import ServerProcess

PROMPT = "The old house at the end of the lane"
PLAIN = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
PROGRAMS = Path(__file__).with_name("client_programs.py")

REQUESTS = {  # client and version: the body that it sends for a text of 12 tokens
    "vllm bench serve (main of 2026-11)": {
        "repetition_penalty": 1.0, "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True, "top_k": -1, "min_p": 0.0,
    },
    "guidellm 0.8.1": {
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stop": None,
        "ignore_eos": True,
    },
    "lm-eval 0.4.13, log likelihoods": {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
    "lm-eval 0.4.13, generation": {"stop": ["\n\n"], "seed": 1234},
    "langchain-openai 1.7.4": {
        "prompt": [PROMPT], "frequency_penalty": 0, "logprobs": None, "n": 1, "presence_penalty": 0, "seed": None,
        "top_p": 1, "logit_bias": {},
    },
    "litellm 1.110.2": {"stream": True},
    "llama-index-llms-openai-like 0.8.1": {"stream": False, "temperature": 0.0},
    "llm 0.32.1": {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0},
}  # fmt: skip
NEUTRAL = {
    "min_p": 0, "frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1, "length_penalty": 1.0,
    "logit_bias": {}, "top_k": -1, "n": 1.0, "best_of": 1, "logprobs": False, "use_beam_search": False,
    "early_stopping": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "stop_token_ids": [],
    "include_stop_str_in_output": False, "stop": [], "suffix": "", "store": False, "metadata": {"a": "b"}, "user": "me",
    "safety_identifier": "x", "prompt_cache_key": "x", "session_id": "x", "response_format": {"type": "text"},
    "add_special_tokens": False, "bad_words": [], "logits_processors": [], "return_tokens_as_token_ids": False,
    "return_token_ids": False, "vllm_xargs": {}, "thinking_token_budget": -1, "stream_interval": 1, "priority": 0,
    "service_tier": "auto", "stream_options": {}, "request_id": "abc", "ignore_eos": False, "min_tokens": 0.0, "seed": -1,
}  # fmt: skip
REFUSED = {
    "best_of": 2, "use_beam_search": True, "length_penalty": 1.2, "suffix": "x", "store": True, "bad_words": ["x"],
    "response_format": {"type": "json_object"}, "prompt_logprobs": 1, "allowed_token_ids": [1], "structured_outputs": {},
    "truncate_prompt_tokens": 5, "cache_salt": "x", "return_token_ids": True, "early_stopping": True, "prompt_embeds": "x",
    "kv_transfer_params": {}, "vllm_xargs": {"a": 1}, "thinking_token_budget": 5, "stream_interval": 2,
}  # fmt: skip
WRONG = {
    "min_p": (-0.1, 1.1, "0"), "frequency_penalty": (2.1, -2.1, True), "repetition_penalty": (0, -1, 11, float("nan")),
    "logit_bias": ({"x": 1}, {"-1": 1}, {"99999999": 1}, {"1": 101}, {"1": "2"}, {"1": None}, [], {"٣": 1}, {"1" * 5000: 1}),
    "stop_token_ids": ([-1], [10**9], ["a"], [True], 5, [1] * 65), "top_k": (-2, 0.5), "best_of": (0, "1"),
    "logprobs": (True, 6, "1"), "include_stop_str_in_output": ("yes", 1), "priority": ("urgent", 0.5, True, 2**63),
    "stream_options": ({"include_usage": True}, [], {"x": True}), "request_id": ("", "x" * 129, 5),
    "skip_special_tokens": (0,), "no_such_field": (0, False, "", [], {}),
}  # fmt: skip


def post(server: Server, **fields: Any) -> TestResponse:
    return server.client.post("/v1/completions", json=PLAIN | fields)


def texts(response: TestResponse) -> list[str]:
    assert response.status_code == 200, response.get_data(as_text=True)
    return [choice["text"] for choice in response.get_json()["choices"]]


def events(response: TestResponse) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.get_data(as_text=True)
    lines = [line[6:] for line in response.get_data(as_text=True).split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_a_clients_request_is_answered_with_the_plain_text(server: Server, fields: dict[str, Any]) -> None:
    asked = {name: value for name, value in fields.items() if name in ("max_tokens", "ignore_eos", "stop", "echo")}
    expected = texts(post(server, **asked))
    response = post(server, **fields)
    if not fields.get("stream"):
        assert texts(response) == expected
        return
    chunks = events(response)
    assert ["".join(choice["text"] for chunk in chunks for choice in chunk["choices"])] == expected


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_and_null_change_nothing(server: Server, name: str) -> None:
    expected = texts(post(server))
    assert texts(post(server, **{name: NEUTRAL[name]})) == expected
    assert texts(post(server, **{name: None})) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(server: Server, name: str) -> None:
    response = post(server, **{name: REFUSED[name]})
    assert response.status_code == 400, response.get_json()
    error = response.get_json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_cannot_be_is_refused_with_its_limit(server: Server, name: str, value: Any) -> None:
    response = post(server, **{name: value})
    assert response.status_code == 400, response.get_json()
    error = response.get_json()["error"]
    assert error["param"].startswith(name)
    assert name in error["message"]


def test_best_of_is_refused_below_n_and_taken_where_it_is_n(server: Server) -> None:
    error = post(server, n=3, best_of=2).get_json()["error"]
    assert (error["param"], error["code"]) == ("best_of", "invalid_value")
    assert "at least n (3)" in error["message"]
    assert texts(post(server, n=2, best_of=2)) == texts(post(server, n=2))


def test_usage_comes_with_every_chunk_where_it_is_asked_for(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(post(server, stream=True, stream_options=options, ignore_eos=True))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-2], counts[-1], chunks[-1]["choices"]) == (12, 12, [])
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {chunks[-1]["usage"]["prompt_tokens"]}
    alone = events(post(server, stream=True, stream_options=options | {"include_usage": False}))
    assert all("usage" not in chunk for chunk in alone), "as in vLLM, include_usage goes before"


def test_usage_says_what_the_prefix_cache_held(server: Server) -> None:
    prompt = [5 + i % 200 for i in range(100)]
    usage = [post(server, prompt=prompt, n=2).get_json()["usage"] for _ in range(2)]
    assert [one["prompt_tokens_details"]["cached_tokens"] for one in usage] == [0, 96], "six whole blocks of 16"
    assert [one["prompt_tokens"] for one in usage] == [100, 100]


def test_a_stop_token_ends_the_text_and_belongs_to_it_only_where_it_is_asked_for(server: Server) -> None:
    tokenizer = server.loop.engine.tokenizer  # type: ignore[union-attr]
    whole = post(server, max_tokens=30, ignore_eos=True).get_json()["choices"][0]["text"]
    tokens = tokenizer.encode(whole)
    stop, cut = tokens[10], tokens.index(tokens[10])
    ended = post(server, max_tokens=30, stop_token_ids=[stop]).get_json()
    assert ended["choices"][0]["text"] == tokenizer.decode(tokens[:cut])
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", cut + 1)
    kept = {"stop_token_ids": [stop], "include_stop_str_in_output": True}
    assert texts(post(server, max_tokens=30, **kept)) == [tokenizer.decode(tokens[: cut + 1])]
    assert post(server, max_tokens=30, stop_token_ids=[stop], min_tokens=30).get_json()["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_kept_where_it_is_asked_for(server: Server, stream: bool) -> None:
    whole = texts(post(server, max_tokens=30))[0]
    stop = whole[10:14]
    response = post(server, max_tokens=30, stop=stop, include_stop_str_in_output=True, stream=stream)
    text = "".join(c["text"] for e in events(response) for c in e["choices"]) if stream else texts(response)[0]
    assert text == whole[: whole.index(stop) + len(stop)]


def test_special_tokens_are_shown_or_left_out_as_asked_for(server: Server) -> None:
    (end,) = server.loop.engine.tokenizer.ends  # type: ignore[union-attr]
    asked = {"logit_bias": {str(end): 100}, "max_tokens": 3, "ignore_eos": True, "logprobs": 1}
    assert texts(post(server, **asked)) == ["<|endoftext|>" * 3]
    hidden = post(server, **asked, skip_special_tokens=True).get_json()
    assert (hidden["choices"][0]["text"], hidden["usage"]["completion_tokens"]) == ("", 3)
    assert hidden["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0]


def test_log_probabilities_are_of_the_models_own_logits(server: Server) -> None:
    """Not of what penalties, biases and temperature make of them; as in vLLM."""
    plain = post(server, logprobs=0, max_tokens=1).get_json()["choices"][0]["logprobs"]
    token = server.loop.engine.tokenizer.encode(plain["tokens"][0])[0]  # type: ignore[union-attr]
    bias = {str(token): 50}
    changed = post(server, logprobs=0, max_tokens=1, logit_bias=bias, temperature=1.5, min_p=0.2, repetition_penalty=1.5)
    assert changed.get_json()["choices"][0]["logprobs"] == plain
    assert -20 < plain["token_logprobs"][0] < 0
    assert math.isfinite(plain["token_logprobs"][0])


def test_a_frequency_penalty_keeps_tokens_from_coming_again_in_every_mode(serve: Callable[..., Server]) -> None:
    asked = {"max_tokens": 60, "ignore_eos": True, "frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 1.3}
    found = []
    for mode in ("nobatch", "static", "dynamic"):
        server = serve(mode)
        found.append(texts(post(server, **asked)))
        found.append(texts(server.client.post("/v1/completions", json=PLAIN | asked | {"n": 1, "logprobs": 2})))
        server.stop()
    assert all(text == found[0] for text in found)
    tokens = server.loop.engine.tokenizer.encode(found[0][0])  # type: ignore[union-attr]
    assert len(set(tokens)) > 0.8 * len(tokens)


def test_vllms_priority_makes_a_request_deferred_above_0(server: Server) -> None:
    for priority in (-5, 0, 3, 7):
        texts(post(server, priority=priority))
    latency = server.stats()["latency"]
    assert (latency["immediate"]["requests"], latency["deferred"]["requests"]) == (2, 2)


def test_the_answers_id_is_the_callers_where_it_gives_one(server: Server) -> None:
    assert post(server, request_id="bench-7").get_json()["id"] == "cmpl-bench-7"


def test_the_model_is_called_as_the_server_was_told(serve: Callable[..., Server]) -> None:
    server = serve(served_model_name=("gpt-3.5-turbo-instruct", "small"))
    assert [model["id"] for model in server.client.get("/v1/models").get_json()["data"]] == ["gpt-3.5-turbo-instruct", "small"]
    for name in ("small", "gpt-3.5-turbo-instruct"):
        assert post(server, model=name).get_json()["model"] == "gpt-3.5-turbo-instruct"
        assert server.client.get(f"/v1/models/{name}").status_code == 200
    refused = post(server, model="demo")
    assert (refused.status_code, refused.get_json()["error"]["code"]) == (404, "model_not_found")
    assert 'model_name="gpt-3.5-turbo-instruct"' in server.client.get("/metrics").get_data(as_text=True)


def test_the_choices_of_a_prompt_are_one_request_of_vllms_metrics(server: Server) -> None:
    texts(post(server, n=3, best_of=3, temperature=1, prompt=[PROMPT, "The king"]))
    texts(post(server, max_tokens=5, ignore_eos=True))
    lines = server.client.get("/metrics").get_data(as_text=True).splitlines()
    mine = [line for line in lines if 'priority="immediate"' in line]
    found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in mine}
    assert (found["vllm:request_params_n_count"], found["vllm:request_params_n_sum"]) == (3, 7)
    assert found["vllm:request_max_num_generation_tokens_count"] == 3
    assert found["vllm:request_inference_time_seconds_count"] == 7
    for part in ("sum", "count"):
        assert found[f"vllm:time_per_output_token_seconds_{part}"] == found[f"vllm:inter_token_latency_seconds_{part}"]
    assert any(line.startswith("vllm:cache_config_info{") and 'block_size="16"' in line for line in lines)


@pytest.fixture(scope="module")
def process(start_process: Callable[..., ServerProcess]) -> ServerProcess:
    return start_process("dynamic", "--model", "demo", "--dtype", "fp32", "--device", "cpu").wait_until_ready()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_real_client_gets_the_plain_text(client: str, request: pytest.FixtureRequest) -> None:
    python = os.environ.get("BATCHLAB_CLIENTS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", f"import {client}"], capture_output=True, timeout=100).returncode:
        pytest.skip(f"{client} is not installed; BATCHLAB_CLIENTS_PYTHON may name a Python that has it")
    url = request.getfixturevalue("process").url + "/v1"
    run = subprocess.run([python, PROGRAMS, client, url], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found == [found[0]] * len(found)
    assert found[0].startswith(",")
