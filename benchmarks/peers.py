"""Is this server as fast as others that serve the same model? Output tokens per second of each, and the ratios that decide.

    python -m benchmarks.peers --llama-server PATH

W1 is 64 requests at once, W2 are 8 of them one at a time (benchmarks/workload.py). Every request gets exactly the tokens it
asks for, greedily. All serve the same checkpoint, gpt2-medium's shape with random weights. It is written to --work once, as
are the peers' conversions of it (5 GB in all). The contenders take turns, and the best of their runs counts. "agrees" says for
how many of W1's requests the first token is the one that a peer finds in float32. With random weights some choices are so
close that 16 bits change them, and 8 bits more; a contender that computes something else agrees nowhere.

Nothing else may run on the machine: engines whose threads wait by spinning, this one among them, lose most of their speed to a
neighbour that takes a core.

What the peers need is in requirements-bench.txt; one that is missing is a row that says so. llama.cpp's server is built from
source, in 4 to 11 minutes on two cores, for example from the Python package that brings it along:

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \\
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_WEBUI=OFF
    cmake --build build --target llama-server        # it is build/bin/llama-server
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from benchmarks.contenders import CONTENDERS, checkpoint
from benchmarks.contenders.contender import Missing, Setup
from benchmarks.contenders.table import Row, table
from benchmarks.contenders.turn import take_turn
from benchmarks.program import add_repeat, arguments, write_csv

LIMIT_S = 30.0  # for the baseline that computes everything anew


def main() -> None:
    args = read_arguments()
    name, shape = ("tiny", checkpoint.TINY) if args.tiny else ("medium", checkpoint.MEDIUM)
    folder = checkpoint.made_once(args.work / name, lambda part: checkpoint.write(part, shape))
    setup = Setup(folder, args.device, args.llama_server, LIMIT_S / 15 if args.tiny else LIMIT_S)
    rows = [Row(c) for c in CONTENDERS if any(part in c.title for part in args.only.split(","))]
    for run in range(1, args.repeat + 1):
        for row in rows:
            if not row.note:
                measure(row, setup, f"run {run} of {args.repeat}")
    print(table(rows))
    if args.csv:
        write_runs(args.csv, rows)
    if any(row.failed for row in rows):
        raise SystemExit(1)


def read_arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    add_repeat(parser, 3)
    parser.add_argument("--only", default="", metavar="NAME,NAME", help='those with one of these in their "name dtype"')
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server, the program")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "batchlab-peers", metavar="DIR")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every single measurement, a line each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: this server and transformers only")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 layers, to try the benchmark itself in a minute")
    return parser.parse_args()


def measure(row: Row, setup: Setup, run: str) -> None:
    """Add a turn to the row, or the reason why there is none."""
    started = time.perf_counter()
    try:
        turn = take_turn(row.contender, setup)
    except Missing as missing:
        row.note = str(missing)
        outcome = row.note
    except Exception as error:  # the others go on
        traceback.print_exception(error)
        row.failed = True
        row.note = outcome = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    else:
        row.turns.append(turn)
        outcome = f"{turn.w1.speed:.1f} and {turn.w2.speed:.1f} tokens/s"
    took = time.perf_counter() - started
    print(f"{run}: {row.contender.title}: {outcome} ({took:.0f} s)", file=sys.stderr, flush=True)


def write_runs(path: Path, rows: list[Row]) -> None:
    write_csv(path, (line for row in rows for line in csv_lines(row)))


def csv_lines(row: Row) -> Iterator[dict[str, object]]:
    """One for each workload of each run, and one for the note."""
    empty = dict.fromkeys(("workload", "run", "tokens", "seconds", "tokens_per_s", "note"))
    who = {"contender": row.contender.name, "dtype": row.dtype} | empty
    for run, turn in enumerate(row.turns, 1):
        for name, done in (("W1", turn.w1), ("W2", turn.w2)):
            figures = {"tokens": done.tokens, "seconds": f"{done.seconds:.4f}", "tokens_per_s": f"{done.speed:.2f}"}
            yield who | {"workload": name, "run": run} | figures
    if row.note:
        yield who | {"note": row.note}


if __name__ == "__main__":
    main()
