"""The hand-worked schedules of the papers, out of the real scheduler in virtual time."""

import pytest

from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policies.flover import Flover
from batching.policies.mixed import Mixed
from batching.policies.orca import Orca
from batching.policies.static import Static, StaticParams
from batching.policy import Limits
from batching.request import Priority, Request
from batching.step import Step
from simulator.virtual import simulate
from tests.told import Plans

# Example E1 (the form of tinyorca): id, arrival, output, and the maximum that Orca reserves, prompt included.
E1 = [("x1", 0, 2, 4), ("x2", 0, 5, 8), ("x3", 1, 2, 4), ("x4", 1, 3, 4)]


def e1_requests() -> list[Request]:
    return [
        Request(
            name, [0], most - 1, arrival=arrival, stop=lambda req, output=output: len(req.output) == output, output_len=output
        )
        for name, arrival, output, most in E1
    ]


def limits(**changes: int) -> Limits:
    return Limits(
        **{"max_batch_size": 2, "token_budget": 64, "max_context": 64, "block_size": 1, "num_blocks": 1000, **changes}
    )


def answer_times(requests: list[Request]) -> dict[str, float | None]:
    return {req.id: req.answered_at for req in requests}


def test_static_answers_a_whole_batch_when_its_longest_output_is_finished():
    steps: list[Step] = []
    answered = simulate(Static(), limits(), e1_requests(), on_step=steps.append)
    assert answer_times(answered) == {"x1": 5, "x2": 5, "x3": 8, "x4": 8}
    assert sum(step.num_padding for step in steps) == 4, "wasted slot-steps"


@pytest.mark.parametrize(("batch", "kv_slots"), [(2, 1000), (3, 12)], ids=["batch 2", "batch 3, 12 KV slots"])
def test_orca_answers_each_request_when_it_has_finished(batch: int, kv_slots: int):
    answered = simulate(Orca(), limits(max_batch_size=batch, num_blocks=kv_slots), e1_requests())
    assert answer_times(answered) == {"x1": 2, "x2": 5, "x3": 4, "x4": 7}


def test_reservation_and_not_memory_in_use_blocks_orcas_queue():
    steps: list[Step] = []
    simulate(Orca(), limits(max_batch_size=3, num_blocks=12), e1_requests(), on_step=steps.append)
    second = steps[1]
    assert [row.req.id for row in second.rows] == ["x1", "x2"], "x3 waits though only 4 of 12 slots are written"


def test_dynamic_answers_as_orca_does_while_memory_is_plenty():
    answered = simulate(Dynamic(), limits(), e1_requests())
    assert answer_times(answered) == {"x1": 2, "x2": 5, "x3": 4, "x4": 7}


@pytest.mark.parametrize(("lanes", "times"), [(2, (2, 5, 4, 7)), (1, (2, 7, 4, 7))], ids=["side by side", "taking turns"])
def test_flover_prefills_x3_and_x4_beside_the_decodes_of_x2_or_between_them(lanes: int, times: tuple[int, ...]):
    answered = simulate(Flover(), limits(lanes=lanes), e1_requests())
    assert answer_times(answered) == dict(zip(("x1", "x2", "x3", "x4"), times, strict=True))


@pytest.mark.parametrize(
    ("mode", "times", "wasted"), [("static", (5, 5, 8, 8), 4), ("sequence", (2, 7, 2, 7), 2)], ids=["static", "sequence"]
)
def test_sequence_scheduling_puts_the_short_outputs_of_a_window_together(mode: str, times: tuple[int, ...], wasted: int):
    """E1 with all four there at the start: x1 and x3 (2 tokens each), then x4 and x2 (3 and 5)."""
    steps: list[Step] = []
    requests = e1_requests()
    for req in requests:
        req.arrival = 0
    policy = POLICIES[mode].from_arguments({"batch_timeout_ms": 0})
    answered = simulate(policy, limits(), requests, on_step=steps.append)
    assert answer_times(answered) == dict(zip(("x1", "x2", "x3", "x4"), times, strict=True))
    assert sum(step.num_padding for step in steps) == wasted


def test_dynamic_preempts_the_last_request_when_blocks_run_out_and_recomputes_it():
    steps: list[Step] = []
    four_blocks = limits(block_size=4, num_blocks=4)
    requests = [Request("A", [0] * 7, 5), Request("B", [0] * 7, 5)]
    told = Plans()
    answered = simulate(Dynamic(), four_blocks, requests, on_step=steps.append, on_plan=told)
    plans = [{row.req.id: row.count for row in step.rows} for step in steps]
    assert plans[:3] == [{"A": 7, "B": 7}, {"A": 1, "B": 1}, {"A": 1}]
    assert told[2].preempted == ("B",)
    after = [plan for plan in plans[3:] if "B" in plan]
    assert after[0] == {"B": 9}, "B recomputes its prompt and what it had generated"
    assert plans[3:5] == [{"A": 1}, {"A": 1}], "B needs ceil(9/4) = 3 blocks, so it waits for A to end"
    assert [req.output for req in answered] == [[7, 8, 9, 10, 11], [7, 8, 9, 10, 11]]


