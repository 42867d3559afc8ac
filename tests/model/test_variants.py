"""Variants of a model on the real engine: each gives its own tokens whatever ran before, and what cannot be had is said."""

import time
from collections.abc import Sequence

import pytest

from batching.driver import Driver
from batching.policies.deadline import Deadline, DeadlineParams
from batching.policies.dynamic import Dynamic
from batching.policy import Plan, View
from batching.request import Request
from batching.scheduler import Scheduler
from model.checkpoint import CheckpointError
from model.engine import Loaded, load_model, load_variants, make_executor
from model.probe import probe

NAMES = ("demo:3", "demo:2")


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load_model("demo", "pretrained", "int8", "cpu", fall_back=False)  # exact, so that batches change nothing


@pytest.fixture(scope="module")
def cheaper(demo: Loaded) -> list[Loaded]:
    return load_variants(demo, NAMES, "int8", "cpu")


def requests() -> list[Request]:
    return [Request(str(i), [5 * i + 7, 40, 300 + i][: 1 + i % 3], 5 + 3 * i) for i in range(12)]


def outputs(done: Sequence[Request]) -> list[list[int]]:
    assert [req.error for req in done] == [None] * len(done)
    return [req.output for req in done]


def serve(driver: Driver, executor, coming: list[Request]) -> list[Request]:
    for req in coming:
        req.arrival = time.monotonic()
        driver.submit(req)
    while (due := driver.iterate(executor)) is not None:
        time.sleep(max(0.0, due - time.monotonic()))
    return coming


@pytest.fixture(scope="module")
def alone(demo: Loaded, cheaper: list[Loaded]) -> list[list[list[int]]]:
    """What each model gives by itself, in an engine of its own."""
    outs = []
    for loaded in (demo, *cheaper):
        executor, limits = make_executor(loaded, time.monotonic, 8, 64, 64, 0.05)
        outs.append(
            outputs(serve(Driver(Scheduler(Dynamic(), limits), time.monotonic, lambda req: None), executor, requests()))
        )
    return outs


class TakesTurns(Dynamic):
    """A batch on each variant in turn."""

    turn = 0

    def schedule(self, view: View, now: float) -> Plan:
        self.turn += not view.resident
        plan = Plan(view)
        plan.variant = self.turn % len(view.limits.variants)
        plan.release(*view.done)
        for req in view.resident or view.waiting[:3]:
            plan.run(req)
        return plan


def test_variants_that_are_cut_give_other_tokens_than_the_whole_model(alone):
    assert alone[0] != alone[1] != alone[2] != alone[0]


def test_each_variant_gives_the_tokens_it_gives_alone_though_they_take_turns(demo, cheaper, alone):
    executor, limits = make_executor(demo, time.monotonic, 8, 64, 64, 0.05, cheaper)
    assert limits.variants == ("demo", *NAMES)
    done = serve(Driver(Scheduler(TakesTurns(), limits), time.monotonic, lambda req: None), executor, requests())
    assert {req.variant for req in done} == {0, 1, 2}
    assert outputs(done) == [alone[req.variant][i] for i, req in enumerate(done)]


def test_under_deadline_each_request_gets_the_tokens_of_the_variant_that_served_it(demo, cheaper, alone):
    executor, limits = make_executor(demo, time.monotonic, 8, 64, 64, 0.05, cheaper)
    limits, probes = probe(executor, limits)
    driver = Driver(Scheduler(Deadline(DeadlineParams(deadline_ms=60_000)), limits), time.monotonic, lambda req: None)
    for measured in probes:
        driver.learn(measured)
    done = serve(driver, executor, requests())
    assert outputs(done) == [alone[req.variant][i] for i, req in enumerate(done)]


def test_probes_are_taken_of_every_variant(demo, cheaper):
    executor, limits = make_executor(demo, time.monotonic, 8, 64, 64, 0.05, cheaper)
    probes = probe(executor, limits)[1]
    assert [sum(p.variant == variant for p in probes) for variant in range(3)] == [9, 9, 9]


def test_the_kv_memory_is_shared_out_to_the_variants_caches(demo, cheaper):
    """A block is one of each cache: 4 + 3 + 2 layers instead of 4."""
    one = make_executor(demo, time.monotonic, 64, 64, 64, 0.01)[1].num_blocks
    three = make_executor(demo, time.monotonic, 64, 64, 64, 0.01, cheaper)[1].num_blocks
    assert three == pytest.approx(one * 4 / 9, abs=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [("demo", "is the model itself"), ("demo:4", "at most demo:3")],
)
def test_a_variant_that_makes_no_sense_is_one_line(demo: Loaded, name: str, message: str):
    with pytest.raises(ValueError, match=f"^variants: {name} .*{message}"):
        load_variants(demo, [name], "int8", "cpu")


def test_a_variant_whose_weights_cannot_be_had_is_an_error(demo: Loaded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="distilgpt2"):
        load_variants(demo, ["distilgpt2"], "fp32", "cpu")
