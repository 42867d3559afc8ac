"""server.sh from the first call to the start of the server: with real environments and real installers, in a copy of the
repository whose app.py only says how it was called. What it installs is a package that takes some seconds to build."""

import fcntl
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import app
from tests.read_only import bound, read_only

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120
PYTHON = sys._base_executable  # type: ignore[attr-defined] # not the one of an environment
BUILD_S = 6  # longer than the time between two lines about the installation
APP = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), sys.prefix]))"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "slow"
version = "1"
"""
BACKEND = f"""
import time, zipfile
def build_wheel(folder, *_):
    time.sleep({BUILD_S})
    with zipfile.ZipFile(folder + "/slow-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("slow.py", "")
        wheel.writestr("slow-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: slow\\nVersion: 1\\n")
        wheel.writestr("slow-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("slow-1.dist-info/RECORD", "")
    return "slow-1-py3-none-any.whl"
def prepare_metadata_for_build_wheel(folder, *_):
    import os
    os.mkdir(folder + "/slow-1.dist-info")
    with open(folder + "/slow-1.dist-info/METADATA", "w") as file:
        file.write("Metadata-Version: 2.1\\nName: slow\\nVersion: 1\\n")
    return "slow-1.dist-info"
"""


def make_house(folder: Path) -> Path:
    folder.mkdir()
    for name in ("server.sh", "environment.sh", "config.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "batching", folder / "batching", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "app.py").write_text(APP, encoding="utf-8")
    program(folder / "tools", "nvidia-smi", "#!/bin/sh\n")  # a GPU: torch's other index is not asked
    (folder / "slow").mkdir()
    (folder / "slow" / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (folder / "slow" / "backend.py").write_text(BACKEND, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"slow @ {(folder / 'slow').as_uri()}\n", encoding="utf-8")
    return folder


def environment(path: str = "", **more: str) -> dict[str, str]:
    """This one without settings of the server; `path` goes before PATH."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("BATCHLAB_", "PYTHON", "UV_", "VIRTUAL_ENV"))
    }
    own["PATH"] = f"{path}:{own['PATH']}"
    return own | {"PYTHON": PYTHON, "PYTHONDONTWRITEBYTECODE": "1"} | more


def call(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = environment(str(cwd / "tools")) if env is None else env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


def started(done: subprocess.CompletedProcess[str]) -> list:
    """The arguments, the folder and the environment that the server was started with."""
    assert done.returncode == 0, done.stderr
    found: list = json.loads(done.stdout.splitlines()[-1])
    return found


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def house(tmp_path: Path) -> Path:
    return make_house(tmp_path / "house")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A house in which the server was started once, and what that start said."""
    house = make_house(tmp_path_factory.mktemp("first") / "house")
    return house, call("./server.sh", "dynamic", "--port", "0", cwd=house)


@pytest.fixture(scope="module")
def installed(first: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    started(first[1])
    return first[0]


def test_the_first_start_says_every_few_seconds_what_it_is_doing_and_what_ctrl_c_does(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    house, done = first
    assert started(done) == [["dynamic", "--port", "0"], str(house), str(house / ".venv")]
    said = done.stderr.splitlines()
    assert said[0] == "installing requirements.txt into .venv, once; it takes some minutes"
    assert "Ctrl-C" in said[1]
    assert [line for line in said if (" s: " in line and "slow" in line) or "wheel" in line], said


def test_the_second_start_installs_nothing_and_says_nothing(installed: Path) -> None:
    assert call("./server.sh", "dynamic", cwd=installed).stderr == ""


def test_it_starts_through_a_symlink_from_another_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "batchlab").symlink_to(installed / "server.sh")
    done = call("./batchlab", "dynamic", "two words", cwd=tmp_path)
    assert done.returncode == 2, "an argument too many"
    assert started(call("./batchlab", "dynamic", cwd=tmp_path)) == [["dynamic"], str(tmp_path), str(installed / ".venv")]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_it_starts_with_any_shell_before_it(installed: Path, tmp_path: Path, shell: str) -> None:
    done = call(shell, str(installed / "server.sh"), "dynamic", "--data-dir", "two words", cwd=tmp_path)
    assert started(done)[0] == ["dynamic", "--data-dir", "two words"]


def test_without_the_variable_the_environments_own_python_checks_the_arguments(installed: Path) -> None:
    env = environment(f"{installed}/tools")
    del env["PYTHON"]
    assert started(call("./server.sh", "dynamic", cwd=installed, env=env))[2] == str(installed / ".venv")


def test_a_python_of_another_version_than_the_environment_is_refused_in_one_line(installed: Path, tmp_path: Path) -> None:
    other = f'#!/bin/sh\nif [ "$1" = -c ]; then echo 3.99; else exec {PYTHON} "$@"; fi\n'
    name = str(program(tmp_path / "bin", "python3.99", other) / "python3.99")
    done = call("./server.sh", "dynamic", cwd=installed, env=environment(PYTHON=name))
    mine = ".".join(map(str, sys.version_info[:2]))
    assert done.returncode == 2
    assert done.stderr == f"{installed}/.venv has a Python {mine}, {name} is 3.99: rm -rf .venv, then again\n"


def test_an_environment_whose_python_is_gone_is_one_line(house: Path) -> None:
    (house / ".venv" / "bin").mkdir(parents=True)
    (house / ".venv" / "bin" / "python").symlink_to(house / "gone")
    done = call("./server.sh", "dynamic", cwd=house)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{house}/.venv has a Python that does not run, ")
    assert done.stderr.endswith(": rm -rf .venv, then again\n")


def test_a_python_that_is_too_old_is_one_line(house: Path, tmp_path: Path) -> None:
    old = str(program(tmp_path / "bin", "old", "#!/bin/sh\necho 3.9\nexit 1\n") / "old")
    done = call("./server.sh", "dynamic", cwd=house, env=environment(PYTHON=old))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "3.10 or newer" in done.stderr


def test_an_environment_made_by_uv_has_no_pip_and_uv_installs(house: Path) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("there is no uv (pip install uv)")
    subprocess.run([uv, "venv", "--python", PYTHON, "--quiet", house / ".venv"], check=True, timeout=PATIENCE_S)
    done = call("./server.sh", "dynamic", cwd=house, env=environment(f"{Path(uv).parent}:{house}/tools"))
    assert started(done)[2] == str(house / ".venv")
    assert call("./server.sh", "dynamic", cwd=house).stderr == ""
    assert call(house / ".venv" / "bin" / "python", "-c", "import slow", cwd=house).returncode == 0


def test_where_there_is_no_uv_either_pip_is_made_first(house: Path) -> None:
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", house / ".venv"], check=True, timeout=PATIENCE_S)
    without_uv = ":".join(folder for folder in os.environ["PATH"].split(":") if not Path(folder, "uv").exists())
    assert started(call("./server.sh", "dynamic", cwd=house, env=environment(PATH=without_uv)))[2] == str(house / ".venv")


def test_an_installation_that_fails_shows_what_the_installer_said_and_is_tried_again(house: Path) -> None:
    wanted = (house / "requirements.txt").read_text(encoding="utf-8")
    (house / "requirements.txt").write_text(f"{house}/no-such-package\n", encoding="utf-8")
    done = call("./server.sh", "dynamic", cwd=house)
    assert done.returncode == 2
    assert "no-such-package" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("installing failed")
    (house / "requirements.txt").write_text(wanted, encoding="utf-8")
    assert started(call("./server.sh", "dynamic", cwd=house))[0] == ["dynamic"]


def start_where_folders_bind(house: Path) -> subprocess.CompletedProcess[str]:
    with read_only(house, *house.glob(".venv")):
        return call(*bound(), "./server.sh", "dynamic", cwd=house)


def test_in_a_folder_that_cannot_be_written_it_says_so_and_does_not_speak_of_venv(house: Path) -> None:
    done = start_where_folders_bind(house)
    assert done.returncode == 2
    assert done.stderr == f"{house}: .venv cannot be made there: copy the folder to where you may write\n"


def test_where_all_is_installed_the_folder_need_not_be_writable(installed: Path) -> None:
    assert started(start_where_folders_bind(installed))[2] == str(installed / ".venv")


def test_where_something_is_new_to_be_installed_an_environment_that_cannot_be_written_is_one_line(house: Path) -> None:
    (house / ".venv" / "bin").mkdir(parents=True)
    (house / ".venv" / "bin" / "python").symlink_to(PYTHON)
    done = start_where_folders_bind(house)
    assert done.returncode == 2
    assert done.stderr == f"{house}/.venv: requirements.txt must be installed there, and it cannot be written\n"


def test_ctrl_c_while_it_installs_is_answered_by_a_line_and_the_next_start_goes_on(house: Path) -> None:
    master, terminal = pty.openpty()
    start = subprocess.Popen(
        ["./server.sh", "dynamic"], cwd=house, env=environment(f"{house}/tools"),
        stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    said = ""
    until = time.monotonic() + PATIENCE_S
    while " s: " not in said:  # pip is at work
        assert time.monotonic() < until, said
        said += os.read(master, 4096).decode()
    os.write(master, b"\x03")
    try:
        while more := os.read(master, 4096):
            said += more.decode()
    except OSError:  # the terminal's last program has ended
        pass
    os.close(master)
    assert start.wait(PATIENCE_S) == 130, said
    assert said.rstrip().splitlines()[-1].removeprefix("^C") == "stopped while installing; the next start goes on from there"
    assert started(call("./server.sh", "dynamic", cwd=house))[0] == ["dynamic"]


CHOOSE = (
    "source {root}/environment.sh; CPU_TORCH={index}; choose_torch; echo ${{PIP_EXTRA_INDEX_URL:-}} / ${{UV_EXTRA_INDEX_URL:-}}"
)


@pytest.fixture
def index() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def choose(index: socket.socket, gpu: bool, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{index.getsockname()[1]}/cpu"
    tools = program(folder / "bin", "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    script = "here=/nowhere; " + CHOOSE.format(root=ROOT, index=url)
    return call("bash", "-c", script, cwd=folder, env=environment(str(tools), no_proxy="127.0.0.1", **more))


def test_without_a_gpu_torchs_cpu_build_is_looked_for_at_its_index(index: socket.socket, tmp_path: Path) -> None:
    def answer() -> None:
        connection, _ = index.accept()
        with connection:
            asked.append(connection.recv(1000).split(b"\r\n")[0])
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

    asked: list[bytes] = []
    server = threading.Thread(target=answer)
    server.start()
    done = choose(index, gpu=False, folder=tmp_path, PIP_EXTRA_INDEX_URL="https://mine")
    server.join()
    url = f"http://127.0.0.1:{index.getsockname()[1]}/cpu"
    assert asked == [b"GET /cpu/torch/ HTTP/1.1"]
    assert done.stdout == f"https://mine {url} / {url}\n"
    assert done.stderr == "no NVIDIA GPU: taking torch's small CPU build\n"


def test_an_index_that_never_answers_holds_nothing_up_and_the_usual_one_is_taken(index: socket.socket, tmp_path: Path) -> None:
    done = choose(index, gpu=False, folder=tmp_path)
    assert done.stdout == "/\n"
    assert "does not answer: torch comes from the usual index" in done.stderr


def test_with_a_gpu_the_usual_index_has_the_build_for_it(index: socket.socket, tmp_path: Path) -> None:
    done = choose(index, gpu=True, folder=tmp_path)
    assert (done.stdout, done.stderr) == ("/\n", "")


def test_a_long_load_says_what_it_is_doing_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "SAY_EVERY_S", 0.01)
    said = ""

    def wait_for(text: str) -> None:
        nonlocal said
        until = time.monotonic() + PATIENCE_S
        while text not in said:
            assert time.monotonic() < until, said
            said += capfd.readouterr().err

    with app.Progress() as say:
        say("reading gpt2")
        wait_for("s: reading gpt2 (Ctrl-C stops the server)\n")
        say("trying a step")
        wait_for("s: trying a step\n")
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
