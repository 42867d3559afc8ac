"""The app over a real batching loop and the real demo model, in this process; and the real server as a process."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api.completion_request import read_completion
from api.errors import describe
from app import create_app, load_engine
from batching.loop import BatchingLoop, Engine, Health
from config import Settings
from jobs.runner import Runner
from jobs.store import Store

from .server_process import ServerProcess, wait_for

SETTINGS = Settings(model="demo", dtype="fp32", device="cpu", max_batch_size=8)
PATIENCE_S = 20  # how long a request may take to be answered before a test gives up


class Gate:
    """A hook before the real model's forward pass, in the batching thread: holds steps up, slows them down, or fails them."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.failure: Exception | None = None
        self.seconds_a_step = 0.0
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self, *inputs: object) -> None:
        self._open.wait(PATIENCE_S)
        time.sleep(self.seconds_a_step)
        if self.failure is not None:
            raise self.failure


class Server:
    """The app in this process. Each call has a test client of its own; `later` posts from another thread."""

    def __init__(self, loop: BatchingLoop, settings: Settings) -> None:
        self.loop = loop
        self.store = Store(Path(settings.data_dir))
        self.runner = Runner(self.store, loop, read_completion, describe)
        self.runner.start()
        self.app = create_app(loop, settings, self.store, self.runner)
        self._stopped = False
        self._threads = ThreadPoolExecutor(max_workers=16)

    @property
    def client(self) -> FlaskClient:
        return self.app.test_client()

    @property
    def extensions(self) -> dict[str, Any]:
        return self.app.extensions

    def ask(self, prompt: str = "The king", num_tokens: int = 1, **fields: Any) -> TestResponse:
        return self.client.post("/inference", json={"prompt": prompt, "num_tokens": num_tokens, **fields})

    def later(self, *args: Any, **fields: Any) -> "Future[TestResponse]":
        return self._threads.submit(self.ask, *args, **fields)

    def put_mode_later(self, mode: str) -> "Future[TestResponse]":
        return self._threads.submit(lambda: self.client.put("/mode", json={"mode": mode}))

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.client.get("/stats").get_json()
        return stats

    def wait_for_load(self, running: int, queue_depth: int) -> None:
        """Meant for a closed gate: the numbers stay as they are then."""

        def reached() -> bool:
            stats = self.loop.stats()
            return (stats["running"], stats["queue_depth"]) == (running, queue_depth)

        wait_for(reached, PATIENCE_S, f"{running} running and {queue_depth} waiting")

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.loop.drain("the test is over")
        self.loop.abort("the test is over")
        self.loop.join(PATIENCE_S)
        self._threads.shutdown(wait=False)
        self.runner.stop(PATIENCE_S)
        self.store.close()


@pytest.fixture(scope="session")
def loaded() -> tuple[Engine, Gate]:
    engine, gate = load_engine(SETTINGS), Gate()
    engine.executor._model.wte.register_forward_pre_hook(gate)  # type: ignore[attr-defined]
    return engine, gate


@pytest.fixture
def engine(loaded: tuple[Engine, Gate]) -> Engine:
    return loaded[0]


@pytest.fixture
def gate(loaded: tuple[Engine, Gate]) -> Iterator[Gate]:
    yield loaded[1]
    loaded[1].reset()


@pytest.fixture
def serve(engine: Engine, gate: Gate, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers over the one loaded model: `serve(mode, max_queue=..., api_key=...)`."""
    started = []

    def start(mode: str = "dynamic", **changes: Any) -> Server:
        settings = replace(SETTINGS, mode=mode, **{"data_dir": str(tmp_path / f"data{len(started)}"), **changes})
        limits = replace(engine.limits, max_batch_size=settings.max_batch_size, max_queue=settings.max_queue)
        about = engine.about | {"served_model_names": settings.served_model_name or ("demo",)}
        loop = BatchingLoop(settings.make_policy(mode, {}), lambda: engine._replace(limits=limits, about=about))
        loop.start()
        wait_for(lambda: loop.health is not Health.LOADING, PATIENCE_S, "loaded")
        started.append(Server(loop, settings))
        return started[-1]

    yield start
    gate.reset()
    for server in started:
        server.stop()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture(scope="module")
def start_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts real servers; those that still run at the end of the module get a SIGTERM and have to end with status 0."""
    started: list[ServerProcess] = []

    def start(mode: str, *flags: str, **environment: str) -> ServerProcess:
        started.append(ServerProcess(tmp_path_factory.mktemp("server"), mode, *flags, environment=environment))
        return started[-1]

    yield start
    running = [server for server in started if server.is_running]
    for server in running:
        server.terminate()
    assert [server.wait() for server in running] == [0] * len(running)
