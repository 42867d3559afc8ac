"""Puts the server together: settings, batching loop, model, routes. `python app.py MODE ...` checks the settings and becomes
gunicorn; gunicorn's worker calls `application()`.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from flask import Flask

import config
from api import auth, batches, burst, dashboard, errors, files, hosts, instance, metrics, openai, openapi, teaching, watching
from api.completion_request import read_completion
from batching.loop import BatchingLoop, Engine
from config import Settings
from jobs.errors import StoreError
from jobs.runner import Runner
from jobs.store import Store

MAX_BODY_BYTES = 1 << 20
DEFAULT_MODEL = "gpt2-medium"
# torch's threads wait for each other by spinning, by default for milliseconds: on a laptop where anything else computes, each
# then burns the time slice that the other needs (docs/performance.md). After so many turns they sleep.
SPIN_COUNT = 5000
# oneDNN keeps a compiled kernel, of half a megabyte, for each number of rows that a layer has seen: 1,024 of them by default,
# and torch keeps as many beside it, so that a server grew for hours (docs/performance.md). So many serve as well.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
LAST_ANSWERS_S = 0.5  # for HTTP threads to write what a failed engine answered
SAY_EVERY_S = 4  # what a start that takes longer is doing


def create_app(loop: BatchingLoop, settings: Settings, store: Store, runner: Runner) -> Flask:
    """The routes over a batching loop and the store of batches, whose `runner` is woken when there is something new in it."""
    app = Flask("batchlab", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["batching"] = loop
    app.extensions["settings"] = settings
    app.extensions["store"] = store
    app.extensions["runner"] = runner
    errors.register(app)
    instance.register(app)
    if not settings.api_key:
        hosts.register(app, settings.host, settings.allowed_hosts)
    auth.register(app, settings.api_key, settings.teacher_key)
    app.config["CREATED"] = int(time.time())
    app.register_blueprint(teaching.blueprint)
    app.register_blueprint(metrics.blueprint)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(files.blueprint)
    app.register_blueprint(batches.blueprint)
    app.register_blueprint(watching.blueprint)
    app.register_blueprint(burst.blueprint)
    app.register_blueprint(dashboard.blueprint)
    app.register_blueprint(openapi.blueprint)
    return app


def load_engine(settings: Settings, say: Callable[[str], None] = lambda doing: None) -> Engine:
    """Load the model; in the batching thread, since it takes its time. `say` is told what is being done. Raises CheckpointError
    or ValueError."""
    say("importing torch")
    from model.engine import load_model, load_variants, make_executor  # torch: a second that the listener need not wait for
    from model.probe import probe

    name = settings.model or DEFAULT_MODEL
    fall_back = not settings.model and settings.weights == "pretrained"
    say(f"reading {name} and laying out its weights")
    loaded = load_model(name, settings.weights, settings.dtype, settings.device, fall_back=fall_back)
    cheaper = load_variants(loaded, settings.variants, settings.dtype, settings.device)
    usual = config.GPU_BATCH_SIZE if loaded.device.type == "cuda" else config.CPU_BATCH_SIZE
    slots = settings.max_batch_size or min(usual, settings.token_budget)
    say("trying a step, whose kernels are compiled once and kept")
    executor, limits = make_executor(
        loaded, time.monotonic, slots, settings.token_budget, settings.max_queue, settings.kv_memory_gb, cheaper
    )
    say("measuring steps of the engine")
    limits, probes = probe(executor, limits)
    limits = replace(limits, prefix_caching=settings.prefix_caching == "on")
    if settings.tbt_slo_ms:
        limits = replace(limits, tbt_slo_ms=settings.tbt_slo_ms)
    about = {
        "model": loaded.name,
        "served_model_names": settings.served_model_name or (loaded.name,),
        "variants": list(limits.variants),
        "weights": loaded.weights,
        "vocabulary": loaded.tokenizer.name,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "note": loaded.note,
    }
    gc.collect()
    gc.freeze()  # else a full collection walks over half a million objects of torch's: 0.15 s in which no step is computed
    return Engine(executor, limits, loaded.tokenizer, about, probes)


def application() -> Flask:
    """What gunicorn serves. The settings come from the environment, where `main` put them."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    settings = config.read({}, os.environ, {})
    try:
        store = Store(Path(settings.data_dir))
    except StoreError as error:
        print(f"server.sh: --data-dir: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None

    def load() -> Engine:
        with Progress() as say:
            return load_engine(settings, say)

    loop = BatchingLoop(
        settings.make_policy(settings.mode, {}),
        load,
        on_ready=lambda engine: _print_ready(settings, engine),
        on_failed=_exit_failed,
        input_log=_open_log(settings.input_log) if settings.input_log else None,
    )
    runner = Runner(store, loop, read_completion, errors.describe)
    loop.start()
    runner.start()
    return create_app(loop, settings, store, runner)


class Progress:
    """Says on stderr, every few seconds to the end of the block, what a start is doing."""

    def __enter__(self) -> Callable[[str], None]:
        self._doing, self._began, self._ended = "", time.monotonic(), threading.Event()
        threading.Thread(target=self._run, name="progress", daemon=True).start()
        return self._say

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _say(self, doing: str) -> None:
        self._doing = doing

    def _run(self) -> None:
        hint = " (Ctrl-C stops the server)"
        while not self._ended.wait(SAY_EVERY_S):
            print(f"  {time.monotonic() - self._began:.0f} s: {self._doing}{hint}", file=sys.stderr, flush=True)
            hint = ""


def _print_ready(settings: Settings, engine: Engine) -> None:
    about: dict[str, Any] = engine.about
    if about["note"]:
        print(about["note"], flush=True)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    kinds = f"mode {settings.mode}, model {about['model']}, weights {about['weights']}"
    print(f"ready: http://{host}:{settings.port}, {kinds}, device {about['device']}, dtype {about['dtype']}", flush=True)


def _exit_failed(error: BaseException) -> None:
    """Gunicorn's master gives up, with the same status, when a worker ends with 3: no use in loading the model again."""
    print(f"server.sh: the server cannot go on: {error}", file=sys.stderr, flush=True)
    time.sleep(LAST_ANSWERS_S)
    os._exit(3)


def _open_log(path: str) -> Any:
    """A private file of its own for each run; those before it are kept as PATH.1, PATH.2, ..."""
    log = Path(path)
    if log.is_file() and log.stat().st_size:
        log.rename(next(old for n in count(1) if not (old := log.with_name(f"{log.name}.{n}")).exists()))
    file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    if log.is_file():
        log.chmod(0o600)

    def write(record: dict[str, Any]) -> None:
        if file.closed:
            return
        try:
            file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk ends the log, not the server
            logging.getLogger("batchlab").error("--input-log: %s: the log ends here", error)
            with contextlib.suppress(OSError):
                file.close()

    return write


def main() -> None:
    try:
        settings = config.parse(sys.argv[1:], os.environ, config.load_dotenv())
    except config.SettingError as error:
        print(f"server.sh: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    os.chdir(config.HERE)  # paths that the caller gave are absolute by now
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:  # gunicorn would try five times, and say so ten times
        print(
            f"server.sh: {settings.host}, port {settings.port}: cannot listen there: {os.strerror(error.errno or 0)}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    try:
        Store(Path(settings.data_dir)).close()
    except StoreError as error:
        print(f"server.sh: --data-dir: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if told := allow_open_files(settings):
        print(f"server.sh: {told}", file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    environment = KERNEL_CACHES | environment
    command = [sys.executable, "-m", "gunicorn", "-c", str(config.HERE / "gunicorn.conf.py")]
    os.execve(sys.executable, command, environment | settings.environment())


def allow_open_files(settings: config.Settings) -> str | None:
    """A connection is an open file: many shells allow 1,024 a process, and more where it is asked for. What to say where even
    that is not enough; then fewer connections are taken at a time (`gunicorn.conf.py`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections + config.OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most >= settings.threads + config.OTHER_FILES:
        return None
    needed = f"--max-queue {settings.max_queue} needs {settings.threads + config.OTHER_FILES}"
    return f"only {hard} files may be open at a time, and {needed}: raise the limit (ulimit -Hn), or lower --max-queue"


if __name__ == "__main__":
    main()
