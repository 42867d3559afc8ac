"""POST /inference as a caller sees it, on the real demo model. No test knows what the model writes."""

import time
from collections.abc import Callable

import pytest

from batching.loop import Engine
from batching.policies import POLICIES

from .conftest import Server

PROMPT = "Once upon a time"


def test_the_completion_starts_with_the_prompt_and_goes_on(server: Server) -> None:
    completion = server.ask(PROMPT, 12).get_json()["completion"]
    assert completion.startswith(PROMPT)
    assert len(completion) > len(PROMPT)


def test_the_answer_has_the_contracts_keys(server: Server) -> None:
    answer = server.ask(PROMPT, 5).get_json()
    assert list(answer) == ["completion", "num_tokens", "finish_reason", "ttft", "latency", "mode"]
    assert (answer["num_tokens"], answer["finish_reason"], answer["mode"]) == (5, "length", "dynamic")
    assert 0 < answer["ttft"] <= answer["latency"]


@pytest.mark.parametrize("mode", POLICIES)
def test_every_mode_generates_exactly_num_tokens(serve: Callable[..., Server], mode: str) -> None:
    server = serve(mode)
    asked = [1, 2, 7, 16, 17]
    answers = [future.result() for future in [server.later(PROMPT, n) for n in asked]]
    assert [(answer.status_code, answer.get_json()["num_tokens"]) for answer in answers] == [(200, n) for n in asked]
    stats = server.stats()
    assert stats["total-tokens-handled"] == sum(asked)
    assert stats["mode"] == mode


def test_the_original_protocol_is_unchanged(server: Server) -> None:
    began = time.monotonic()
    answers = [future.result() for future in [server.later(PROMPT, 20) for _ in range(4)]]
    wall_clock = time.monotonic() - began
    assert all(answer.get_json()["completion"].startswith(PROMPT) for answer in answers)

    stats = server.stats()
    assert {"latency-per-token", "throughput", "total-tokens-handled", "total-elapsed-time"} <= set(stats)
    assert stats["total-tokens-handled"] == 80
    assert stats["throughput"] == pytest.approx(80 / stats["total-elapsed-time"])
    assert 0 < stats["total-elapsed-time"] <= wall_clock  # not the sum of what the four took
    latencies = [answer.get_json()["latency"] / 20 for answer in answers]
    assert stats["latency-per-token"] == pytest.approx(sum(latencies) / 4)


def test_stats_say_what_is_served_and_how(server: Server) -> None:
    server.ask(num_tokens=3)
    stats = server.stats()
    served = {"model": "demo", "vocabulary": "demo", "device": "cpu", "dtype": "fp32", "mode": "dynamic"}
    assert served.items() <= stats.items()
    assert stats["weights"]
    assert stats["last_policy_failure"] is None
    for priority in ("all", "immediate", "deferred"):
        assert set(stats["latency"][priority]["e2el"]) == {"mean", "p50", "p90", "p99"}
    assert stats["latency"]["immediate"]["requests"] == 1


def test_reset_forgets_what_was_counted(server: Server) -> None:
    server.ask(num_tokens=3)
    assert server.client.post("/stats/reset").status_code == 200
    stats = server.stats()
    assert stats["total-tokens-handled"] == stats["requests_finished"] == stats["total-elapsed-time"] == 0
    server.ask(num_tokens=2)
    assert server.stats()["total-tokens-handled"] == 2


def test_temperature_0_is_greedy_whatever_the_seed(server: Server) -> None:
    texts = {server.ask(PROMPT, 20, temperature=0, seed=seed).get_json()["completion"] for seed in (1, 2, 3)}
    assert len(texts) == 1


def test_a_temperature_near_0_is_as_good_as_0(server: Server) -> None:
    greedy = server.ask(PROMPT, 20, temperature=0).get_json()["completion"]
    assert server.ask(PROMPT, 20, temperature=1e-300).get_json()["completion"] == greedy


def test_top_k_1_is_greedy(server: Server) -> None:
    greedy = server.ask(PROMPT, 20, temperature=0).get_json()["completion"]
    assert server.ask(PROMPT, 20, temperature=2, top_k=1, seed=5).get_json()["completion"] == greedy


def test_a_seed_reproduces_the_text_and_another_gives_another(server: Server) -> None:
    def text(seed: int) -> str:
        completion: str = server.ask(PROMPT, 40, temperature=1.5, top_k=0, seed=seed).get_json()["completion"]
        return completion

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_without_a_seed_texts_differ(server: Server) -> None:
    texts = {server.ask(PROMPT, 40, temperature=1.5, top_k=0).get_json()["completion"] for _ in range(3)}
    assert len(texts) == 3


def test_the_text_is_cut_before_a_stop_string(server: Server) -> None:
    text = server.ask(PROMPT, 40, temperature=0).get_json()["completion"].removeprefix(PROMPT)
    stop = next(text[i : i + 3] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 3])
    answer = server.ask(PROMPT, 40, temperature=0, stop=["\x00 never written", stop]).get_json()
    assert answer["completion"] == PROMPT + text[: text.find(stop)]
    assert answer["finish_reason"] == "stop"
    assert answer["num_tokens"] < 40


def test_a_stop_string_in_the_prompt_stops_nothing(server: Server) -> None:
    answer = server.ask("\x01\x02\x03", 5, temperature=0, stop="\x01\x02\x03").get_json()
    assert (answer["num_tokens"], answer["finish_reason"]) == (5, "length")


@pytest.mark.parametrize("prompt", ["\x00", " ", "a\r\nb", "<|endoftext|>", "日本語 ✨ é", "\U0010ffff", "word " * 60])
def test_any_text_is_a_prompt(server: Server, prompt: str) -> None:
    answer = server.ask(prompt, 3)
    assert answer.status_code == 200
    assert answer.get_json()["completion"].startswith(prompt)


def test_prompt_and_output_may_fill_the_context(server: Server, engine: Engine) -> None:
    prompt = "a b"
    while len(engine.tokenizer.encode(prompt)) < engine.limits.max_context - 8:
        prompt += " c"
    room = engine.limits.max_context - len(engine.tokenizer.encode(prompt))
    assert server.ask(prompt, room).get_json()["num_tokens"] == room
    assert server.ask(prompt, room + 1).status_code == 400


def test_every_optional_field_is_taken_at_its_limits(server: Server) -> None:
    low = {"temperature": 0, "top_k": 0, "top_p": 1e-6, "seed": -(2**63), "stop": None, "priority": "immediate"}
    high = {"temperature": 2, "top_p": 1, "seed": 2**63 - 1, "stop": ["z" * 100] * 4, "priority": "deferred", "deadline_s": 60}
    assert [server.ask(num_tokens=2, **fields).status_code for fields in (low, high)] == [200, 200]
