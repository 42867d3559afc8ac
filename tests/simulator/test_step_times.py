"""Step times on paper: the fit against a known law and a brute-force oracle, tables, rooflines, and files that will not do."""

import json
import random
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pytest

from batching.policies.deadline import Deadline
from batching.policies.dynamic import Dynamic
from batching.policies.sarathi import Sarathi
from batching.policy import Limits
from batching.request import Request
from batching.step import Row, Step
from batching.step_time import FEWEST as FEWEST_TO_PREDICT
from batching.step_time import Load, Probe
from model.probe import probe
from simulator.plans import Lengths, poisson_plan
from simulator.results import table
from simulator.simulation import run
from simulator.step_times import GPUS, SHAPES, Linear, Model, ModelError, Roofline, Uneven, errors, find_model, fit, write_model
from simulator.tables import CENG523_VARIANTS, StepTimeTable, Table
from simulator.virtual import VirtualClock, VirtualExecutor, simulate

LAW = Linear((0.004, 0.0003, 0.0009, 2e-6, 5e-7))


def loads(count: int) -> list[Load]:
    rng = random.Random(1)
    rows = [[(1, rng.randint(1, 900)) for _ in range(rng.randint(0, 60))] for _ in range(count)]
    return [
        Load.of([*decodes, (rng.randint(2, 300), rng.randint(0, 500))] if rng.random() < 0.4 else decodes) for decodes in rows
    ]


def measured(noise: float = 0.0, law: Linear = LAW) -> list[Probe]:
    rng = random.Random(2)
    return [Probe(load, law.seconds(load) * (1 + rng.uniform(-noise, noise))) for load in loads(400)]


def step_of(*rows: tuple[int, int]) -> Step:
    """A step of (count, start) rows that all draw a token."""
    reqs = [Request(str(i), [0] * (count + start), 1) for i, (count, start) in enumerate(rows)]
    return Step(1, tuple(Row(req, start, count, 0, 0, True) for req, (count, start) in zip(reqs, rows, strict=True)), 0.0)


def test_the_fit_finds_the_law_of_a_machine():
    assert fit(measured()).coefficients == pytest.approx(LAW.coefficients, rel=1e-6)


def test_with_noise_all_steps_but_a_hiccup_together_take_as_long_as_they_did():
    steps = measured(noise=0.1)
    steps[7] = Probe(steps[7].load, 100 * steps[7].seconds)
    law = fit(steps)
    others = errors(law, steps[:7] + steps[8:])
    assert others.total == pytest.approx(0, abs=1e-9)
    assert others.p99 < 0.15


def test_no_term_is_negative_though_the_data_ask_for_it_and_nothing_fits_better():
    rng = random.Random(3)
    steps = [Probe(load, max(1e-4, 0.05 - 0.0005 * load.decodes + 1e-4 * rng.random())) for load in loads(200)]
    law = fit(steps)
    assert min(law.coefficients) >= 0
    terms = np.array([(1.0, *step.load) for step in steps]) / np.array([step.seconds for step in steps])[:, None]

    def cost(coefficients: np.ndarray) -> float:
        return float(np.square(terms @ coefficients - 1).sum())

    found = np.array(law.coefficients)
    scale = (terms @ found).sum() / np.square(terms @ found).sum()  # the fit's own scale is that of the total
    least = cost(found * scale)
    for _ in range(2000):
        nearby = np.maximum(0, found * scale + np.array([rng.gauss(0, 1) for _ in range(5)]) * [1e-3, 1e-5, 1e-5, 1e-7, 1e-7])
        assert cost(nearby) > least - 1e-3


def test_a_fit_needs_steps():
    with pytest.raises(ModelError, match="at least 10 steps, there are 3"):
        fit(measured()[:3])


def test_a_roofline_is_bound_by_memory_for_one_token_and_by_arithmetic_for_a_long_prompt():
    gpu, medium = GPUS["H100"], SHAPES["gpt2-medium"]
    weights = 12 * 24 * 1024**2 + 50257 * 1024  # 353 million, GPT-2 medium without its position embeddings
    one = Roofline(gpu, medium)(step_of((1, 0)))
    assert one == pytest.approx(2 * weights / gpu.bandwidth, rel=1e-3)
    long = Roofline(gpu, medium)(step_of(*[(1024, 0)] * 64))
    assert long > 2 * 12 * 24 * 1024**2 * 65536 / gpu.flops
    assert Roofline(GPUS["T4"], medium)(step_of((1, 0))) > 10 * one


