"""What HTTP in front of the engine costs: the whole server with many clients, against its engine alone, on the same requests.

    python -m benchmarks.http --device cuda

As many requests as clients, all at once, each answered as a whole; mode dynamic, random weights of gpt2-medium's shape, which
are written to --work once. The two take turns, each in a process of its own, and the best of the runs counts. This is the one
benchmark beside peers.py that needs the server's own packages (flask, gunicorn).
"""

import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.contenders import checkpoint, ours, ours_over_http
from benchmarks.contenders.contender import Session, Setup
from benchmarks.program import add_repeat, arguments
from benchmarks.workload import LENGTHS, VOCAB_SIZE, Job

CLIENTS = {"cpu": 64, "cuda": 256}
OUTPUTS = {"cpu": (64, 128), "cuda": (256, 512)}  # tokens, uniform


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_repeat(parser, 2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "batchlab-peers", metavar="DIR")
    args = parser.parse_args()
    folder = checkpoint.made_once(args.work / "medium", lambda part: checkpoint.write(part, checkpoint.MEDIUM))
    setup = Setup(folder, args.device, None, float("inf"))
    rng = random.Random(0)
    jobs = [
        ([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(*LENGTHS))], rng.randint(*OUTPUTS[args.device]))
        for _ in range(CLIENTS[args.device])
    ]
    best = dict.fromkeys(("engine", "server"), 0.0)
    for _ in range(args.repeat):
        for name in best:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                best[name] = max(best[name], pool.submit(speed, name, setup, jobs).result())
    print(f"{len(jobs)} clients, outputs of {OUTPUTS[args.device][0]} to {OUTPUTS[args.device][1]} tokens, {args.device}")
    engine, server = best.values()
    print(f"engine alone {engine:.0f} output tokens/s, over HTTP {server:.0f}: {server / engine:.0%}")


def speed(name: str, setup: Setup, jobs: list[Job]) -> float:
    """Output tokens a second."""
    session: Session = (ours if name == "engine" else ours_over_http)(setup, "auto")
    try:
        session.serve([(prompt, length // 8) for prompt, length in jobs])  # warm
        started = time.perf_counter()
        outputs = session.serve(jobs)
        return sum(map(len, outputs)) / (time.perf_counter() - started)
    finally:
        session.close()


if __name__ == "__main__":
    main()
