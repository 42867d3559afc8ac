"""GET /metrics: what Prometheus reads there, against what happened; and the Grafana dashboard that is drawn from it."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from api.metrics import Snapshot
from app import create_app
from batching.driver import Driver, describe_policy
from batching.loop import BatchingLoop, Engine
from batching.policies import POLICIES
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError
from batching.scheduler import Scheduler
from batching.totals import REQUEST_S
from jobs.store import Store
from simulator.virtual import VirtualClock, VirtualExecutor

from .conftest import PATIENCE_S, SETTINGS, Gate, Server
from .server_process import wait_for

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "batchlab.json").read_text())


class Scrape:
    """The samples of one answer. `found[name]` sums over all labels, `found.get(name, label=value)` over those that have it.
    `growing`: those that may never go down, counters and all of a histogram."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)
        self.samples = {(s.name, tuple(s.labels.items())): s.value for f in self.families for s in f.samples}
        kinds = {s.name: f.type for f in self.families for s in f.samples if not s.name.startswith("process_")}
        self.growing = {key: value for key, value in self.samples.items() if kinds.get(key[0]) in ("counter", "histogram")}

    def get(self, name: str, **labels: str) -> float:
        found = [value for (known, has), value in self.samples.items() if known == name and labels.items() <= dict(has).items()]
        assert found, f"there is no {name} with {labels}"
        return sum(found)

    def __getitem__(self, name: str) -> float:
        return self.get(name)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def scrape(server: Server) -> Scrape:
    response = server.client.get("/metrics")
    assert response.status_code == 200
    return Scrape(parse(response.text))


def assert_none_fell(before: Scrape, after: Scrape) -> None:
    fallen = {
        key: (value, after.growing.get(key)) for key, value in before.growing.items() if after.growing.get(key, -1) < value
    }
    assert not fallen


# Over a real server.


def test_the_figures_are_those_of_stats(serve: Callable[..., Server], gate: Gate) -> None:
    server = serve(max_batch_size=4, max_queue=6)
    gate.close()  # so that they run together, and some wait
    answers = [server.later(num_tokens=9)]
    server.wait_for_load(running=1, queue_depth=0)
    answers += [server.later("The king", 3 + i, priority="deferred" if i % 2 else "immediate") for i in range(5)]
    answers.append(server.later("It was the best of times", 200, stop=" ", temperature=0))
    server.wait_for_load(running=1, queue_depth=6)
    assert scrape(server)["vllm:num_requests_waiting"] == 6
    assert server.ask().status_code == 429
    gate.open()
    assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 7
    stats, found = server.stats(), scrape(server)
    assert found["vllm:generation_tokens_total"] == stats["total-tokens-handled"]
    assert found["batchlab_steps_total"] == stats["steps"]
    assert found["batchlab_computed_tokens_total"] == stats["tokens_computed"]
    assert found["vllm:num_preemptions_total"] == stats["preemptions"]
    assert found.get("batchlab_request_errors_total", code="queue_full") == stats["errors"]["queue_full"] == 1
    assert found.get("vllm:request_success_total", finished_reason="length") == 6
    assert found.get("vllm:request_success_total", finished_reason="stop") == 1
    assert found["vllm:kv_cache_usage_perc"] == stats["kv_use"] == 0
    assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (0, 0)
    assert found["batchlab_sequence_slots"] == 4
    assert found["batchlab_kv_blocks"] == stats["kv_blocks"]
    assert found["batchlab_tbt_limit_seconds"] == pytest.approx(stats["tbt_slo_ms"] / 1e3)
    assert found["batchlab_batch_size_sum"] == pytest.approx(stats["mean_batch_size"] * stats["steps"])
    for kind in ("immediate", "deferred"):
        latency = stats["latency"][kind]
        assert found.get("vllm:request_success_total", priority=kind) == latency["requests"]
        for name, key in (
            ("vllm:time_to_first_token_seconds", "server_ttft"),
            ("vllm:request_time_per_output_token_seconds", "tpot"),
            ("vllm:inter_token_latency_seconds", "itl"),
            ("vllm:e2e_request_latency_seconds", "e2el"),
        ):
            mean = found.get(f"{name}_sum", priority=kind) / found.get(f"{name}_count", priority=kind)
            assert mean == pytest.approx(latency[key]["mean"]), (kind, key)


def test_the_histograms_of_requests_count_those_that_finished(server: Server) -> None:
    for num_tokens in (1, 2, 30):
        assert server.ask(num_tokens=num_tokens).status_code == 200
    found = scrape(server)
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_generation_tokens", "request_params_max_tokens",
    ):  # fmt: skip
        assert found[f"vllm:{name}_count"] == found["vllm:request_success_total"] == 3, name
        assert found.get(f"vllm:{name}_bucket", le="+Inf") == 3, name
    assert found["vllm:request_time_per_output_token_seconds_count"] == 2, "one of them had a single token"
    assert found["vllm:inter_token_latency_seconds_count"] == 1 + 29
    assert found["vllm:request_generation_tokens_sum"] == found["vllm:generation_tokens_total"] == 33
    assert found["vllm:request_prompt_tokens_sum"] == found["vllm:prompt_tokens_total"]
    assert found["vllm:iteration_tokens_total_count"] == found["batchlab_batch_size_count"] == found["batchlab_steps_total"]