def test_a_step_of_one_decode_may_have_a_law_of_its_own():
    """As where one token runs through other kernels: 1 ms where the batch's law would say 6."""
    alone = [Load.of([(1, kv)]) for kv in range(10, 400, 10)]
    others = [step for step in measured() if step.load.prefill or step.load.decodes != 1]
    law = fit([*others, *(Probe(load, 0.001 + 1e-7 * load.kv) for load in alone)])
    assert law.single == pytest.approx((0.001, 1e-7))
    assert law.coefficients == pytest.approx(LAW.coefficients, rel=1e-6)
    assert law.seconds(Load.of([(1, 99)])) == pytest.approx(0.00101)
    assert law.seconds(Load.of([(1, 99)] * 2)) == pytest.approx(LAW.seconds(Load.of([(1, 99)] * 2)))
    assert law.seconds(Load.of([(1, 99), (5, 0)])) == pytest.approx(LAW.seconds(Load.of([(1, 99), (5, 0)])))


def test_a_slow_stretch_of_the_machine_delays_what_meets_it_whatever_its_size():
    """Worked by hand: full speed for a second, a third of it for three, full speed for one; then the same again."""
    load = Load.of([(5, 0)])
    uneven = Uneven(Linear((1.0, 0, 0, 0, 0)), [Probe(load, 1.0), Probe(load, 3.0), Probe(load, 1.0)])
    half = Uneven(Linear((0.5, 0, 0, 0, 0)), [Probe(load, 0.5), Probe(load, 0.5), Probe(load, 3.0), Probe(load, 1.0)])

    def seconds(step_time: Uneven, begin: float) -> float:
        return step_time(replace(step_of((5, 0)), planned_at=begin))

    assert seconds(uneven, 0.0) == pytest.approx(1.0)
    assert seconds(uneven, 0.5) == pytest.approx(0.5 + 1.5), "the second half of it at a third of the speed"
    assert seconds(uneven, 4.5) == pytest.approx(1.0), "it begins again after 5 s"
    assert seconds(uneven, 12.5) == pytest.approx(1.5 + 0.5)
    assert seconds(half, 1.0) == pytest.approx(3.0), "half a second of work in the same stretch, now six times as slow"


HALF = Linear(tuple(b / 2 for b in LAW.coefficients))
KINDS = {
    "law": LAW,
    "uneven": Uneven(LAW, [Probe(Load.of([(5, 0)]), 0.01 * (1 + i % 7)) for i in range(50)]),
    "roofline": Roofline(GPUS["T4"], SHAPES["gpt2"]),
    "table": StepTimeTable([Table({1: 10.0, 16: 20.0})]),
    "two variants": lambda step: (LAW, HALF)[step.variant](step),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_simulated_engine_has_measured_what_a_real_one_measures_before_its_first_request(kind: str):
    limits = Limits(max_batch_size=16, variants=("large", "small") if kind == "two variants" else ("default",))
    probes = Model(KINDS[kind], limits, "").probes()
    clock = VirtualClock()
    real = probe(VirtualExecutor(clock, KINDS[kind]), limits)[1]
    assert [(one.load, one.variant) for one in probes] == [(one.load, one.variant) for one in real]
    assert all(one.seconds > 0 for one in probes)
    if kind != "uneven":  # a real one meets another stretch of the machine
        assert [one.seconds for one in probes] == pytest.approx([one.seconds for one in real])
    for variant in range(len(limits.variants)):
        assert sum(one.variant == variant for one in probes) >= FEWEST_TO_PREDICT


def test_sarathi_keeps_its_limit_from_the_first_step_of_a_simulation_on():
    model = Model(LAW, Limits(tbt_slo_ms=60.0), "")
    found = run(Sarathi, model, poisson_plan(20, inf, Lengths(300, 400), Lengths(8, 8)), watched=True)
    assert found.steps is not None
    assert len(found.steps) > 30
    assert 45 < max(step["ms"] for step in found.steps[:8]) <= 60


def test_a_model_file_gives_back_what_was_written(tmp_path: Path):
    path = tmp_path / "engine.json"
    write_model(path, LAW, Limits(max_batch_size=7, num_blocks=99), "a machine")
    model = find_model(str(path))
    assert (model.step_time, model.limits, model.about) == (LAW, Limits(max_batch_size=7, num_blocks=99), "a machine")
    answered = simulate(Dynamic(), model.limits, [Request("a", [0] * 5, 1)], model.step_time)
    assert answered[0].answered_at == pytest.approx(LAW.seconds(Load.of([(5, 0)])))


def test_a_model_file_keeps_the_law_of_single_decodes(tmp_path: Path):
    law = Linear(LAW.coefficients, (0.001, 1e-7))
    write_model(tmp_path / "engine.json", law, Limits(), "a machine")
    assert find_model(str(tmp_path / "engine.json")).step_time == law


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"single_s": [0.1]}, "single_s must be two numbers"),
        ({"single_s": [0, 0]}, "not both 0"),
        ({"single_s": ["1", 0]}, "single_s must be two numbers"),
        ({"model": 2}, 'must be an object with "model": 1'),
        ({"coefficients_s": [1, 2]}, "coefficients_s must be five numbers from 0 on"),
        ({"coefficients_s": [0] * 5}, "not all 0"),
        ({"coefficients_s": [-1, 0, 0, 0, 0]}, "numbers from 0 on"),
        ({"limits": {"slots": 3}}, "limits has no slots; there are"),
        ({"limits": {"max_batch_size": 0}}, "limits: max_batch_size: must be at least 1"),
        ({"limits": {"num_blocks": "many"}}, "limits: .* not supported between instances of 'str' and 'int'"),
        ({"limits": [1]}, "limits must be an object"),
        ({"limits": {"variants": ["large", "small"]}}, "limits: variants: one law is that of one variant, not of 2"),
    ],
)
def test_a_model_file_that_will_not_do_is_named_with_its_field(tmp_path: Path, change: dict, told: str):
    path = tmp_path / "engine.json"
    write_model(path, LAW, Limits(), "")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    with pytest.raises(ModelError, match=told) as raised:
        find_model(str(path))
    assert str(path) in str(raised.value)


