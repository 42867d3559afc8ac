"""The whole server, as ./server.sh starts it, in mode dynamic: what HTTP, JSON, the tokenizer and threads take."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from string import ascii_letters

from benchmarks.contenders.contender import UNKNOWN, Session, Setup
from benchmarks.contenders.http_server import HttpServer
from benchmarks.workload import Job
from config import PREFIX

ROOT = Path(__file__).parents[2]


class Server(Session):
    """/inference takes text, so that the prompts are as long as the jobs' and say something else."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        self._data = tempfile.TemporaryDirectory()
        flags = (
            "--data-dir",
            self._data.name,
            "--model",
            "gpt2-medium",
            "--weights",
            str(setup.checkpoint),
            "--dtype",
            dtype,
            "--device",
            setup.device,
        )
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._server = HttpServer(
            lambda port: [sys.executable, str(ROOT / "app.py"), "dynamic", "--port", str(port), *flags], own
        )
        try:
            self.dtype = self._server.get("/stats").json()["dtype"]
        except BaseException:
            self.close()
            raise

    def serve(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        """Not the tokens, since the server answers with text, but as many as it has counted."""
        rng = Random(0)
        bodies = [{"prompt": _text(len(prompt), rng), "num_tokens": length, "temperature": 0} for prompt, length in jobs]
        return [[UNKNOWN] * answer["num_tokens"] for answer in self._server.post_all("/inference", bodies)]

    def close(self) -> None:
        self._server.close()
        self._data.cleanup()


def _text(num_tokens: int, rng: Random) -> str:
    """So many words of one letter: in the checkpoint's vocabulary, as in GPT-2's, " a" is one token."""
    return "".join(" " + rng.choice(ascii_letters) for _ in range(num_tokens))
