"""The real server, as its users start it: what it prints, how it drains, and what only a real connection can show."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from .server_process import ROOT, START_TIMEOUT_S, RawRequest, ServerProcess, clean_environment, wait_for

Start = Callable[..., ServerProcess]
DEMO = ("--model", "demo", "--dtype", "fp32", "--device", "cpu")
SLOW = ("--model", "distilgpt2", "--weights", "random", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "1")
LONG = {"prompt": "hello", "num_tokens": 1000}  # half a minute of SLOW's, on a fast machine still more than any bound here
PROGRESS = re.compile(r"  \d+ s: ")
FREED_WITHIN_S = 3  # the server promises 2; one more for a loaded machine, where a step itself may take a while


def health(server: ServerProcess) -> tuple[int, str] | None:
    """Status and state; None if nobody listens yet."""
    try:
        answer = requests.get(server.url + "/health", timeout=START_TIMEOUT_S)
    except requests.ConnectionError:
        return None
    return answer.status_code, answer.json()["status"]


@pytest.fixture(scope="module")
def started(start_process: Start) -> tuple[ServerProcess, list[tuple[int, str]]]:
    """The demo model's server, and what its /health answered from the first connection to the first 200."""
    server = start_process("dynamic", *DEMO)
    answers: list[tuple[int, str]] = []

    def ready() -> bool:
        if answer := health(server):
            answers.append(answer)
        return bool(answers) and answers[-1][0] == 200

    wait_for(ready, START_TIMEOUT_S, "/health is 200")
    return server.wait_until_ready(), answers


@pytest.fixture(scope="module")
def server(started: tuple[ServerProcess, list[tuple[int, str]]]) -> ServerProcess:
    return started[0]


@pytest.fixture(scope="module")
def slow_process(start_process: Start) -> ServerProcess:
    return start_process("dynamic", *SLOW, "--max-queue", "2").wait_until_ready()


@pytest.fixture
def slow(slow_process: ServerProcess) -> ServerProcess:
    """One seat, two places in the queue, and nothing in them."""
    slow_process.wait_for_load(running=0, queue_depth=0)
    return slow_process


def test_health_is_503_until_the_model_is_loaded(started: tuple[ServerProcess, list[tuple[int, str]]]) -> None:
    assert set(started[1][:-1]) == {(503, "loading")}
    assert started[1][-1] == (200, "ready")


def test_the_ready_line_says_where_and_what_is_served(server: ServerProcess) -> None:
    kinds = r"mode dynamic, model demo, weights \w+, device cpu, dtype fp32"
    assert re.fullmatch(rf"ready: {re.escape(server.url)}, {kinds}", server.ready_line)
    assert requests.get(server.url + "/health", timeout=10).json() == {"status": "ready", "reason": "ready"}


def test_a_body_of_20_mb_is_answered_with_413_and_not_with_a_reset(server: ServerProcess) -> None:
    response = requests.post(server.url + "/inference", data=b"x" * 20_000_000, timeout=60)
    assert response.status_code == 413
    assert response.json()["error"]["param"] == "body"
    assert str(1 << 20) in response.json()["error"]["message"]
    assert server.ask(prompt="The king", num_tokens=1).status_code == 200


def pieces(number: int) -> Iterator[bytes]:
    """A body that `requests` sends chunked: JSON that is valid already after its first piece."""
    yield b'{"prompt": "The king", "num_tokens": 1}'
    for _ in range(number):
        yield b" " * 100_000


def test_a_chunked_body_is_read_and_one_over_the_limit_is_413_and_not_cut(server: ServerProcess) -> None:
    sent = [requests.post(server.url + "/inference", data=pieces(number), timeout=60) for number in (1, 30)]
    assert [response.status_code for response in sent] == [200, 413]


def test_a_connection_can_be_used_again_after_a_body_that_was_refused_unread(server: ServerProcess) -> None:
    for path in ["/inference", "/nothing"] * 6:  # bytes left unread close the connection under the next call, now and then
        for body in (b"x" * 3_000_000, pieces(30)):
            with requests.Session() as session:
                session.post(server.url + path, data=body, timeout=60)
                assert session.get(server.url + "/health", timeout=10).status_code == 200


