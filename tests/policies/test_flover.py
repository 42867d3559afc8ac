"""Flover: prompts beside the decodes instead of between them, and slots that stay contiguous."""

import pytest

from batching.policies import POLICIES
from batching.policies.flover import Flover, moves
from batching.policy import Limits
from batching.request import Lane, Request
from batching.step import Step
from simulator.virtual import simulate
from tests.told import Plans


def limits(lanes: int, seats: int = 8, blocks: int = 1000) -> Limits:
    return Limits(max_batch_size=seats, max_context=512, block_size=1, num_blocks=blocks, lanes=lanes)


def prompt_takes_its_length(step: Step) -> float:
    """A second for a step, or for each token of its prompts."""
    return float(max(row.count for row in step.rows))


def gaps(req: Request) -> list[float]:
    return [later - earlier for earlier, later in zip(req.token_times, req.token_times[1:], strict=False)]


@pytest.mark.parametrize(("mode", "lanes", "longest_gap"), [("flover", 2, 1.0), ("flover", 1, 101.0), ("orca", 1, 100.0)])
def test_only_a_lane_of_its_own_keeps_a_long_prompt_from_delaying_decodes(mode: str, lanes: int, longest_gap: float):
    decodes, prompt = Request("decodes", [0], 300), Request("prompt", [0] * 100, 5, arrival=3.5)
    simulate(POLICIES[mode](), limits(lanes), [decodes, prompt], prompt_takes_its_length)
    assert max(gaps(decodes)) == longest_gap
    assert prompt.token_times[0] == pytest.approx(104, abs=1), "at full speed, beside the decodes or between them"


def test_a_step_holds_prefills_only_or_decodes_only_and_says_in_which_lane():
    steps: list[Step] = []
    requests = [Request(str(i), [0] * (1 + 5 * i), 4 + i, arrival=float(i)) for i in range(8)]
    simulate(Flover(), limits(lanes=2), requests, prompt_takes_its_length, on_step=steps.append)
    for step in steps:
        prefills = {row.start < row.req.prompt_len for row in step.rows}
        assert prefills == {step.lane is Lane.PREFILL}


def test_where_lanes_take_turns_every_second_step_is_the_decodes():
    steps: list[Step] = []
    requests = [Request("decodes", [0], 20), *(Request(str(i), [0] * 9, 1, arrival=2 * i + 0.5) for i in range(6))]
    simulate(Flover(), limits(lanes=1), requests, on_step=steps.append)
    assert ["p" if step.rows[0].start == 0 else "d" for step in steps[:9]] == list("pdpdpdpdp")
    assert {step.lane for step in steps} == {Lane.MAIN}


@pytest.mark.parametrize(
    ("live", "needed"),
    [
        ([1, 0, 1, 1, 0, 1], [(5, 1)]),
        ([1, 1, 1], []),
        ([0, 0, 0], []),
        ([0, 0, 1, 1], [(2, 0), (3, 1)]),
        ([0, 1, 1, 1], [(3, 0)]),
        ([1, 1, 0, 0], []),
        ([], []),
    ],
    ids=str,
)
def test_compaction_takes_the_fewest_moves(live: list[int], needed: list[tuple[int, int]]):
    assert moves([bool(alive) for alive in live]) == needed


def test_when_requests_end_the_last_ones_move_into_their_slots():
    steps: list[Step] = []
    requests = [Request(name, [0], most) for name, most in zip("abcdef", (5, 2, 5, 5, 2, 5), strict=True)]
    plans = Plans()
    simulate(Flover(), limits(lanes=2), requests, on_step=steps.append, on_plan=plans)
    assert ["".join(row.req.id for row in step.rows) for step in steps] == ["abcdef", "abcdef", "afcd", "afcd", "afcd"]
    assert [plan.reasons for plan in plans] == [{}, {}, {"f": "moved from slot 5 to slot 1"}, {}, {}]


def test_memory_is_reserved_for_the_longest_output_and_the_head_of_the_line_waits_for_it():
    steps: list[Step] = []
    requests = [Request("a", [0] * 4, 7), Request("b", [0] * 8, 3), Request("c", [0], 1)]
    plans = Plans()
    answered = simulate(Flover(), limits(lanes=2, blocks=15), requests, on_step=steps.append, on_plan=plans)
    assert [row.req.id for row in steps[0].rows] == ["a"], "10 of 15 columns are a's, though it has written 4"
    assert [req.id for req in answered] == ["a", "c", "b"]
    assert plans[0].reasons["b"] == "waits: too few KV blocks are free"
