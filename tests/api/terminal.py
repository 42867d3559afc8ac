"""The real server in a terminal of its own, a pseudo-terminal whose other end is ours: what is typed there (Ctrl-C), and its
closing, reach the whole process group, the worker as well as gunicorn's master."""

import os
import pty
import sys
from pathlib import Path

import requests

from .server_process import START_TIMEOUT_S, ServerProcess, wait_for

# The terminal becomes the new session's own only if the process asks for it; then it is the server.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
CTRL_C = b"\x03"


class TerminalServer(ServerProcess):
    """With `nohup` its output goes to files, as always; without it goes to the terminal."""

    def __init__(self, folder: Path, mode: str, *flags: str, nohup: bool = False) -> None:
        self._ours, theirs = pty.openpty()
        self._open = True
        self._nohup = nohup
        try:
            super().__init__(folder, mode, *flags, own_group=True, terminal=theirs, to_terminal=not nohup)
        finally:
            os.close(theirs)

    def command(self, mode: str, *flags: str) -> list[str]:
        server = super().command(mode, *flags)
        return [sys.executable, "-c", TAKE_TERMINAL, *(["nohup"] if self._nohup else []), *server]

    def wait_until_ready(self) -> "TerminalServer":
        def ready() -> bool:
            assert self.is_running, self.said()
            try:
                return requests.get(self.url + "/health", timeout=START_TIMEOUT_S).status_code == 200
            except requests.ConnectionError:
                return False

        wait_for(ready, START_TIMEOUT_S, "/health is 200")
        return self

    def said(self) -> str:
        """What stands on the terminal."""
        os.set_blocking(self._ours, False)
        try:
            return os.read(self._ours, 1 << 16).decode()
        except OSError:
            return ""

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def close_terminal(self) -> None:
        if self._open:
            self._open = False
            os.close(self._ours)