@pytest.mark.parametrize("path", ["/inference", "/v1/files", "/login", "/mode", "/nothing"])
def test_what_is_no_http_is_the_callers_fault_and_answered_in_json(server: ServerProcess, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n".encode()
    for sent in (
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n",
        head + b"Content-Length: five\r\n\r\n",
        head + b"No colon\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(sent)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 400
            assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}


def test_errors_of_a_real_connection_are_json_too(server: ServerProcess) -> None:
    answers = [
        requests.get(server.url + "/nothing", timeout=10),
        requests.get(server.url + "/inference", timeout=10),
        requests.post(server.url + "/inference", data=b'{"prompt":' * 50_000, timeout=10),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_switching_under_load_loses_nothing_and_answers_everyone_once(server: ServerProcess) -> None:
    requests.post(server.url + "/stats/reset", timeout=10)
    asked = [1 + 7 * n % 40 for n in range(60)]
    modes = ["static", "orca", "mixed", "nobatch", "dynamic"]
    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(server.ask, prompt=f"Scene {i}", num_tokens=n) for i, n in enumerate(asked)]
        for mode in modes:
            switched = requests.put(server.url + "/mode", json={"mode": mode}, timeout=60)
            assert (switched.status_code, switched.json()["mode"]) == (200, mode)
    for i, (num_tokens, answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.result().status_code == 200
        assert answer.result().json()["num_tokens"] == num_tokens
        assert answer.result().json()["completion"].startswith(f"Scene {i}")
        assert answer.result().json()["mode"] in modes
    stats = server.stats()
    assert (stats["requests_finished"], stats["total-tokens-handled"], stats["errors"]) == (60, sum(asked), {})
    assert (stats["running"], stats["queue_depth"], stats["kv_use"]) == (0, 0, 0)


@pytest.mark.parametrize("body", [{"mode": "turbo"}, {}, {"mode": "static", "params": {"batch_timeout_ms": "soon"}}])
def test_a_switch_that_will_not_do_is_400(server: ServerProcess, body: dict[str, object]) -> None:
    assert requests.put(server.url + "/mode", json=body, timeout=10).status_code == 400


def test_a_full_queue_is_429_with_retry_after(slow: ServerProcess) -> None:
    with RawRequest(slow, **LONG):
        slow.wait_for_load(running=1, queue_depth=0)
        with RawRequest(slow, **LONG), RawRequest(slow, **LONG):
            slow.wait_for_load(running=1, queue_depth=2)
            refused = slow.ask(prompt="hello", num_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_a_client_that_hangs_up_frees_its_seat(slow: ServerProcess) -> None:
    cancelled = slow.stats()["errors"].get("cancelled", 0)
    with RawRequest(slow, **LONG):
        slow.wait_for_load(running=1, queue_depth=0)
    slow.wait_for_load(running=0, queue_depth=0, timeout_s=FREED_WITHIN_S)
    assert slow.stats()["errors"]["cancelled"] == cancelled + 1
    assert slow.ask(prompt="hello", num_tokens=1).status_code == 200


def test_a_client_that_hangs_up_frees_its_place_in_the_queue(slow: ServerProcess) -> None:
    with RawRequest(slow, **LONG):
        slow.wait_for_load(running=1, queue_depth=0)
        with RawRequest(slow, **LONG):
            slow.wait_for_load(running=1, queue_depth=1)
        slow.wait_for_load(running=1, queue_depth=0, timeout_s=FREED_WITHIN_S)


def test_sigterm_finishes_what_runs_and_answers_503_to_what_waits(start_process: Start) -> None:
    slow = start_process("dynamic", *SLOW).wait_until_ready()
    with RawRequest(slow, prompt="hello", num_tokens=40) as running:
        slow.wait_for_load(running=1, queue_depth=0)
        with RawRequest(slow, **LONG) as second, RawRequest(slow, **LONG) as third:
            slow.wait_for_load(running=1, queue_depth=2)
            slow.terminate()
            assert [call.status() for call in (running, second, third)] == [200, 503, 503]
    assert slow.wait() == 0
    assert not any("Traceback" in line for line in slow.stderr)


def test_ctrl_c_answers_everyone_at_once(start_process: Start) -> None:
    slow = start_process("dynamic", *SLOW).wait_until_ready()
    with RawRequest(slow, **LONG) as running, RawRequest(slow, **LONG) as waiting:
        slow.wait_for_load(running=1, queue_depth=1)
        slow.process.send_signal(signal.SIGINT)
        assert [call.status() for call in (running, waiting)] == [503, 503]
    assert slow.wait() == 0


def test_a_port_that_is_taken_is_one_clear_line(server: ServerProcess) -> None:
    second = subprocess.run(
        [sys.executable, "app.py", "dynamic", "--port", str(server.port)],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 1
    assert second.stderr == f"server.sh: 127.0.0.1, port {server.port}: cannot listen there: Address already in use\n"


def test_a_load_that_fails_is_one_clear_line_and_no_status_0(start_process: Start, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    server = start_process("dynamic", "--model", "gpt2", "--weights", str(nowhere))
    assert server.process.wait(START_TIMEOUT_S) != 0
    said = [line for line in server.stderr if not PROGRESS.match(line)]
    assert len(said) == 1, server.stderr
    assert said[0].startswith("server.sh: the server cannot go on: ")
    assert str(nowhere) in said[0]
    assert server.ready_line == ""


def test_a_log_that_cannot_be_written_is_one_clear_line_and_no_status_0(start_process: Start, tmp_path: Path) -> None:
    server = start_process("dynamic", *DEMO, "--input-log", str(tmp_path / "no" / "log"))
    assert server.wait() != 0
    assert len(server.stderr) == 1, server.stderr
    assert server.stderr[0].startswith("server.sh: --input-log: ")


def test_a_server_that_is_told_to_end_while_it_loads_ends_with_status_0(start_process: Start) -> None:
    server = start_process("dynamic", *DEMO)
    wait_for(lambda: health(server), START_TIMEOUT_S, "/health answers")
    server.terminate()
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.stderr)


@pytest.fixture(scope="module")
def guarded(start_process: Start, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """The default model where its weights cannot be had, with both keys."""
    nothing = str(tmp_path_factory.mktemp("hub"))
    keys = ("--api-key", "student", "--teacher-key", "teacher")
    return start_process("dynamic", *keys, HF_HUB_OFFLINE="1", HF_HOME=nothing, HF_HUB_CACHE=nothing).wait_until_ready()


def test_where_the_default_model_cannot_be_had_the_server_says_so_and_serves_demo(guarded: ServerProcess) -> None:
    assert len(guarded.stdout) == 2, guarded.stdout
    note = guarded.stdout[0]
    assert note.startswith("gpt2-medium cannot be served")
    assert "demo" in note
    assert ", model demo, " in guarded.ready_line
    assert not any("Traceback" in line for line in guarded.stderr)
    stats = requests.get(guarded.url + "/stats", headers={"Authorization": "Bearer student"}, timeout=10).json()
    assert (stats["model"], stats["vocabulary"], stats["note"]) == ("demo", "demo", note)


CALLS = [
    ("GET", "/stats", None),
    ("GET", "/mode", None),
    ("PUT", "/mode", {"mode": "static"}),
    ("POST", "/stats/reset", None),
    ("POST", "/inference", {"prompt": "The king", "num_tokens": 1}),
]


@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", "Bearer ", "Bearer student2", "Basic c3R1ZGVudA==", "Bearer é"]
)
def test_without_the_api_key_everything_but_health_is_401(guarded: ServerProcess, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    for method, path, body in CALLS:
        refused = requests.request(method, guarded.url + path, json=body, headers=headers, timeout=10)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(guarded.url + "/health", headers=headers, timeout=10).status_code == 200


def test_students_may_ask_and_only_the_teacher_may_switch_and_reset(guarded: ServerProcess) -> None:
    for key, status in (("student", 403), ("teacher", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        statuses = {
            (method, path): requests.request(method, guarded.url + path, json=body, headers=headers, timeout=60).status_code
            for method, path, body in CALLS
        }
        assert statuses.pop(("PUT", "/mode")) == status
        assert statuses.pop(("POST", "/stats/reset")) == status
        assert set(statuses.values()) == {200}