def test_nothing_falls_when_statistics_are_reset_and_the_mode_is_switched(server: Server) -> None:
    seen = [scrape(server)]
    for mode in (*POLICIES, "dynamic"):
        assert server.client.put("/mode", json={"mode": mode}).status_code == 200
        assert server.ask(num_tokens=4).status_code == 200
        seen.append(scrape(server))
        assert server.client.post("/stats/reset").status_code == 200
        seen.append(scrape(server))
    for before, after in pairwise(seen):
        assert_none_fell(before, after)
    assert seen[-1]["vllm:request_success_total"] == len(POLICIES) + 1
    assert server.stats()["requests_finished"] == 0


def test_the_mode_in_force_is_the_one_that_is_1(server: Server) -> None:
    assert server.client.put("/mode", json={"mode": "mixed", "params": {"tbt_slo_ms": 250}}).status_code == 200
    found = scrape(server)
    assert {name: found.get("batchlab_mode", mode=name) for name in POLICIES} == {name: name == "mixed" for name in POLICIES}
    assert found["batchlab_tbt_limit_seconds"] == 0.25, "the policy's own"


def test_a_batch_is_unfinished_until_it_has_ended(server: Server, gate: Gate) -> None:
    gate.close()
    body = {"model": "demo", "prompt": "The king", "max_tokens": 2}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    data = {"purpose": "batch", "file": (io.BytesIO(line.encode()), "lines.jsonl")}
    file = server.client.post("/v1/files", data=data).get_json()["id"]
    wanted = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
    assert server.client.post("/v1/batches", json=wanted).status_code == 200
    assert scrape(server)["batchlab_batches_unfinished"] == 1
    gate.open()
    wait_for(lambda: scrape(server)["batchlab_batches_unfinished"] == 0, PATIENCE_S, "the batch has ended")


def test_the_names_have_their_colon_whatever_format_prometheus_prefers(server: Server) -> None:
    prefers = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    response = server.client.get("/metrics", headers=prefers)
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert Scrape(parse(response.text)).names == scrape(server).names >= {"vllm:generation_tokens_total", "batchlab_mode"}


def test_a_key_is_asked_for_as_everywhere(serve: Callable[..., Server]) -> None:
    client = serve(api_key="class", teacher_key="teacher").client
    assert client.get("/metrics").status_code == 401
    for key in ("class", "teacher"):
        assert client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_while_the_model_loads_there_is_nothing_to_show(engine: Engine, tmp_path: Path) -> None:
    loop = BatchingLoop(SETTINGS.make_policy("dynamic", {}), lambda: engine)
    store = Store(tmp_path)
    response = create_app(loop, SETTINGS, store, runner=None).test_client().get("/metrics")  # type: ignore[arg-type]
    assert (response.status_code, response.get_json()["error"]["code"]) == (503, "loading")
    store.close()


# In virtual time.

LIMITS = Limits(max_batch_size=3, token_budget=12, max_prefill_tokens=64, max_context=40, block_size=4, num_blocks=12)
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 20), st.integers(1, 12), st.sampled_from(Priority)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("switch"), st.sampled_from(sorted(POLICIES))),
        st.tuples(st.just("reset")),
        st.tuples(st.just("turn"), st.integers(1, 5)),
    ),
    max_size=25,
)


def shown(driver: Driver) -> Scrape:
    state = {"running": 0, "queue_depth": 0, "kv_use": 0.0, "kv_blocks": 12, "tbt_slo_ms": 200.0}
    snapshot = Snapshot("demo", driver.stats.totals(), state, describe_policy(driver.scheduler.policy), LIMITS, 0)
    return Scrape(snapshot.collect())


@given(events=events, depth=st.sampled_from([1, 2]), failing=st.sets(st.integers(1, 20), max_size=2))
def test_whatever_happens_no_counter_falls_and_all_agree_in_the_end(events: list, depth: int, failing: set[int]) -> None:
    clock, answered = VirtualClock(), []
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock, answered.append)
    executor = VirtualExecutor(clock, lambda step: 0.01 * len(step.rows), depth, failing)

    def turn() -> bool:
        due = driver.iterate(executor)
        clock.now = max(clock.now, due or 0.0)
        return due is not None

    before = shown(driver)
    for i, (kind, *details) in enumerate(events):
        if kind == "submit":
            prompt, output, priority = details
            driver.submit(Request(str(i), [0] * prompt, output, priority, clock.now))
        elif kind == "cancel":
            driver.cancel(str(details[0]), RequestError("cancelled", "gone"))
        elif kind == "switch":
            driver.switch(POLICIES[details[0]]())
        elif kind == "reset":
            driver.stats.reset(clock.now, live=driver.scheduler.num_live > 0)
        else:
            for _ in range(details[0]):
                turn()
        after = shown(driver)
        assert_none_fell(before, after)
        before = after
    while turn():
        pass
    end = shown(driver)
    assert_none_fell(before, end)
    served = [req for req in answered if req.error is None]
    assert end["vllm:request_success_total"] == end["vllm:e2e_request_latency_seconds_count"] == len(served)
    assert end["batchlab_request_errors_total"] == len(answered) - len(served)
    assert end["vllm:generation_tokens_total"] == sum(len(req.output) for req in answered)
    assert end["vllm:prompt_tokens_total"] == sum(req.prompt_len for req in answered if req.output)
    assert end["vllm:time_to_first_token_seconds_count"] == sum(bool(req.output) for req in answered)
    tokens = end["vllm:time_to_first_token_seconds_count"] + end["vllm:inter_token_latency_seconds_count"]
    assert tokens == end["vllm:generation_tokens_total"]
    queued = sum(req.admitted_at - req.arrival for req in served)
    assert end["vllm:request_queue_time_seconds_sum"] == pytest.approx(queued)
    assert end["vllm:iteration_tokens_total_sum"] == end["batchlab_computed_tokens_total"]


