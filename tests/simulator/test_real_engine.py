"""Calibrating and validating on the real engine, and on a real server by its log."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the real engine needs torch")

import requests

from batching.policy import Limits
from simulator.__main__ import main
from simulator.real import RealEngine
from tests.api.server_process import ServerProcess


def test_the_real_engine_is_validated_in_this_process(tmp_path: Path, capsys):
    out = tmp_path / "figures.json"
    plan = ["--requests", "12", "--rate", "30", "--prompt", "4-40", "--output", "2-12"]
    main(
        [
            "validate",
            "--engine",
            "demo",
            "--dtype",
            "fp32",
            "--limit",
            "max_batch_size=4",
            *plan,
            "--runs",
            "1",
            "--out",
            str(out),
        ]
    )
    said = capsys.readouterr()
    assert "are the same step by step" in said.out, said.err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["plans_differ"] == 0
    assert {"requests/s", "TTFT p50, s", "TPOT p99, s", "E2EL p90, s"} <= {figure["name"] for figure in found["figures"]}
    assert all(figure["simulated"] > 0 and figure["real"][0] > 0 for figure in found["figures"])


def test_the_real_engine_takes_the_limits_that_a_server_has_settings_for():
    given = Limits(max_batch_size=2, token_budget=32, num_blocks=60, prefix_caching=True)
    taken = RealEngine("demo", "random", "fp32", given, tbt_slo_ms=77.0).limits
    assert (taken.max_batch_size, taken.token_budget, taken.num_blocks) == (2, 32, 60)
    assert (taken.prefix_caching, taken.tbt_slo_ms) == (True, 77.0)


def test_a_real_server_is_calibrated_by_its_records_and_validated_by_its_log(tmp_path: Path, capsys):
    log, model = tmp_path / "run.jsonl", tmp_path / "model.json"
    flags = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "4", "--input-log", str(log))
    server = ServerProcess(tmp_path, "dynamic", *flags).wait_until_ready()
    try:
        bodies = [{"prompt": "The old house " * (1 + i % 5), "num_tokens": 3 + i % 9, "seed": i} for i in range(24)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: requests.post(server.url + "/inference", json=body, timeout=60), bodies))
        assert [answer.status_code for answer in answers] == [200] * 24
        assert main(["calibrate", "--url", server.url, "--out", str(model)]) == 0
        assert main(["validate", "--log", str(log), "--url", server.url, "--model", str(model)]) in (0, 1)
    finally:
        server.terminate()
        server.wait()
    said = capsys.readouterr()
    assert "step records of the server are those of the plans made again from its log" in said.err
    assert "E2EL p50" in said.out
