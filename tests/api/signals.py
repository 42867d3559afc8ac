"""Eighty clients wait for their answers when somebody presses Ctrl-C in the server's terminal, or closes the terminal, with the
server started under `nohup` or without. Each of them has to be answered: by 200 or, where the server ends, by 503. As a script,
each case as many times as asked for:

    python -m tests.api.signals --times 20
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .server_process import RawRequest
from .terminal import CTRL_C, TerminalServer

FLAGS = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8")
CASES: dict[str, Callable[[TerminalServer], None]] = {
    "ctrl-c": lambda server: server.type(CTRL_C),
    "hang-up": lambda server: server.close_terminal(),
    "hang-up under nohup": lambda server: server.close_terminal(),
}
CLIENTS, LONGEST_ANSWER, LONGEST_PAUSE_S = 80, 250, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = [run(Path(folder) / str(i), case, args.seed + i) for i in range(args.times)]
        answers = sum((Counter(outcome["answers"]) for outcome in outcomes), Counter[str]())
        ends = Counter(str(outcome["exit status"]) for outcome in outcomes)
        longest = max(outcome["seconds to the end"] for outcome in outcomes)
        print(json.dumps({"case": case, "answers": answers, "exit statuses": ends, "longest end, s": longest}), flush=True)


def run(folder: Path, case: str, seed: int, clients: int = CLIENTS) -> dict[str, Any]:
    """How the clients were answered, and how the server ended (with SIGTERM where the case leaves it running)."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    server = TerminalServer(folder, "dynamic", *FLAGS, nohup="nohup" in case).wait_until_ready()
    try:
        with ExitStack() as stack:
            asked = [{"prompt": "The king", "num_tokens": rng.randint(1, LONGEST_ANSWER)} for _ in range(clients)]
            connections = [stack.enter_context(RawRequest(server, **fields)) for fields in asked]
            time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
            begun = time.monotonic()
            CASES[case](server)
            answers = Counter(client.outcome() for client in connections)
        if "nohup" in case and server.is_running:
            server.terminate()
        status = server.wait()
    finally:
        server.close_terminal()
        if server.is_running:
            server.kill_group()
    return {"answers": dict(answers), "exit status": status, "seconds to the end": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    main()