def test_static_starts_an_unfilled_batch_when_the_first_request_has_waited_for_the_time_out():
    steps: list[Step] = []
    requests = [Request("a", [0], 1, arrival=1.0), Request("b", [0], 1, arrival=1.04), Request("c", [0], 1, arrival=1.06)]
    policy = Static(StaticParams(batch_timeout_ms=50))
    simulate(policy, limits(max_batch_size=8), requests, lambda step: 0.001, on_step=steps.append)
    assert [[row.req.id for row in step.rows] for step in steps] == [["a", "b"], ["c"]]
    assert steps[0].planned_at == pytest.approx(1.05)
    assert steps[1].planned_at == pytest.approx(1.11)


def test_static_starts_a_full_batch_without_waiting():
    steps: list[Step] = []
    requests = [Request(name, [0], 1, arrival=1.0) for name in "ab"]
    simulate(Static(), limits(), requests, lambda step: 0.001, on_step=steps.append)
    assert steps[0].planned_at == 1.0


def test_static_computes_its_rectangle_of_padded_prompts_and_padded_outputs():
    steps: list[Step] = []
    requests = [Request("short", [0] * 2, 1), Request("long", [0] * 6, 3)]
    simulate(Static(), limits(), requests, on_step=steps.append)
    shape = [[(row.req.id, row.count, row.pad, row.span) for row in step.rows] for step in steps]
    assert shape == [
        [("short", 2, 4, 0), ("long", 6, 0, 0)],
        [("long", 1, 0, 7), ("short", 0, 1, 7)],
        [("long", 1, 0, 8), ("short", 0, 1, 8)],
    ]


def test_dynamic_gives_decodes_their_token_and_chunks_prompts_into_what_is_left():
    steps: list[Step] = []
    requests = [Request("d", [0], 9), Request("P", [0] * 20, 2, arrival=0.5), Request("Q", [0] * 5, 1, arrival=0.5)]
    simulate(Dynamic(), limits(max_batch_size=4, token_budget=8), requests, on_step=steps.append)
    plans = [{row.req.id: row.count for row in step.rows} for step in steps]
    assert plans[1:5] == [{"d": 1, "P": 7}, {"d": 1, "P": 7}, {"d": 1, "P": 6, "Q": 1}, {"d": 1, "P": 1, "Q": 4}]


def test_nobatch_runs_one_request_at_a_time():
    steps: list[Step] = []
    answered = simulate(POLICIES["nobatch"](), limits(), e1_requests(), on_step=steps.append)
    assert all(len(step.rows) == 1 for step in steps)
    assert answer_times(answered) == {"x1": 2, "x2": 7, "x3": 9, "x4": 12}


def deferred(name: str, deadline: float | None = None, arrival: float = 0.0, prompt: int = 1) -> Request:
    return Request(name, [0] * prompt, 6, Priority.DEFERRED, arrival, deadline)


def test_an_immediate_request_takes_the_seat_of_the_deferred_one_with_the_latest_deadline():
    steps: list[Step] = []
    requests = [deferred("soon", 50.0), deferred("late", 90.0), Request("now", [0], 2, arrival=1.5)]
    plans = Plans()
    answered = simulate(Mixed(), limits(), requests, on_step=steps.append, on_plan=plans)
    assert plans[2].preempted == ("late",)
    assert [row.req.id for row in steps[2].rows] == ["now", "soon"]
    assert [req.id for req in answered] == ["now", "soon", "late"]
    assert all(req.error is None for req in answered)


def test_an_immediate_request_takes_the_blocks_of_a_deferred_one():
    steps: list[Step] = []
    requests = [deferred("batch job", prompt=7), Request("now", [0] * 6, 2, arrival=0.5)]
    plans = Plans()
    simulate(Mixed(), limits(num_blocks=12), requests, on_step=steps.append, on_plan=plans)
    assert plans[1].preempted == ("batch job",)
    assert [row.req.id for row in steps[1].rows] == ["now"]


def test_deferred_requests_run_in_the_order_of_their_deadlines():
    requests = [deferred("c", 90.0), deferred("a", 50.0), deferred("b", 60.0), deferred("d")]
    answered = simulate(Mixed(), limits(max_batch_size=1), requests)
    assert [req.id for req in answered] == ["a", "b", "c", "d"]
