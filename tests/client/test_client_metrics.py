"""The figures of a run worked out by hand, and the slots of a timeline likewise."""

from __future__ import annotations

from typing import Any

import pytest

from client.answers import Answer, ModeRun
from client.metrics import beside_the_server, lag, summary
from client.shared.figures import distribution
from client.shared.plan import PlannedRequest
from client.tables import table, warnings
from client.timeline import AGAIN, DEFERRED, EMPTY, IMMEDIATE, NO_RECORD, PREFILL, WASTED, Timeline


def planned(index: int, at_s: float, priority: str = "immediate") -> PlannedRequest:
    return PlannedRequest(index, at_s, "Once", 3, priority, index, prompt_tokens=10)


def two_answers() -> ModeRun:
    """The first leaves on time: pieces at 1, 1.5 and 2.5 s, over at 3 s. The second leaves 0.5 s late: one at 4 s, and over."""
    first = Answer(planned(0, 0.0), 0.0, 3.0, tokens=3, prompt_tokens=10, piece_times=(1.0, 1.5, 2.5))
    second = Answer(planned(1, 2.0, "deferred"), 2.5, 4.0, tokens=1, prompt_tokens=10, piece_times=(4.0,))
    lost = Answer(planned(2, 2.0), 2.0, 5.0, error="connection lost")
    return ModeRun("static", [first, second, lost])


def test_times_count_from_the_planned_send() -> None:
    found = summary(two_answers(), "all", {})
    assert found["ttft"]["mean"] == pytest.approx((1.0 + 2.0) / 2)
    assert found["e2el"]["mean"] == pytest.approx((3.0 + 2.0) / 2)
    assert found["tpot"]["mean"] == pytest.approx((2.5 - 1.0) / 2), "of the first alone: one token has no time after it"
    assert found["itl"]["mean"] == pytest.approx((0.5 + 1.0) / 2)


def test_rates_are_per_wall_clock_second_and_leave_out_what_failed() -> None:
    found = summary(two_answers(), "all", {})
    assert (found["requests"], found["ok"], found["errors"], found["wall_s"]) == (3, 2, {"connection lost": 1}, 5.0)
    assert found["request_throughput"] == pytest.approx(2 / 5)
    assert found["output_token_throughput"] == pytest.approx(4 / 5)
    assert found["total_token_throughput"] == pytest.approx(24 / 5)


def test_the_answers_end_held_back_by_a_static_batch_is_in_e2el_and_not_in_tpot() -> None:
    held = Answer(planned(0, 0.0), 0.0, 60.0, tokens=4, piece_times=(1.0, 2.0, 3.0, 4.0))
    run = ModeRun("static", [held], stats={"latency": {"all": {"tpot": {"mean": 1.0}}}})
    found = summary(run, "all", {})
    assert (found["tpot"]["mean"], found["e2el"]["mean"]) == (1.0, 60.0)
    (figure,) = beside_the_server(run)
    assert (figure.name, figure.client, figure.server) == ("TPOT mean", 1.0, 1.0), (
        "one TPOT on the page, and the server's is the same"
    )


def test_the_clock_of_the_rates_starts_with_the_first_planned_send() -> None:
    run = ModeRun("static", [Answer(planned(0, 4.0), 4.0, 6.0, tokens=8), Answer(planned(1, 5.0), 5.0, 8.0, tokens=8)])
    found = summary(run, "all", {})
    assert (found["wall_s"], found["output_token_throughput"]) == (4.0, 4.0)
    assert run.last_s == 8.0


def test_the_rates_of_the_priorities_add_up_to_the_modes() -> None:
    run = two_answers()
    parts = [summary(run, group, {})["output_token_throughput"] for group in run.groups]
    assert run.groups == ["all", "immediate", "deferred"]
    assert parts[0] == pytest.approx(parts[1] + parts[2])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"ttft": 1.5}, 1), ({"ttft": 2.0}, 2), ({"tpot": 0.7}, 1), ({"tpot": 0.7, "e2el": 1.0}, 0), ({"e2el": 3.0}, 2)],
)
def test_goodput_counts_the_requests_that_keep_every_limit(limits: dict[str, float], expected: int) -> None:
    assert summary(two_answers(), "all", limits)["goodput"] == pytest.approx(expected / 5)


def test_the_server_is_compared_from_the_actual_send() -> None:
    run = two_answers()
    run.stats = {"latency": {"all": {name: {"mean": 1.0} for name in ("server_ttft", "tpot", "itl", "e2el")}}}
    found = {figure.name: figure.client for figure in beside_the_server(run)}
    assert found == {
        "TTFT since sent mean": pytest.approx((1.0 + 1.5) / 2),
        "TPOT mean": pytest.approx(1.5 / 2),
        "ITL mean": pytest.approx(0.75),
        "E2EL since sent mean": pytest.approx((3.0 + 1.5) / 2),
    }


@pytest.mark.parametrize(
    ("server", "agrees"), [(0.4, True), (0.382, True), (0.38, False), (0.42, True), (0.43, False), (0.0, False)]
)
def test_figures_agree_within_five_percent_of_the_servers(server: float, agrees: bool) -> None:
    run = two_answers()
    run.stats = {"request_throughput": server}
    (figure,) = beside_the_server(run)
    assert figure.agrees is agrees
    assert ("apart: request throughput 0.4" in table([run], {})) is not agrees


