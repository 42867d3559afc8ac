"""Runs the commands of README.md and the pages beside this file as they stand: `python docs/check_commands.py [PAGE ...]`.

A page's commands run one after another in a copy of the repository, from its root, as a reader would run them: `python` is
.venv's; `./server.sh` goes on in the background until the next one, or until the page ends. A comment above a block, which no
reader sees, says what else is to be done with it: `<!-- not run: WHY -->`, `<!-- file: NAME -->` (the block is what that file
holds), `<!-- run -->` (a block of Python that is a program). Servers listen on port 8500, as the pages say, so it must be free.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S = 900, 120, 40
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    note: str  # of the comment above it
    line: int


class Failed(Exception):
    """A command of a page did not do what a reader would expect; the message names page and line."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(found["language"], found["text"], found["note"] or "", text.count("\n", 0, found.start("text")) + 1)
        for found in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[str]:
    """The commands of a block of bash, each a line or several that end in a backslash; comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s)#.*", "", line).strip()
        if command:
            yield command


def main(names: list[str]) -> int:
    """0 if all of them ran, 1 otherwise; what failed is one line each."""
    failures = 0
    for page in [Path(name).resolve() for name in names] or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_page(page, copy_to(Path(folder) / "batchlab"))
            except Failed as failed:
                failures += 1
                print(f"FAILED {failed}", flush=True)
    return min(failures, 1)


def copy_to(folder: Path) -> Path:
    """A copy of the working tree without what git ignores, with this one's installed packages."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run_page(page: Path, folder: Path) -> None:
    """Raises Failed at the first command that does not exit with 0."""
    server: subprocess.Popen[bytes] | None = None
    try:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if block.note.startswith("not run"):
                print(f"{where}: {block.note}", flush=True)
            elif block.note.startswith("file: "):
                (folder / block.note.removeprefix("file: ")).write_text(block.text, "utf-8")
            elif block.language == "python" and block.note == "run":
                _run([sys.executable, "-c", block.text], "the program", where, folder)
            elif block.language == "bash":
                for command in commands(block):
                    if command.startswith("./server.sh") and "--help" not in command:
                        _stop(server)
                        server = _start(command, where, folder)
                    else:
                        _run(["bash", "-c", command], command, where, folder)
    finally:
        _stop(server)


def _environment(folder: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHLAB_")}
    return own | {"PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"}


def _run(arguments: list[str], shown: str, where: str, folder: Path) -> None:
    begun = time.monotonic()
    try:
        done = subprocess.run(
            arguments,
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{where}: {shown}: not done after {COMMAND_TIMEOUT_S} s") from None
    if done.returncode:
        raise Failed(f"{where}: {shown}: exit status {done.returncode}\n{done.stdout.decode(errors='replace')[-3000:]}")
    print(f"{where}: {time.monotonic() - begun:6.1f} s  {shown[:150]}", flush=True)


def _start(command: str, where: str, folder: Path) -> "subprocess.Popen[bytes]":
    printed = folder / "server.log"
    with printed.open("wb") as log:
        as_process = ["bash", "-c", f"exec {command}"]
        server = subprocess.Popen(
            as_process, cwd=folder, env=_environment(folder), stdout=log, stderr=log, start_new_session=True
        )
    begun = time.monotonic()
    while b"ready: " not in (said := printed.read_bytes()):
        if server.poll() is not None or time.monotonic() - begun > START_TIMEOUT_S:
            _stop(server)
            raise Failed(f"{where}: {command}: the server is not ready\n{said.decode(errors='replace')[-3000:]}")
        time.sleep(0.1)
    print(f"{where}: {time.monotonic() - begun:6.1f} s  {command} (until it is ready)", flush=True)
    return server


def _stop(server: "subprocess.Popen[bytes] | None") -> None:
    if server is None:
        return
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
