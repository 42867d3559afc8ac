"""The machine's limits: which steps a workload takes, and times between those that were measured."""

import pytest
import torch

from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Limits
from batching.scheduler import Scheduler
from benchmarks.limits import BATCHES, Products, step_sizes
from benchmarks.roofline import Meter
from model.checkpoint import GPTConfig, random
from model.gpt import GPT
from model.linear import lay_out


@pytest.fixture(scope="module")
def model() -> GPT:
    model = random(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64), torch.float32, torch.device("cpu"))
    lay_out(model, "fp32")
    return model


def test_the_steps_of_a_workload_compute_each_prompt_and_output_token_once_but_the_last() -> None:
    jobs = [([1] * 20, 5), ([1] * 3, 9)]
    for policy in (Dynamic, NoBatch):
        sizes = step_sizes(Scheduler(policy(), Limits()), jobs)
        assert sum(tokens for tokens, _ in sizes) == 20 + 4 + 3 + 8
        assert sum(sampled for _, sampled in sizes) == 5 + 9
    assert len(sizes) == 5 + 9, "one request after the other"


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_products_between_two_measured_batches_take_a_time_between(model: GPT, dtype: str) -> None:
    if dtype == "int8":
        model = random(model.config, torch.float32, torch.device("cpu"))
        lay_out(model, "int8")
    products = Products(model, dtype)
    products.measure(runs=1)
    for kind in ("library", "laid out"):
        assert sorted(products.layers[kind]) == list(BATCHES)
        products.layers[kind] = {size: float(size) for size in BATCHES}
        products.heads[kind] = dict.fromkeys(BATCHES, 2.0)
    assert products.seconds(100, 3) == pytest.approx(102)
    assert products.seconds(1024, 0) == pytest.approx(1024), "no row is sampled, and beyond the largest in proportion"
    assert products.replay([(5, 1), (600, 0), (1, 1)], kind) > 0, "also of a step that samples nothing"
    products.layers["laid out"] = dict.fromkeys(BATCHES, 1.0)
    assert products.seconds(64, 1) == pytest.approx(3), "the faster of both"


def test_the_meter_counts_what_is_inside_a_part_and_puts_everything_back(model: GPT) -> None:
    layer, x = model.lm_head, torch.ones(1, 32)
    before = type(layer).forward
    meter = Meter()
    with meter:
        layer(x)
    layer(x)
    assert type(layer).forward is before
    assert list(meter.seconds) == ["products"]