def test_a_table_of_several_columns_is_read_by_the_name_of_one(tmp_path: Path):
    path = tmp_path / "service.csv"
    path.write_text("# from a paper\nbatch,small,large\n1,10,20\n2,15,32\n")
    model = find_model(f"{path}:large")
    assert [model.step_time(step_of(*[(1, 5)] * rows)) for rows in (1, 2)] == [0.02, 0.032]
    assert model.limits.max_batch_size == 2
    for name, told in ((str(path), "say which column"), (f"{path}:huge", "there are small, large")):
        with pytest.raises(ModelError, match=told):
            find_model(name)
    path.write_text("batch,ms\n1,ten\n")
    with pytest.raises(ModelError, match="every line must have a batch size"):
        find_model(str(path))
    path.write_bytes("\ufeffbatch,ms\r\n1,10\r\n".encode())  # as a spreadsheet writes it
    assert find_model(str(path)).step_time(step_of((1, 5))) == 0.01
    path.write_bytes("batch,ms \u00b5\r\n1,10\r\n".encode("latin-1"))
    with pytest.raises(ModelError, match="is not CSV in UTF-8"):
        find_model(str(path))


def test_the_ceng523_project_is_a_model_of_three_variants_or_one_of_them_alone():
    model = find_model("ceng523")
    assert model.limits.variants == CENG523_VARIANTS
    assert model.limits.max_batch_size == 64
    steps = [replace(step_of(*[(1, 0)] * 8), variant=variant) for variant in range(3)]
    assert [model.step_time(step) for step in steps] == pytest.approx([0.047, 0.037, 0.022]), "with communication and the rest"
    alone = find_model("ceng523:llm_3_ms")
    assert (alone.limits.variants, alone.step_time(steps[0])) == (("LLM-3",), pytest.approx(0.022))
    with pytest.raises(ModelError, match="ceng523:communication_ms: there is no such variant; there are llm_1_ms, llm_2_ms"):
        find_model("ceng523:communication_ms")


def test_in_the_ceng523_project_a_policy_chooses_the_variant_by_what_it_knows_of_each():
    late = partial(Deadline.from_arguments, {"deadline_ms": 100})
    found = run(late, find_model("ceng523"), poisson_plan(2000, 350.0, Lengths(1, 1), Lengths(1, 1)))
    served = found.engine["requests_by_variant"]
    assert sum(served.values()) == len(found.columns.output) > 1900
    assert served["2"] > served["1"] > 0
    assert f"{served['2']} x LLM-3" in table([found])


def test_an_unknown_model_is_told_what_there_is():
    with pytest.raises(ModelError, match=r"no such name; there are .*H200:SHAPE"):
        find_model("gpt5")
    with pytest.raises(ModelError, match="needs a shape, as in T4:gpt2-medium"):
        find_model("T4:gpt5")
