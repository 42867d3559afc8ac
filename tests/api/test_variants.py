"""A server with variants of its model: who asks for too much in too little time gets 504, and /stats say what served."""

from dataclasses import replace
from pathlib import Path

import pytest

from app import load_engine
from batching.loop import BatchingLoop, Health

from .conftest import PATIENCE_S, SETTINGS, Server
from .server_process import wait_for


@pytest.fixture
def server(tmp_path: Path):
    settings = replace(SETTINGS, mode="deadline", variants=("demo:2",), data_dir=str(tmp_path))
    loop = BatchingLoop(settings.make_policy("deadline", {}), lambda: load_engine(settings))
    loop.start()
    wait_for(lambda: loop.health is not Health.LOADING, 6 * PATIENCE_S, "loaded")
    server = Server(loop, settings)
    yield server
    server.stop()


def test_a_deadline_that_no_variant_can_meet_is_a_504_and_the_others_are_served(server: Server):
    refused = server.ask(num_tokens=400, deadline_s=0.04)  # 10,000 tokens a second, one at a time
    assert refused.status_code == 504
    assert refused.get_json()["error"]["code"] == "deadline_missed"
    assert server.ask(num_tokens=5).status_code == 200
    stats = server.stats()
    assert stats["variants"] == ["demo", "demo:2"]
    assert stats["requests_by_variant"] == {"0": 1}, "alone, it gets the most accurate one"
    assert sum(stats["errors"].values()) == 1
