"""The figures of a run: against the server's own of the same run, and against what can be counted by hand."""

from statistics import mean

import pytest

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.static import Static
from batching.policy import Limits, Policy
from batching.request import Priority, Request
from batching.scheduler import Scheduler
from simulator.plans import Lengths, Plan, poisson_plan
from simulator.results import Results, Run, engine_figures, everything, table
from simulator.simulation import run
from simulator.step_times import Linear, Model
from simulator.virtual import OpenLoop, Replica, Unwatched, VirtualClock, VirtualExecutor, serve

LIMITS = Limits(max_batch_size=4)
A_SECOND = Model(Linear((1.0, 0.0, 0.0, 0.0, 0.0)), LIMITS, "a second a step")


def plan_of(*requests: tuple[int, int, float, Priority]) -> Plan:
    """(prompt, output, arrival, priority)."""

    def draw():
        for index, (prompt, output, arrival, priority) in enumerate(requests):
            yield Request(str(index), [0] * prompt, output, priority, arrival)

    return Plan(len(requests), draw)


def test_figures_of_two_requests_counted_by_hand():
    found = run(Dynamic, A_SECOND, plan_of((3, 4, 0.0, Priority.IMMEDIATE), (3, 1, 0.5, Priority.DEFERRED)))
    summary = found.summary()
    # The first gets its tokens at 1, 2, 3, 4; the second, there from 0.5 on, joins the step from 1 to 2.
    assert (summary["requests"], summary["ok"], summary["output_tokens"], summary["wall_s"]) == (2, 2, 5, 4.0)
    assert summary["ttft"]["mean"] == pytest.approx((1 + 1.5) / 2)
    assert summary["e2el"]["mean"] == pytest.approx((4 + 1.5) / 2)
    assert summary["tpot"]["p50"] == 1.0, "undefined for the one of a single token"
    assert summary["itl"] == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert summary["output_token_throughput"] == 5 / 4
    assert summary["total_token_throughput"] == 11 / 4
    assert found.summary("deferred")["e2el"]["mean"] == 1.5
    assert found.groups == ("all", "immediate", "deferred")


@pytest.mark.parametrize("policy", [Dynamic, Static])
def test_they_are_the_servers_own_figures_of_the_same_run(policy: type[Policy]):
    results = Results()
    plan = poisson_plan(300, 0.8, Lengths(2, 20), Lengths(1, 12), deferred=0.3)
    replica = Replica(policy(), LIMITS, lambda step: 0.2 + 0.05 * len(step.rows), results.add)
    serve([replica], OpenLoop(plan.draw()))
    columns = results.columns()
    drivers = [replica.driver]
    mine = Run("it", columns, results.errors, engine_figures(drivers, columns.wall_s))
    server = replica.driver.stats.summary(0.0, live=False)
    for group in mine.groups:
        ours = mine.summary(group)
        for name, theirs in (("ttft", "server_ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2el", "e2el")):
            assert ours[name] == pytest.approx(server["latency"][group][theirs])
    assert mine.engine["mean_batch_size"] == server["mean_batch_size"]
    assert mine.engine["padding_share"] == server["padding_share"]
    assert mine.summary()["output_tokens"] == server["total-tokens-handled"]
    for name in ("request_throughput", "output_token_throughput", "total_token_throughput"):
        assert mine.summary()[name] == pytest.approx(server[name]), "both clocks start with the first arrival"
    assert mine.engine["busy_share"] == pytest.approx(server["busy_share"])
    written = everything([mine], "", "")["modes"][0]["answers"]
    assert mean(a["tpot_s"] for a in written if a["tpot_s"]) == pytest.approx(
        server["latency"]["all"]["tpot"]["mean"], abs=1e-5
    )


def test_what_is_refused_is_counted_by_its_reason_and_has_no_times():
    found = run(Dynamic, A_SECOND, plan_of((3, 2, 0.0, Priority.IMMEDIATE), (1000, 500, 0.0, Priority.IMMEDIATE)))
    assert found.summary()["errors"] == {"context_length_exceeded": 1}
    assert found.summary()["requests"] == 2
    assert "1 x context_length_exceeded" in table([found])


def test_a_run_of_which_nothing_was_served_still_has_a_table():
    found = run(Dynamic, A_SECOND, plan_of((1000, 500, 0.0, Priority.IMMEDIATE)))
    assert found.summary()["ttft"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert "dynamic" in table([found])


def test_results_have_every_request_and_the_records_of_the_steps():
    found = run(Dynamic, A_SECOND, plan_of((3, 4, 0.0, Priority.IMMEDIATE), (3, 1, 0.5, Priority.DEFERRED)), watched=True)
    (mode,) = everything([found], "here", "a plan")["modes"]
    first, second = mode["answers"]
    assert (first["request"], first["planned_s"], first["latency_s"], first["tpot_s"]) == (0, 0.0, 4.0, 1.0)
    assert first["piece_times_s"] == [1.0, 2.0, 3.0, 4.0]
    assert (second["priority"], second["tpot_s"], second["ttft_s"]) == ("deferred", None, 1.5)
    assert [step["cells"] for step in mode["steps"]] == ["p", "dp", "d", "d"]
    assert [step["end_s"] for step in mode["steps"]] == [1.0, 2.0, 3.0, 4.0]
    assert mode["slots"] == 4


def test_engines_that_keep_no_records_make_the_same_plans():
    def plans(watched: bool) -> list[tuple]:
        made: list[tuple] = []
        clock = VirtualClock()
        driver = Driver(Scheduler(Dynamic(), LIMITS), clock, lambda req: None, steps=None if watched else Unwatched())
        executor = VirtualExecutor(clock, lambda step: made.append(step.values()) or 1.0)
        for index in range(6):
            driver.submit(Request(str(index), [0] * 5, 3))
        while driver.iterate(executor) is not None:
            pass
        return made

    assert plans(watched=True) == plans(watched=False) != []