def test_late_sends_are_reported_and_a_p99_of_more_than_ten_milliseconds_is_a_warning() -> None:
    def run(late_s: float) -> ModeRun:
        return ModeRun("static", [Answer(planned(i, 1.0), 1.0 + late_s, 2.0) for i in range(10)])

    assert lag(run(0.02))["p99"] == pytest.approx(0.02)
    assert "sent 20.0 ms (p50), 20.0 ms (p99)" in table([run(0.02)], {})
    assert len(warnings([run(0.011)])) == 1
    assert warnings([run(0.009)]) == []


def test_what_is_said_of_many_modes_is_one_line_that_names_the_worst() -> None:
    def run(mode: str, late_s: float, server: float) -> ModeRun:
        answers = [Answer(planned(i, 1.0), 1.0 + late_s, 2.0, tokens=1) for i in range(10)]
        return ModeRun(mode, answers, stats={"request_throughput": server, "output_token_throughput": 10.0})

    runs = [run("nobatch", 0.011, 10.0), run("static", 0.03, 10.0), run("orca", 0.0, 8.0), run("dynamic", 0.0, 6.0)]
    told = table(runs, {}).splitlines()[-3:]
    assert told == [
        "all 4 modes: sent 30.0 ms (p50), 30.0 ms (p99), at most 30.0 ms after plan in the worst of them, static",
        "nobatch, static: 2 of 2 figures are within 5% of the server's own",
        "orca, dynamic: 1 of 2 figures are within 5% of the server's own; "
        "apart, at worst: request throughput 10, the server's 6 (+67%, dynamic)",
    ]
    (warning,) = warnings(runs)
    said = "p99 30.0 ms after the plan in the worst of them, static; more than 10 is late"
    assert warning.startswith(f"nobatch, static: requests were sent late ({said})")


def test_a_percentile_lies_between_its_two_neighbours() -> None:
    assert distribution([4.0, 1.0, 3.0, 2.0])["p50"] == 2.5
    assert distribution([5.0])["p99"] == 5.0
    assert distribution([])["p50"] is None


# ---- the timeline


def step(end_s: float, cells: str, new: Any = (), gone: Any = (), seconds: float = 1.0) -> dict[str, Any]:
    padding = cells.count("x")
    return {
        "end_s": end_s, "ms": 1e3 * seconds, "cells": cells, "new": list(new), "gone": list(gone),
        "padding": padding, "computed": len(cells.rstrip(".")) - padding,
    }  # fmt: skip


def test_a_slots_colour_is_its_requests_priority_and_what_it_did() -> None:
    first = step(1.0, "pp", new=[[0, 1, "i", "a"], [1, 2, "d", "b"]])
    steps = [first, step(2.0, "dd"), step(3.0, "xd"), step(4.0, ".r", gone=[[0, "f"], [1, "p"]])]
    picture = Timeline(steps, 4).picture(8.0, 3)
    columns = picture.shape[1]
    moments = [picture[:, int(at / 8.0 * columns)].tolist() for at in (0.5, 1.5, 2.5, 3.5, 6.0)]
    assert moments == [
        [PREFILL, PREFILL, EMPTY],
        [IMMEDIATE, DEFERRED, EMPTY],
        [WASTED, DEFERRED, EMPTY],
        [EMPTY, AGAIN, EMPTY],
        [EMPTY, EMPTY, EMPTY],
    ]


def test_a_prompt_shorter_than_a_column_is_still_seen() -> None:
    steps = [step(1.0, "p", new=[[0, 1, "i", "a"]], seconds=1e-5), step(2.0, "d")]
    assert PREFILL in Timeline(steps, 1).picture(1000.0, 1)


def test_a_pause_between_steps_is_empty_and_the_planning_of_a_step_is_not() -> None:
    picture = Timeline([step(1.0, "d"), step(2.01, "d"), step(5.0, "d")], 1).picture(5.0, 1)[0]
    at = [int(moment / 5.0 * len(picture)) for moment in (0.5, 1.005, 1.5, 3.0, 4.5)]
    assert [int(picture[place]) for place in at] == [IMMEDIATE, IMMEDIATE, IMMEDIATE, EMPTY, IMMEDIATE]


def test_padding_is_a_share_of_the_tokens_computed_however_long_the_steps_took() -> None:
    timeline = Timeline([step(1.0, "dx"), step(3.0, "d.", seconds=2.0)], 4)
    assert timeline.padding_share == pytest.approx(1 / 3)
    assert timeline.mean_held == pytest.approx(4 / 3)
    assert timeline.used == 2


def test_what_was_before_the_first_record_is_unknown_and_counts_in_no_average() -> None:
    timeline = Timeline([step(9.0, "dd"), step(10.0, "dd")], 4, from_s=8.0)
    picture = timeline.picture(10.0, 3)
    at = [picture[:, int(moment / 10.0 * picture.shape[1])].tolist() for moment in (0.5, 7.5, 8.5)]
    assert at == [[NO_RECORD] * 3, [NO_RECORD] * 3, [IMMEDIATE, IMMEDIATE, EMPTY]]
    assert NO_RECORD in timeline.codes
    assert timeline.story() == "from 8.0 s on: 2.0 slots held on average, padding 0.0%"


def test_no_steps_are_no_timeline() -> None:
    timeline = Timeline([], 4)
    assert (timeline.used, timeline.padding_share, timeline.mean_held) == (0, 0.0, 0.0)
    assert not timeline.picture(1.0, 2).any()