def test_buckets_count_all_that_lies_under_their_bound() -> None:
    driver = Driver(Scheduler(POLICIES["dynamic"](), LIMITS), clock := VirtualClock(), lambda req: None)
    for i, output in enumerate((1, 2, 3)):
        driver.submit(Request(str(i), [0], output))
    executor = VirtualExecutor(clock, lambda step: 0.3)
    while driver.iterate(executor) is not None:
        pass
    buckets = [value for (name, _), value in shown(driver).samples.items() if name == "vllm:e2e_request_latency_seconds_bucket"]
    found = shown(driver)
    under = {
        le: found.get("vllm:e2e_request_latency_seconds_bucket", le=le) for le in ("0.2", "0.316", "0.5", "0.65", "1.0", "+Inf")
    }
    assert under == {"0.2": 0, "0.316": 1, "0.5": 1, "0.65": 2, "1.0": 3, "+Inf": 3}
    assert len(buckets) == 3 * (len(REQUEST_S) + 1), "the bounds and infinity, for each priority"
    assert len(found.samples) < 5000, "more would be a burden for whoever scrapes"


def test_what_may_come_is_there_from_the_start_with_zero() -> None:
    found = shown(Driver(Scheduler(POLICIES["dynamic"](), LIMITS), VirtualClock(), lambda req: None))
    assert set(found.growing.values()) == {0.0}
    for reason in ("length", "stop"):
        for kind in ("immediate", "deferred", "promoted"):
            assert found.get("vllm:request_success_total", finished_reason=reason, priority=kind) == 0
    assert found.get("batchlab_request_errors_total", code="queue_full") == 0


def test_a_policy_that_is_not_registered_is_shown_as_the_mode_too() -> None:
    class Mine(Policy):
        pass

    assert shown(Driver(Scheduler(Mine(), LIMITS), VirtualClock(), lambda req: None)).get("batchlab_mode", mode="Mine") == 1


# What is drawn and written about them.

SYNTAX = re.compile(r"\bby \([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\b(?:sum|rate|increase|histogram_quantile|label_values)\b")
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        yield re.sub(r", \w+\)$", ")", variable["query"]["query"])


def test_every_name_in_the_dashboard_is_one_that_is_given(server: Server) -> None:
    names = scrape(server).names
    for expression in expressions():
        used = NAME.findall(SYNTAX.sub(" ", expression))
        assert used, expression
        assert set(used) <= names, expression


def test_every_label_in_the_dashboard_is_one_that_its_metrics_have(server: Server) -> None:
    labels = {name: set(dict(has)) | {"instance"} for name, has in scrape(server).samples}  # instance: Prometheus adds it
    for expression in expressions():
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", matchers)) <= labels[name], expression
            for grouped in re.findall(r"by \(([^)]*)\)", expression):
                assert set(grouped.split(", ")) <= labels[name], expression


def test_the_dashboard_can_be_imported_with_any_prometheus() -> None:
    assert [(wanted["name"], wanted["pluginId"]) for wanted in DASHBOARD["__inputs"]] == [("DS_PROMETHEUS", "prometheus")]
    sources = [panel["datasource"] for panel in DASHBOARD["panels"]]
    sources += [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    sources += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    assert all(source == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for source in sources)
    assert {panel["type"] for panel in DASHBOARD["panels"]} == {
        it["id"] for it in DASHBOARD["__requires"] if it["type"] == "panel"
    }
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    used = set(re.findall(r"\$(\w+)", " ".join(expressions())))
    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}


def test_the_description_names_what_is_given_and_nothing_else(server: Server) -> None:
    given_names = {s.name for f in scrape(server).families for s in f.samples if f.type != "histogram"}
    given_names |= {f.name for f in scrape(server).families if f.type == "histogram"}
    given_names = {name for name in given_names if not name.startswith("process_")}
    described = set(re.findall(r"`((?:vllm:|batchlab_)\w+)`", (DOCS / "metrics.md").read_text()))
    assert described == given_names
