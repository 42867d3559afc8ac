"""Kills the whole server at random moments while a batch of 500 lines runs, starts it again each time, and looks whether each
line's result is there exactly once. Lines differ in length, so that at each kill some are on disk, some half done, some left;
one kill in five hits a server that is still starting. As a script, with as many kills as asked for:

    python -m tests.api.kills --kills 100
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import requests

from tests.api.server_process import ServerProcess, wait_for

LINES = 500
FLAGS = ("--model", "demo", "--dtype", "fp32", "--device", "cpu", "--max-batch-size", "8")
LONGEST_LIFE_S = 1.5  # of a server, from the moment it is ready
LONGEST_START_S = 2.0
KILLED_STARTING = 5  # one kill in so many
FINISHED_WITHIN_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300, help="of the longest line; the shortest has a tenth")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), args.kills, args.seed, args.max_tokens)
    print(json.dumps(outcome))


def run(folder: Path, kills: int, seed: int, max_tokens: int) -> dict[str, Any]:
    """What there is after so many kills and one undisturbed run to the end."""
    rng = random.Random(seed)
    flags = (*FLAGS, "--data-dir", str(folder / "store"))
    server = ServerProcess(_made(folder / "0"), "mixed", *flags, own_group=True).wait_until_ready()
    batch = _create(server, max_tokens)
    seen, states = [], Counter[str]()
    try:
        for kill in range(1, kills + 1):
            if kill % KILLED_STARTING == 0:
                time.sleep(rng.uniform(0, LONGEST_START_S))
                states["starting"] += 1
            else:
                server.wait_until_ready()
                time.sleep(rng.uniform(0, LONGEST_LIFE_S))
                now = _look(server, batch)
                seen.append(now["request_counts"]["completed"])
                states[now["status"]] += 1
            server.kill_group()
            server = ServerProcess(_made(folder / str(kill)), "mixed", *flags, own_group=True)
        server.wait_until_ready()
        wait_for(lambda: _look(server, batch)["status"] == "completed", FINISHED_WITHIN_S, "the batch is completed")
        ended = _look(server, batch)
        content = requests.get(f"{server.url}/v1/files/{ended['output_file_id']}/content", timeout=60).text
    finally:
        server.kill_group()
    ids = Counter(json.loads(line)["custom_id"] for line in content.splitlines())
    return {
        "kills": kills,
        "killed_while": dict(states),
        "completed_when_killed": seen,
        "never_fewer_than_before": seen == sorted(seen),
        "results": sum(ids.values()),
        "lines_with_a_result": len(ids),
        "twice": [name for name, times in ids.items() if times > 1],
        "lost": [f"line-{i}" for i in range(LINES) if f"line-{i}" not in ids],
        "counts": ended["request_counts"],
        "error_file_id": ended["error_file_id"],
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _create(server: ServerProcess, max_tokens: int) -> str:
    rng = random.Random(0)
    fixed = {"model": "demo", "prompt": "The old house", "ignore_eos": True}
    bodies = [fixed | {"max_tokens": rng.randint(max_tokens // 10, max_tokens)} for _ in range(LINES)]
    content = "\n".join(
        json.dumps({"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body})
        for i, body in enumerate(bodies)
    )
    sent = requests.post(server.url + "/v1/files", files={"file": ("lines", content)}, data={"purpose": "batch"}, timeout=60)
    asked_for = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    id: str = requests.post(server.url + "/v1/batches", json=asked_for, timeout=60).json()["id"]
    return id


def _look(server: ServerProcess, batch: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{server.url}/v1/batches/{batch}", timeout=60).json()
    return found


if __name__ == "__main__":
    main()
